"""What all storage modules have in common: the protocol, its registry, and the layer that they stand for.

A storage module takes the place of a dense layer in a network and holds its weight in a smaller form. It is
an ordinary module: its buffers (or parameters) are what a file holds, byte for byte.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import is_transposed, swap, weight_matrix

KINDS: dict[str, type[StoredLayer]] = {}
# Kinds that other modules of this wing register; a file that names one makes the module be imported.
ELSEWHERE = {
    "low-rank": "paperback.compress.factors.layers",
    "mpo": "paperback.compress.factors.layers",
    "lora": "paperback.compress.survey.qlora",
    "int8-dynamic": "paperback.compress.survey.smoothquant",
}
FORMS = ("linear", "transposed", "conv1d", "conv2d", "embedding")
L = TypeVar("L", bound="type[StoredLayer]")
CONVOLUTION_OPTIONS = (
    "in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip
CONVOLUTIONS: dict[str, type[nn.Conv1d] | type[nn.Conv2d]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d}


@dataclass(frozen=True)
class LayerForm:
    """A dense layer without its numbers.

    Attributes:
        type: "linear"; "transposed", which is transformers' Conv1D; "conv1d"; "conv2d"; "embedding".
        shape: of the weight as a matrix: (out, in), of a convolution (out, in / groups * kernel), of an
            embedding (tokens, dimension).
        bias: whether there is one.
        options: of a convolution its constructor's arguments; of an embedding "padding_idx".
    """

    type: str
    shape: tuple[int, int]
    bias: bool
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(layer: nn.Module) -> LayerForm:
        """The form of a Linear, Conv1d, Conv2d, Embedding or transformers' Conv1D.

        Raises:
            DataError: for any other module.
        """
        bias = getattr(layer, "bias", None) is not None
        if isinstance(layer, StoredLayer):
            return layer.form
        if isinstance(layer, nn.Linear):
            return LayerForm("linear", (layer.out_features, layer.in_features), bias)
        if isinstance(layer, nn.Embedding):
            plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
            if not plain:
                raise DataError(
                    "an Embedding with max_norm, scale_grad_by_freq or sparse has no stored form."
                )
            shape = (layer.num_embeddings, layer.embedding_dim)
            return LayerForm("embedding", shape, False, {"padding_idx": layer.padding_idx})
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            options = {
                name: list(value) if isinstance(value := getattr(layer, name), tuple) else value
                for name in CONVOLUTION_OPTIONS
            }
            shape = (layer.out_channels, layer.weight[0].numel())
            return LayerForm("conv2d" if isinstance(layer, nn.Conv2d) else "conv1d", shape, bias, options)
        if is_transposed(layer):
            outputs, inputs = weight_matrix(layer).shape
            return LayerForm("transposed", (outputs, inputs), bias)
        raise DataError(f"a {type(layer).__name__} has no stored form; give a Linear, Conv or Embedding.")

    def spec(self) -> dict[str, Any]:
        """The form as JSON values."""
        return asdict(self) | {"shape": list(self.shape)}

    @staticmethod
    def read(spec: Any) -> LayerForm:
        """The inverse of `spec`.

        Raises:
            ArtefactError: if it is not the spec of a layer.
        """
        try:
            form = LayerForm(spec["type"], tuple(spec["shape"]), spec["bias"], dict(spec["options"]))
            sizes = len(form.shape) == 2 and all(isinstance(n, int) and n > 0 for n in form.shape)
            if form.type in FORMS and sizes and isinstance(form.bias, bool):
                with torch.device("meta"):
                    form.rebuild()
                return form
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtefactError(f"this is not the description of a layer: {error!r}.") from error
        raise ArtefactError(f"this is not the description of a layer: {spec!r}.")

    def apply(self, x: Tensor, matrix: Float[Tensor, "out in"], bias: Tensor | None) -> Tensor:
        """What the layer gives for x when its weight is `matrix`."""
        if self.type == "embedding":
            return nn.functional.embedding(x, matrix, self.options["padding_idx"])
        if self.type not in CONVOLUTIONS:
            return nn.functional.linear(x, matrix, bias)
        with torch.device("meta"):
            layer = self.rebuild()
        # torch's own treatment of padding modes; the layer is only a description, it has no numbers.
        return layer._conv_forward(x, matrix.view(layer.weight.shape), bias)

    def rebuild(self) -> Any:
        """A dense layer of this form, with any weights; transformers' Conv1D comes back as itself."""
        out, inputs = self.shape
        if self.type == "linear":
            return nn.Linear(inputs, out, bias=self.bias)
        if self.type == "embedding":
            return nn.Embedding(out, inputs, padding_idx=self.options["padding_idx"])
        if self.type == "transposed":
            from transformers.pytorch_utils import Conv1D

            return Conv1D(out, inputs)
        options = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()
        }
        convolution: Any = CONVOLUTIONS[self.type]
        return convolution(out_channels=out, bias=self.bias, **options)

    def dense_layer(self, matrix: Float[Tensor, "out in"], bias: Tensor | None) -> nn.Module:
        """A dense layer of this form with this weight."""
        with torch.device("meta"):
            layer = self.rebuild()
        weight = matrix.T.contiguous() if self.type == "transposed" else matrix.reshape(layer.weight.shape)
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer


