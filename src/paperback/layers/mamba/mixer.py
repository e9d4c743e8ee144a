"""The Mamba mixer: a layer ``(batch, length, d_model) -> (batch, length, d_model)`` of linear cost.

Two projections around a core (see `core`): x, z = W_in u, y = core(x), out = W_out(y ⊙ SiLU(z)). With kind
"ssd" the gate is followed by an RMS norm. In any order but "forward" the core is run once per order, see
`directions`.

Sources: Gu and Dao (2023) for "s6", Dao and Gu (2024) for "ssd", Mamba-3 (2025) for "mamba3"; the survey of
Qu et al. (arXiv:2408.01129) for the scan orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperback.errors import DataError, NotSupportedError
from paperback.layers.interface import Cost, SequenceLayer, check_mask, check_sequence
from paperback.layers.mamba import weights
from paperback.layers.mamba.core import Core, S6Core, SSDCore, TrapezoidCore
from paperback.layers.mamba.core_parts import NORM_EPS
from paperback.layers.mamba.selective_scan import Backend
from paperback.saving import Saved

Kind = Literal["s6", "ssd", "mamba3"]


class Mamba(Saved, SequenceLayer):
    """A selective state-space layer.

    Args:
        d_model: width of input and output.
        d_state: states per channel N; the papers have 16 for "s6", 64 to 128 for the others.
        d_conv: taps of the causal convolution.
        expand: inner width per d_model.
        dt_rank: rank of the projection to the step sizes of "s6"; "auto" is ⌈d_model / 16⌉.
        kind: "s6" (Mamba-1), "ssd" (Mamba-2) or "mamba3".
        headdim: channels per head, for "ssd" and "mamba3"; it divides expand * d_model.
        ngroups: groups of heads that share B and C, for "ssd" and "mamba3".
        scan: order of the scan; "forward" is causal and recurrent. For the others see `ScanOrder`.
        merge: "sum" or "mean" of the outputs of several orders.
        selective: False makes Δ, B and C parameters: the time-invariant control, of the same size ("s6").
        backend: how the scan of "s6" is computed, see `selective_scan`.
        chunk: positions per chunk of the scan. torch.export takes "s6" at any length, the others at a fixed
            one or at multiples of the chunk, three at least (``chunk * Dim(..., min=3)``).
        bias: whether the two projections have biases.
        conv_bias: whether the convolution has one.
        grid: height and width of the image whose pixels the sequence is, for orders over images.
        share: "none", or "all_but_A" where the orders share all parameters but A.

    Raises:
        DataError: if a size or a name does not fit.
        NotSupportedError: for ``selective=False`` of another kind than "s6".
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        kind: Kind = "s6",
        headdim: int = 64,
        ngroups: int = 1,
        scan: Any = "forward",
        merge: Literal["sum", "mean"] = "sum",
        selective: bool = True,
        backend: Backend = "auto",
        chunk: int = 32,
        bias: bool = False,
        conv_bias: bool = True,
        grid: tuple[int, int] | None = None,
        share: Literal["none", "all_but_A"] = "none",
    ) -> None:
        super().__init__(d_model)
        for name, value in {"d_state": d_state, "d_conv": d_conv, "expand": expand, "chunk": chunk}.items():
            if value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1.")
        if not selective and kind != "s6":
            raise NotSupportedError(f'selective=False is a control for kind "s6"; kind is {kind!r}.')
        self.kind = kind
        d_inner = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank

        def make_core(conv: bool = True) -> Core:
            taps = d_conv if conv else None
            if kind == "s6":
                return S6Core(
                    d_inner,
                    d_state,
                    taps,
                    rank,
                    selective=selective,
                    conv_bias=conv_bias,
                    backend=backend,
                    chunk=chunk,
                )
            if kind == "ssd":
                return SSDCore(d_inner, d_state, taps, headdim, ngroups, conv_bias=conv_bias, chunk=chunk)
            if kind == "mamba3":
                return TrapezoidCore(d_inner, d_state, headdim, ngroups, chunk=chunk)
            raise DataError(f'kind is {kind!r}; it must be "s6", "ssd" or "mamba3".')

        self.core: Core | Directions
        self.causal = self.recurrent = isinstance(scan, str) and scan == "forward"
        if self.causal:
            self.core = make_core()
        else:
            from paperback.layers.mamba.directions import Directions

            self.core = Directions(make_core, scan=scan, merge=merge, grid=grid, share=share)
        self.d_inner = d_inner
        self.in_proj = nn.Linear(d_model, d_inner + self.core.in_width, bias=bias)
        self.norm = GatedNorm(d_inner, ngroups) if kind == "ssd" else None
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(
        self,
        u: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: Any = None,
        return_state: bool = False,
        order: Any = None,
    ) -> Any:
        """Map whole sequences; see `SequenceLayer.forward`.

        Args:
            u: input, ``(batch, length, d_model)``.
            mask: True at real positions. The others leave the state untouched; the convolution and the
                trapezoid see zeros there, as before the start of a sequence.
            reset: True where a document starts inside a row; nothing before it reaches it.
            state: where the sequences go on from.
            return_state: also return the state after the last real position.
            order: the order of this batch where the layer scans in given orders, see `Directions`.

        Returns:
            The output ``(batch, length, d_model)``, or the pair (output, state).

        Raises:
            DataError: if an argument does not fit.
            NotSupportedError: if a layer without a state is asked for one.
        """
        check_sequence(u, self.d_model, mask)
        if reset is not None:
            check_mask(reset, u, "reset")
        x, z = self._project(u)
        if isinstance(self.core, Core):
            if order is not None:
                raise DataError(
                    'order is for layers with several paths, made with scan="bidirectional" or a ScanOrder; '
                    'this one has scan="forward".'
                )
            y, state = self.core(x, mask, reset, state, return_state)
        else:
            if state is not None or return_state:
                raise self._stateless("state")
            y, state = self.core(x, mask, reset, order=order)
        out = self.out_proj(self._gate(y, z))
        return (out, state) if return_state else out

    def init_state(self, batch: int) -> Any:
        """The state before the first position, on the device of the layer."""
        if not isinstance(self.core, Core):
            raise self._stateless("init_state")
        return self.core.init_state(batch)

    def step(self, u_t: Float[Tensor, "batch dim"], state: Any) -> tuple[Tensor, Any]:
        """Feed one position; see `SequenceLayer.step`."""
        if not isinstance(self.core, Core):
            raise self._stateless("step")
        if u_t.ndim != 2:
            raise DataError(f"u_t has shape {tuple(u_t.shape)}; a step takes (batch, {self.d_model}).")
        check_sequence(u_t[:, None], self.d_model)
        x, z = self._project(u_t)
        y, state = self.core.step(x, state)
        return self.out_proj(self._gate(y, z)), state

    def cost(self, length: int) -> Cost:
        """Operations and bytes of one sequence of this length, linear in the length."""
        weights_of_projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        projected = self.in_proj.weight.shape[0]
        gate = (5 if self.norm is not None else 3) * self.d_inner
        saved = length * (self.d_model + projected + gate) * self.in_proj.weight.element_size()
        return Cost(2 * length * weights_of_projections, saved) + self.core.cost(length)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **arguments: Any) -> Self:
        """Make a mixer of given weights.

        Args:
            pretrained_model_name_or_path: a mixer of transformers or mamba_ssm (``MambaMixer``,
                ``Mamba2Mixer``, ``Mamba``, ``Mamba2``), a module or a state dict that holds one such mixer,
                or a folder that `save_pretrained` wrote.
            **arguments: arguments of the constructor in place of those read off the weights, such as
                ``backend``; "ngroups" has to be given with a bare state dict of kind "ssd" if it is not 1.

        Returns:
            The mixer, in evaluation mode, in the precision of the weights.

        Raises:
            ArtefactError: if the weights are no mixer's.
            DataError: if there is not exactly one mixer.
            NotSupportedError: if the mixer does what this one does not.
        """
        source = pretrained_model_name_or_path
        if not isinstance(source, nn.Module | Mapping):
            return super().from_pretrained(source, **arguments)
        tensors = weights.mixer_tensors(source)
        settings = weights.settings_of(tensors, source, arguments.get("ngroups"))
        mixer = cls(**settings | arguments)
        weights.import_mixer(mixer, tensors)
        if mixer.norm is not None and isinstance(source, nn.Module):
            mixer.norm.eps = weights.norm_eps(source)
        return mixer.to(tensors["in_proj.weight"]).eval()

    def reset_parameters(self, n_residuals: int = 1) -> None:
        """Draw fresh parameters.

        Args:
            n_residuals: how many residual blocks the network has; the output projection is drawn smaller by
                its square root, so that the sum over the blocks keeps its size.
        """
        self.core.reset_parameters()
        self.in_proj.reset_parameters()
        if self.norm is not None:
            nn.init.ones_(self.norm.weight)
        self.out_proj.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(n_residuals)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the core, and the gate z; in the papers' order of columns."""
        projected = self.in_proj(u)
        if self.kind == "s6":
            x, z = projected.split([self.core.in_width, self.d_inner], dim=-1)
        else:
            z, x = projected.split([self.d_inner, self.core.in_width], dim=-1)
        return x, z

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        return y * F.silu(z) if self.norm is None else self.norm(y, z)


class GatedNorm(nn.Module):
    """RMS norm of y ⊙ SiLU(z), group by group, in float32.

    Args:
        width: number of features.
        groups: the mean square is taken over each of so many groups of features.
    """

    def __init__(self, width: int, groups: int = 1, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate, then normalise."""
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return normed.to(y.dtype) * self.weight


def no_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: A, D, the step bias, all biases and norms go without weight decay.

    Args:
        model: any module, with Mamba layers in it or without.
        weight_decay: decay of the other parameters.

    Returns:
        Two groups, each with "params" and "weight_decay".
    """
    spared: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or name in getattr(module, "no_weight_decay", ()):
                spared.add(id(parameter))
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0},
    ]
