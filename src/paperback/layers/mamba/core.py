"""What stands between the two projections of a Mamba mixer: convolution, parameters of the scan, scan.

A core takes what the input projection gives it and returns the output before the gate. `S6Core` is Mamba-1's,
`SSDCore` Mamba-2's, `TrapezoidCore` Mamba-3's. A mixer with several scan orders has several cores and one
pair of projections.

The step size, its bias, A, D and the state are float32 at least, whatever the dtype of the layer: the decay
exp(Δ A) of a slow channel is so near to one that bfloat16 would round it to one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperback.errors import DataError
from paperback.layers.interface import Cost
from paperback.layers.mamba.core_parts import (
    NORM_EPS,
    attention_cost,
    convolution_cost,
    convolve,
    convolve_step,
    cost_of,
    count_heads,
    make_convolution,
    next_inputs,
    no_inputs,
    reset_children,
    resting_step_,
    step_size,
)
from paperback.layers.mamba.selective_scan import Backend, scan
from paperback.layers.mamba.ssd import ssd_scan
from paperback.layers.mamba.trapezoid import TrapezoidState, trapezoid_scan

A_FLOOR = 1e-4


class ScanState(NamedTuple):
    """Where a sequence stands, for S6 and SSD.

    Attributes:
        h: the recurrent state, ``(batch, d_inner, d_state)``, or ``(batch, heads, headdim, d_state)``.
        inputs: the last d_conv - 1 inputs of the convolution, ``(batch, channels, d_conv - 1)``.
    """

    h: Tensor
    inputs: Tensor


class Core(nn.Module, ABC):
    """A causal scan with its parameters.

    Attributes:
        in_width: features that it takes.
        d_inner: features that it returns.
        conv_width: how many of the features that it takes, the first ones, its convolution acts on.
        no_weight_decay: names of the parameters that weight decay would harm.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    in_width: int
    d_inner: int
    conv_width: int

    @abstractmethod
    def init_state(self, batch: int) -> Any:
        """The state before the first position, for so many sequences."""

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "batch length in_width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: Any = None,
        return_state: bool = False,
    ) -> tuple[Float[Tensor, "batch length inner"], Any]:
        """Scan whole sequences.

        Args:
            x: what the input projection gives.
            mask: True at real positions.
            reset: True where a document starts.
            state: where the sequences go on from; from nothing if not given.
            return_state: whether the state after the last real position is wanted; None comes otherwise.

        Returns:
            The output before the gate, and the state or None.
        """

    @abstractmethod
    def step(self, x_t: Float[Tensor, "batch in_width"], state: Any) -> tuple[Tensor, Any]:
        """Feed one position."""

    @abstractmethod
    def cost(self, length: int) -> Cost:
        """Operations and saved bytes of one sequence, projections and gate not counted."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw fresh parameters."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert as torch does, but keep what must stay float32 in float32."""
        exact = {name: p for name, p in self.named_parameters(recurse=False) if name in self.no_weight_decay}
        before = {name: p.data for name, p in exact.items()}
        super()._apply(fn, recurse)
        for name, values in before.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < 4:
                parameter.data = values.to(parameter.device, torch.float32)
        return self

    def _check_state(self, state: Any, x: Tensor) -> None:
        expected = self.init_state(1)
        if type(state) is not type(expected):
            raise DataError(
                f"state is a {type(state).__name__}; expected the {type(expected).__name__} that init_state, "
                "step or forward(..., return_state=True) of this layer returned."
            )
        for name, given, own in zip(state._fields, state, expected, strict=True):
            if given.shape != (len(x), *own.shape[1:]):
                raise DataError(
                    f"state.{name} has shape {tuple(given.shape)}; this layer and a batch of {len(x)} need "
                    f"{(len(x), *own.shape[1:])} (init_state makes one)."
                )


