"""A model with codebooks at some of its places: its codes, and what happens when they are set by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.explain.codebook_features import saved, search, start, tuning
from paperback.explain.codebook_features.edits import Edit, check, resolve
from paperback.explain.codebook_features.inputs import Inputs, batches, first, run
from paperback.explain.codebook_features.layer import CodebookLayer, Loss, Similarity
from paperback.explain.codebook_features.sites import Site, carried, find_sites, width

if TYPE_CHECKING:
    import pandas as pd

    from paperback.training import History

Edits = Edit | Sequence[Edit]
# Site, activation, what takes its place, and its codes (None where the codebook is disabled).
Watch = Callable[[str, Tensor, Tensor, Tensor | None], None]


def add_codebooks(
    model: nn.Module,
    sites: str | Sequence[str | Site] = "auto",
    n_codes: int = 1024,
    k: int = 1,
    *,
    layers: Sequence[int] | None = None,
    similarity: Similarity = "inner",
    loss: Loss = "ae",
    beta: float = 0.25,
    example: Any | None = None,
    seed: int = 0,
) -> CodebookModel:
    """Put codebooks at some places of a model.

    The model itself gets hooks, no new weights; `CodebookModel.remove` takes them off again. With fresh codes
    its output means nothing: call `init_kmeans` and `fit`.

    Args:
        model: any module.
        sites: names of sub-modules whose outputs are replaced, `Site`s, or, for transformers, placements:
            "attn_preproj", "mlp", "transformer_block", "preresidual"; "auto" is the first two.
        n_codes: codes of each group of each codebook.
        k: codes of a vector.
        layers: numbers of the blocks that placements are meant for; all if not given.
        similarity: how codes are chosen; see `CodebookLayer`.
        loss: how codes learn; see `CodebookLayer`.
        beta: weight of the commitment in two of the losses.
        example: an input of the model, to find out the widths of sites where nothing else tells them.
        seed: of the first codes.

    Returns:
        The model with its codebooks.

    Raises:
        DataError: if a site does not exist or is named twice, a width is not known, or the numbers do not
            fit.
    """
    from paperback.training import seeded

    if isinstance(model, CodebookModel):
        raise DataError("the model has codebooks already; call remove() on it first.")
    found = find_sites(model, sites, layers)
    codebooks = nn.ModuleDict()
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    with seeded(seed, "codebooks"):
        for site in found:
            codebooks[key(site.name)] = CodebookLayer(
                width(model, site, example), site.n_codes or n_codes, site.k or k, similarity, loss, beta,
                site.groups,
            ).to(like.device, like.dtype)  # fmt: skip
    return CodebookModel(model, found, codebooks)


class CodebookModel(nn.Module):
    """A model whose activations at some sites are lists of codes; made by `add_codebooks`.

    It is called like the model. Codes are tensors ``(rows, ..., groups, k)`` of int64, best first.

    Args:
        model: the model; its sub-modules get hooks.
        sites: where.
        codebooks: by `key` of the site's name, one for each site.

    Attributes:
        model: the model itself.
        sites: in their order.
        codebooks: the layers.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], codebooks: nn.ModuleDict) -> None:
        super().__init__()
        self.model, self.sites, self.codebooks = model, tuple(sites), codebooks
        self.codebooks.train(model.training)
        self._edits: dict[str, tuple[Edit, ...]] = {}
        self._watches: list[Watch] = []
        self._offset, self._whole, self._generates = 0, True, False
        self._handles = [model.register_forward_pre_hook(self._note_position, with_kwargs=True)]
        for site in self.sites:
            module = model.get_submodule(site.name)
            if site.at == "input":
                hook = module.register_forward_pre_hook(partial(self._before, site), with_kwargs=True)
            else:
                hook = module.register_forward_hook(partial(self._after, site), with_kwargs=True)
            self._handles.append(hook)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of a `transformers` model; interventions hold at every step, with or without a cache.

        Positions are counted in columns of the input, padding on the left included.
        """
        self._generates = True
        try:
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]
        finally:
            self._generates = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(site.name for site in self.sites)

    def codebook(self, site: str) -> CodebookLayer:
        """The layer at a site.

        Raises:
            DataError: if there is no codebook there.
        """
        if site not in self.names:
            raise DataError(f"there is no codebook at {site!r}; there are some at {', '.join(self.names)}.")
        layer = self.codebooks[key(site)]
        assert isinstance(layer, CodebookLayer)
        return layer

    # -- learning --------------------------------------------------------------------------------------------

    def init_kmeans(
        self,
        inputs: Inputs,
        *,
        tokens: int = 6000,
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = True,
    ) -> Self:
        """Set all codes to the centres of k-means of the normalised activations.

        Args:
            inputs: rows of the model's input.
            tokens: so many activations of each site are clustered, drawn from those of all rows.
            batch_size: rows of one forward pass.
            seed: of the draw and of k-means.
            progress: show a bar.

        Returns:
            Itself.

        Raises:
            DataError: if there are fewer activations than codes.
        """
        start.set_by_kmeans(self, inputs, tokens, batch_size, seed, progress)
        return self

    def fit(
        self, data: Tensor | Sequence[Tensor], loss: Any = None, *, steps: int, **settings: Any
    ) -> History:
        """Train codes and model together; see `paperback.explain.codebook_features.tuning.fit`."""
        return tuning.fit(self, data, loss, steps=steps, **settings)

    # -- reading ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def codes(self, inputs: Inputs, *, batch_size: int = 32) -> dict[str, Int[Tensor, "rows ... groups k"]]:
        """The codes of every token at every site.

        Args:
            inputs: rows of the model's input: a tensor, or tensors by keyword.
            batch_size: rows of one forward pass.

        Returns:
            By site, on the CPU; an id of -1 is a code that an intervention dropped.

        Raises:
            DataError: if there are no rows.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in self.names}

        def keep(name: str, _: Tensor, __: Tensor, ids: Tensor | None) -> None:
            if ids is not None:
                parts[name].append(ids.cpu())

        with self.watched(keep):
            for batch in batches(inputs, batch_size):
                self.run(batch)
        return {name: torch.cat(ids) for name, ids in parts.items() if ids}

    def report(self, inputs: Inputs, *, batch_size: int = 32) -> pd.DataFrame:
        """How each codebook is used on some rows.

        Returns:
            One line per site and group: ``tokens``, ``used`` and ``dead`` codes, ``mse`` (mean over tokens of
            |out - u|^2), ``input_norm`` (mean |u|), ``code_norm`` (mean over all codes).
        """
        return search.report(self, inputs, batch_size)

    @overload
    def search(
        self,
        inputs: Inputs,
        mask: Tensor,
        *,
        sites: Sequence[str] | None = ...,
        min_recall: float = ...,
        min_precision: float = ...,
        batch_size: int = ...,
    ) -> pd.DataFrame: ...

    @overload
    def search(
        self,
        inputs: Inputs,
        mask: Mapping[str, Tensor],
        *,
        sites: Sequence[str] | None = ...,
        min_recall: float = ...,
        min_precision: float = ...,
        batch_size: int = ...,
    ) -> dict[str, pd.DataFrame]: ...

    def search(
        self,
        inputs: Inputs,
        mask: Tensor | Mapping[str, Tensor],
        *,
        sites: Sequence[str] | None = None,
        min_recall: float = 0.01,
        min_precision: float = 0.0,
        batch_size: int = 32,
    ) -> Any:
        """The codes that tell the tokens of a mask from the others.

        Args:
            inputs: rows of the model's input.
            mask: which tokens have the property looked for, bool ``(rows, ...)`` as the codes' first
                dimensions; or several such masks by name, looked for in one pass.
            sites: which sites; all if not given.
            min_recall: leave out codes that meet no more than this part of the mask.
            min_precision: leave out codes of a lower precision.
            batch_size: rows of one forward pass.

        Returns:
            One line per code, the most precise first: ``site``, ``group``, ``code``, ``precision`` (hits per
            activation), ``recall`` (hits per token of the mask), ``ratio`` (how many times as often it is
            active on the mask as elsewhere), ``hits``, ``activations``. Of several masks, a table of each.

        Raises:
            DataError: if the mask is of another shape, or empty.
        """
        return search.search(self, inputs, mask, sites, min_recall, min_precision, batch_size)

    # -- changing --------------------------------------------------------------------------------------------

    @contextmanager
    def intervene(self, edits: Mapping[str, Edits]) -> Iterator[Self]:
        """Inside this context the codes at some sites are what the edits say.

        ``with model.intervene({"model.layers.0.mlp": force(7, positions=[2])}): ...``

        Contexts may be nested; the edits of both hold.

        Args:
            edits: site to what is done there: `force`, `ban`, `zero`, `pass_over`, or several.

        Raises:
            DataError: if a site, group or code does not exist, too few codes would be left, or, in a pass
                over whole sequences, a position lies beyond their end.
        """
        added = {}
        for name, given in edits.items():
            layer = self.codebook(name)
            several = (given,) if isinstance(given, Edit) else tuple(given)
            for edit in several:
                check(edit, name, layer.n_codes, layer.k, layer.groups)
            added[name] = self._edits.get(name, ()) + several
        before, self._edits = self._edits, self._edits | added
        try:
            yield self
        finally:
            self._edits = before

    @contextmanager
    def disabled(self, sites: Sequence[str] | None = None) -> Iterator[Self]:
        """Inside this context the codebooks of some sites (all if not given) let activations pass as they
        are."""
        layers = [self.codebook(name) for name in (self.names if sites is None else sites)]
        before = [layer.snap for layer in layers]
        for layer in layers:
            layer.snap = False
        try:
            yield self
        finally:
            for layer, snap in zip(layers, before, strict=True):
                layer.snap = snap

    def remove(self) -> nn.Module:
        """Take all codebooks off.

        Returns:
            The model, with the weights that it has now and without hooks.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model

    # -- keeping ---------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and codes to a folder; an older one of this kind is replaced.

        Raises:
            ArtefactError: if the folder holds something else.
        """
        saved.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> CodebookModel:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: the folder.
            model: a module of the same architecture, whose weights are replaced; not needed for a
                `transformers` model.

        Raises:
            ArtefactError: if the folder is damaged or foreign, or the model does not fit.
        """
        return saved.load(Path(folder), model)

    # -- hooks -----------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Inside this context a function is told of each call of a codebook: the site, the activation, what
        took its place, and the codes."""
        self._watches.append(watch)
        try:
            yield
        finally:
            self._watches.remove(watch)

    def run(self, inputs: Any) -> Any:
        """Call the model in evaluation mode with a tensor, or with tensors by keyword, on its device."""
        device = self.codebook(self.names[0]).codes.device
        moved = (
            inputs.to(device) if isinstance(inputs, Tensor) else {n: t.to(device) for n, t in inputs.items()}
        )
        before = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return run(self.model, moved)
        finally:
            for module, flag in before:
                module.training = flag

    def _note_position(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The keyword is past_key_values or cache, as the version of transformers has it.
        cache = next((v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")), None)
        self._whole = cache is None and not self._generates  # else the sequence goes on
        self._offset = 0 if cache is None else int(cache.get_seq_length())

    # Hooks are bound methods, not closures, so that a copy of the whole model calls its own codebooks.

    def _before(self, site: Site, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = carried(site, args, kwargs, None)
        if (out := self._snap(site, x)) is x:
            return None
        return ((out, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": out})

    def _after(
        self, site: Site, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        x = carried(site, args, kwargs, output)
        if (out := self._snap(site, x)) is x:
            return None
        if site.at == "update":
            out = out + (first(args) if args else kwargs["hidden_states"])
        return type(output)((out, *output[1:])) if isinstance(output, tuple | list) else out

    def _snap(self, site: Site, x: Tensor) -> Tensor:
        """What takes the place of an activation; itself where the codebook is disabled."""
        layer = self.codebook(site.name)
        if not layer.snap:
            self._tell(site, x, x, None)
            return x
        edits = self._edits.get(site.name, ())
        shape = x.shape[:-1]
        for edit in edits:
            if self._whole and edit.positions and len(shape) == 2 and max(edit.positions) >= shape[1]:
                raise DataError(
                    f"an edit at {site.name!r} names position {max(edit.positions)}; the sequences have "
                    f"{shape[1]}, counted from 0."
                )
        resolved = [resolve(edit, shape, self._offset, x.device) for edit in edits]
        out, ids = layer(x, [edit for edit in resolved if edit is not None])
        self._tell(site, x, out, ids)
        return out

    def _tell(self, site: Site, x: Tensor, out: Tensor, ids: Tensor | None) -> None:
        for watch in self._watches:
            watch(site.name, x.detach(), out.detach(), ids)


def key(site: str) -> str:
    """The name under which a `ModuleDict`, which allows no dots, holds the codebook of a site."""
    return site.replace(".", "/")