class StoredLayer(nn.Module, ABC):
    """Base of the storage modules: a layer whose weight is kept in another form than a dense matrix.

    A subclass has a `kind`, is registered with `@storage_module`, and writes `dense`, `spec`, `empty`, a
    class method `from_dense` with arguments of its own, and, where its buffers can hold what they must not,
    `check`. All that a file must hold is in buffers and parameters; `spec` holds the rest. A `forward` of its
    own goes with a `prepare` of its own.

    Attributes:
        form: the layer that it stands for.
        bias: of that layer.
    """

    kind: ClassVar[str]
    trainable: ClassVar[bool] = False
    form: LayerForm
    bias: Tensor | None

    def __init__(self, form: LayerForm, bias: Tensor | None) -> None:
        """Only for subclasses, which give the form and the bias of the layer."""
        super().__init__()
        self.form = form
        self._ready: Tensor | None = None
        self.register_buffer("bias", None if bias is None else bias.detach())

    @abstractmethod
    def dense(self) -> Float[Tensor, "out in"]:
        """The weight as a matrix, computed anew."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What `empty` must know, as JSON values."""

    @classmethod
    @abstractmethod
    def empty(cls, spec: dict[str, Any]) -> Self:
        """A module with buffers and parameters of the right shapes and types and any contents.

        It works on the meta device, where nothing is allocated, whatever the spec claims.

        Raises:
            ArtefactError: if the spec is not of this kind.
        """

    def numbers_stored(self) -> list[Tensor]:
        """The numbers that its packed bytes stand for: those of the weight, or of its factors."""
        return [self.dense()]

    def check(self) -> None:
        """Look at the contents of the buffers after they were read from a file.

        Raises:
            ArtefactError: if they hold what this kind never writes.
        """
        for part in self.children():
            if isinstance(part, StoredLayer):
                part.check()
        for name, tensor in [*self.named_buffers(), *self.named_parameters()]:
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ArtefactError(f"{name} of a stored layer is not finite.")

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer would give; its weight is computed for this call, unless it was prepared."""
        weight = self.dense() if self._ready is None else self._ready
        if x.is_floating_point():
            weight = weight.to(x.dtype)
        return self.form.apply(x, weight, self.bias)

    def prepare(self, how: Literal["dense", "kernel"] | None = "dense") -> bool:
        """Trade memory for speed: keep what a forward pass needs beside what is stored. Files do not change.

        Args:
            how: "dense": the weight itself, as large as before the compression; "kernel": the form that a
                kernel of torch multiplies by, as large as the packed one, where this layer has one; None to
                forget it. It is also forgotten when the module is moved or its type is changed.

        Returns:
            Whether the layer is prepared.
        """
        self._ready = self.dense().detach() if how == "dense" else None
        return self._ready is not None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Every move and change of type goes through here."""
        self.prepare(None)
        return super()._apply(*args, **kwargs)

    def to_dense(self) -> nn.Module:
        """A plain layer with the same weight."""
        return self.form.dense_layer(self.dense().detach(), self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight in the shape that the dense layer has it in; a copy, writing to it changes nothing."""
        matrix = self.dense()
        if self.form.type == "transposed":
            return matrix.T
        if self.form.type in CONVOLUTIONS:
            with torch.device("meta"):
                return matrix.view(self.form.rebuild().weight.shape)
        return matrix

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.form.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.form.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers and parameters, the bias among them."""
        return sum(t.numel() * t.element_size() for t in [*self.buffers(), *self.parameters()])

    def extra_repr(self) -> str:
        """Shape and form for `print(model)`."""
        return f"{self.form.type}, out={self.out_features}, in={self.in_features}, bytes={self.nbytes}"


def storage_module(cls: L) -> L:
    """Class decorator: files may name this kind from now on."""
    known = KINDS.setdefault(cls.kind, cls)
    if known.__qualname__ != cls.__qualname__ or known.__module__ != cls.__module__:
        raise TypeError(f"the kind {cls.kind!r} belongs to {known.__qualname__} already.")
    KINDS[cls.kind] = cls
    return cls


def is_storage(module: nn.Module) -> bool:
    """Whether a module is a storage module."""
    return isinstance(module, StoredLayer)


def spec_of(module: nn.Module) -> dict[str, Any]:
    """What `build` must know of a storage module, as JSON values: its kind and its `spec`."""
    assert isinstance(module, StoredLayer)
    return {"kind": module.kind} | module.spec()


def build(spec: dict[str, Any]) -> StoredLayer:
    """The module, on the current default device and with any contents, that a recipe's entry describes.

    Args:
        spec: {"kind": ..., and what `spec()` of that kind gave}.

    Raises:
        ArtefactError: if the kind is unknown or the rest is not of that kind.
    """
    kind = spec.get("kind")
    if kind not in KINDS and kind in ELSEWHERE:
        importlib.import_module(ELSEWHERE[kind])
    if kind not in KINDS:
        raise ArtefactError(
            f"a layer is stored as {kind!r}, which this version does not know; "
            f"it reads {', '.join(sorted(KINDS))}."
        )
    return KINDS[kind].empty(spec)


def stored_layers(model: nn.Module) -> dict[str, StoredLayer]:
    """The storage modules of a model by name; the model itself, if it is one, is named "".

    One that is part of another is not listed: its spec is part of the other's.
    """
    found: dict[str, StoredLayer] = {}
    outer: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, StoredLayer) and module not in outer:
            found[name] = module
            outer.update(module.modules())
    return found


def prepare(model: nn.Module, how: Literal["dense", "kernel"] | None = "dense") -> int:
    """Prepare all storage modules of a model, see `StoredLayer.prepare`.

    Returns:
        How many of them are prepared.
    """
    return sum(layer.prepare(how) for layer in stored_layers(model).values())


def to_dense(model: nn.Module) -> nn.Module:
    """Replace, in place, every storage module by a plain layer with the same weight.

    Returns:
        The model; if it is itself a storage module, the plain layer.
    """
    for name, module in stored_layers(model).items():
        if not name:
            return module.to_dense()
        swap(model, name, module.to_dense())
    return model