class S6Core(Core):
    """Mamba-1: D channels of N states each, with Δ, B and C from the input.

    With ``selective=False`` it is the linear time-invariant control: Δ, B and C are parameters, B and C of
    each channel by itself as in S4D. The low-rank projections of the input, which selection would use for Δ,
    mix the channels instead, so the number of parameters is exactly that of the selective one.

    Args:
        d_inner: channels D.
        d_state: states per channel N.
        d_conv: taps of the convolution; None leaves convolution and activation out.
        dt_rank: rank R of the projection to the step sizes.
        selective: whether Δ, B and C depend on the input.
        conv_bias: whether the convolution has a bias.
        backend: how the scan is computed, see `selective_scan`.
        chunk: positions per chunk.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        d_conv: int | None,
        dt_rank: int,
        *,
        selective: bool = True,
        conv_bias: bool = True,
        backend: Backend = "auto",
        chunk: int = 32,
    ) -> None:
        super().__init__()
        self.in_width = self.conv_width = self.d_inner = d_inner
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.selective = selective
        self.backend = backend
        self.chunk = chunk
        self.conv1d = make_convolution(d_inner, d_conv, conv_bias)
        if selective:
            self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
            self.dt_proj = nn.Linear(dt_rank, d_inner, bias=False)
        else:
            self.mix_down = nn.Linear(d_inner, dt_rank, bias=False)
            self.mix_up = nn.Linear(dt_rank, d_inner, bias=False)
            self.B = nn.Parameter(torch.empty(d_inner, d_state))
            self.C = nn.Parameter(torch.empty(d_inner, d_state))
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as in S4D-real, A_dn = -(n + 1); Δ at rest log-uniform in [0.001, 0.1]; D = 1."""
        with torch.no_grad():
            reset_children(self)
            self.A_log.copy_(torch.arange(1.0, self.d_state + 1).log().expand_as(self.A_log))
            self.D.fill_(1.0)
            resting_step_(self.dt_bias)
            if self.selective:
                bound = self.dt_rank**-0.5
                self.dt_proj.weight.uniform_(-bound, bound)
            else:
                self.mix_up.weight.zero_()
                self.B.fill_(1.0)
                self.C.normal_(std=self.d_state**-0.5)

    def init_state(self, batch: int) -> ScanState:
        """Zeros: nothing was before."""
        h = self.A_log.new_zeros(batch, self.d_inner, self.d_state)
        return ScanState(h, no_inputs(self.conv1d, self.A_log, batch))

    def forward(
        self,
        x: Float[Tensor, "batch length in_width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: ScanState | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Tensor, "batch length inner"], ScanState | None]:
        """Convolve, project to Δ, B and C, scan (algorithm 2 of the paper)."""
        if state is not None:
            self._check_state(state, x)
        x, padded = convolve(self.conv1d, x, mask, reset, state)
        x, dt, B, C = self._scan_inputs(x)
        y, h = scan(
            x,
            dt,
            -self.A_log.exp(),
            B,
            C,
            self.D,
            h0=None if state is None else state.h,
            reset=reset,
            mask=mask,
            backend=self.backend,
            chunk=self.chunk,
            return_last=return_state,
        )
        return y, ScanState(h, next_inputs(self.conv1d, padded, mask, reset)) if return_state else None

    def step(
        self, x_t: Float[Tensor, "batch in_width"], state: ScanState
    ) -> tuple[Float[Tensor, "batch inner"], ScanState]:
        """One turn of the recurrence, O(D N)."""
        self._check_state(state, x_t)
        x, inputs = convolve_step(self.conv1d, x_t, state.inputs)
        x, dt, B, C = self._scan_inputs(x)
        with torch.autocast(x.device.type, enabled=False):
            decay = (dt[..., None] * -self.A_log.exp()).exp()
            B, C = (t if t.ndim == self.A_log.ndim and not self.selective else t[:, None] for t in (B, C))
            h = decay * state.h + (dt * x)[..., None] * B
            y = (h * C).sum(-1) + self.D * x
        return y.to(x_t.dtype), ScanState(h, inputs)

    def cost(self, length: int) -> Cost:
        """Seven operations per state and position; states are saved once per chunk."""
        convolution = convolution_cost(self.conv1d, self.d_inner, length)
        low = self.dt_rank + 2 * self.d_state if self.selective else self.dt_rank
        products = self.d_inner * (low + self.dt_rank)
        scan = 7 * self.d_inner * self.d_state
        chunks = -(-length // self.chunk)
        saved = length * (low + 3 * self.d_inner) + chunks * self.d_inner * self.d_state
        return convolution + cost_of(length * (2 * products + scan), saved, self.A_log)

    def _scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the scan takes, for whole sequences or for one position: x, Δ, B, C."""
        if not self.selective:
            x = x + self.mix_up(self.mix_down(x))
            dt = F.softplus(self.dt_bias).expand_as(x)
            return x, dt, self.B, self.C
        low, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return x, step_size(self.dt_proj(low), self.dt_bias), B, C


class SSDCore(Core):
    """Mamba-2: heads of one decay each, with B and C shared by the heads of a group.

    Args:
        d_inner: channels, heads times headdim.
        d_state: states per channel N.
        d_conv: taps of the convolution over x, B and C; None leaves convolution and activation out.
        headdim: channels per head.
        ngroups: groups of heads; each has its own B and C.
        conv_bias: whether the convolution has a bias.
        chunk: positions per chunk.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        d_conv: int | None,
        headdim: int,
        ngroups: int = 1,
        *,
        conv_bias: bool = True,
        chunk: int = 32,
    ) -> None:
        super().__init__()
        self.heads = count_heads(d_inner, headdim, ngroups)
        self.d_inner, self.d_state, self.headdim, self.ngroups = d_inner, d_state, headdim, ngroups
        self.chunk = chunk
        self.conv_width = d_inner + 2 * ngroups * d_state
        self.in_width = self.conv_width + self.heads
        self.conv1d = make_convolution(self.conv_width, d_conv, conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [-16, -1]; Δ at rest log-uniform in [0.001, 0.1]; D = 1."""
        with torch.no_grad():
            reset_children(self)
            self.A_log.uniform_(1.0, 16.0).log_()
            self.D.fill_(1.0)
            resting_step_(self.dt_bias)

    def init_state(self, batch: int) -> ScanState:
        """Zeros: nothing was before."""
        h = self.A_log.new_zeros(batch, self.heads, self.headdim, self.d_state)
        return ScanState(h, no_inputs(self.conv1d, self.A_log, batch, self.conv_width))

    def forward(
        self,
        x: Float[Tensor, "batch length in_width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: ScanState | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Tensor, "batch length inner"], ScanState | None]:
        """Convolve x, B and C together, then scan in the dual form."""
        if state is not None:
            self._check_state(state, x)
        convolved, dt = x.split([self.conv_width, self.heads], dim=-1)
        convolved, padded = convolve(self.conv1d, convolved, mask, reset, state)
        values, B, C = self._split(convolved)
        y, h = ssd_scan(
            values,
            step_size(dt, self.dt_bias),
            -self.A_log.exp(),
            B,
            C,
            self.D,
            h0=None if state is None else state.h,
            reset=reset,
            mask=mask,
            chunk=self.chunk,
        )
        last = ScanState(h, next_inputs(self.conv1d, padded, mask, reset)) if return_state else None
        return y.flatten(2), last

    def step(
        self, x_t: Float[Tensor, "batch in_width"], state: ScanState
    ) -> tuple[Float[Tensor, "batch inner"], ScanState]:
        """One turn of the recurrence, O(D N)."""
        self._check_state(state, x_t)
        convolved, dt = x_t.split([self.conv_width, self.heads], dim=-1)
        convolved, inputs = convolve_step(self.conv1d, convolved, state.inputs)
        values, B, C = self._split(convolved)
        dt = step_size(dt, self.dt_bias)
        with torch.autocast(x_t.device.type, enabled=False):
            B, C = (t.to(dt.dtype).repeat_interleave(self.heads // self.ngroups, dim=1) for t in (B, C))
            decay = (dt * -self.A_log.exp()).exp()
            h = decay[..., None, None] * state.h + (dt[..., None] * values)[..., None] * B[:, :, None]
            y = (h @ C[..., None])[..., 0] + self.D[:, None] * values
        return y.flatten(1).to(x_t.dtype), ScanState(h, inputs)

    def cost(self, length: int) -> Cost:
        """The convolution and the dual form."""
        scan = attention_cost(length, self.chunk, self.ngroups, self.heads, self.headdim, self.d_state)
        steps = Cost(0, 3 * length * self.heads * self.A_log.element_size())
        return convolution_cost(self.conv1d, self.conv_width, length) + scan + steps

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.ngroups * self.d_state
        values, B, C = convolved.split([self.d_inner, shared, shared], dim=-1)
        return (
            values.unflatten(-1, (self.heads, -1)),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
        )


class TrapezoidCore(Core):
    """Mamba-3: trapezoidal steps, rotating states, A from the input, and no convolution.

    B and C pass an RMS norm and get a bias that starts at one; with the trapezoid's left end this does what
    the convolution did. Half of the states rotate in pairs.

    Args:
        d_inner: channels, heads times headdim.
        d_state: states per channel N, >= 4.
        headdim: channels per head.
        ngroups: groups of heads; each has its own B and C.
        chunk: positions per chunk.

    Raises:
        DataError: if a size does not fit.
    """

    no_weight_decay = ("D", "dt_bias", "B_bias", "C_bias")

    def __init__(
        self, d_inner: int, d_state: int, headdim: int, ngroups: int = 1, *, chunk: int = 32
    ) -> None:
        super().__init__()
        self.heads = count_heads(d_inner, headdim, ngroups)
        if d_state < 4:
            raise DataError(f'd_state is {d_state}; kind "mamba3" rotates half of it in pairs and needs 4.')
        self.d_inner, self.d_state, self.headdim, self.ngroups = d_inner, d_state, headdim, ngroups
        self.chunk = chunk
        self.conv_width = 0
        self.angles = d_state // 4
        shared = ngroups * d_state
        self.widths = (d_inner, shared, shared, self.heads, self.heads, self.heads, self.angles)
        self.in_width = sum(self.widths)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.B_bias = nn.Parameter(torch.empty(self.heads, d_state))
        self.C_bias = nn.Parameter(torch.empty(self.heads, d_state))
        self.B_norm = nn.RMSNorm(d_state, eps=NORM_EPS)
        self.C_norm = nn.RMSNorm(d_state, eps=NORM_EPS)
        self.D = nn.Parameter(torch.empty(self.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Δ at rest log-uniform in [0.001, 0.1]; D, norms and biases of B and C at 1."""
        with torch.no_grad():
            reset_children(self)
            for parameter in (self.B_bias, self.C_bias, self.D):
                parameter.fill_(1.0)
            resting_step_(self.dt_bias)

    def init_state(self, batch: int) -> TrapezoidState:
        """Zeros: nothing was before."""
        return TrapezoidState(
            h=self.D.new_zeros(batch, self.heads, self.headdim, self.d_state),
            angle=self.D.new_zeros(batch, self.heads, self.angles),
            key=self.D.new_zeros(batch, self.heads, self.d_state),
            value=self.D.new_zeros(batch, self.heads, self.headdim),
        )

    def forward(
        self,
        x: Float[Tensor, "batch length in_width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: TrapezoidState | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Tensor, "batch length inner"], TrapezoidState | None]:
        """Normalise B and C, then scan by the trapezoidal rule."""
        if state is not None:
            self._check_state(state, x)
        values, B, C, dt, decay, weight, angles = x.split(self.widths, dim=-1)
        # -f(a) with f(a) = 1 + a, or 1 / (1 - a) where a < 0: positive, and linear in the tail.
        wide = decay.to(self.dt_bias.dtype)
        A = -(wide.clamp(min=0) + (1 - wide.clamp(max=0)).reciprocal()).clamp(min=A_FLOOR)
        y, last = trapezoid_scan(
            values.unflatten(-1, (self.heads, -1)),
            step_size(dt, self.dt_bias),
            A,
            weight.to(self.dt_bias.dtype).sigmoid(),
            self._directions(B, self.B_norm, self.B_bias),
            self._directions(C, self.C_norm, self.C_bias),
            angles,
            self.D,
            state=state,
            reset=reset,
            mask=mask,
            chunk=self.chunk,
        )
        return y.flatten(2), last if return_state else None

    def step(
        self, x_t: Float[Tensor, "batch in_width"], state: TrapezoidState
    ) -> tuple[Float[Tensor, "batch inner"], TrapezoidState]:
        """One turn of the recurrence, O(D N): the scan of one position."""
        y, following = self.forward(x_t[:, None], state=state, return_state=True)
        assert following is not None
        return y[:, 0], following

    def cost(self, length: int) -> Cost:
        """The dual form with keys and queries per head, which are normalised and rotated."""
        scan = attention_cost(length, self.chunk, self.heads, self.heads, self.headdim, self.d_state)
        directions = length * self.heads * self.d_state
        saved = 4 * directions + 3 * length * self.d_inner
        return scan + cost_of(12 * directions, saved, self.D)

    def _directions(self, x: Tensor, norm: nn.RMSNorm, bias: Tensor) -> Tensor:
        """(batch, length, groups · state) to normalised vectors of each head, with its bias."""
        grouped = x.to(bias.dtype).unflatten(-1, (self.ngroups, -1))
        grouped = F.rms_norm(grouped, (self.d_state,), norm.weight.to(bias.dtype), norm.eps)
        return grouped.repeat_interleave(self.heads // self.ngroups, dim=2) + bias
