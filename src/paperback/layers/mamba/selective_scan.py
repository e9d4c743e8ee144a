"""The selective scan of Mamba (S6), fast on a CPU and lean in memory.

h_t = exp(Δ_t A) ⊙ h_{t-1} + (Δ_t u_t) ⊗ B_t and y_t = h_t C_t + D ⊙ u_t, for D channels of N states each. The
"chunk" back end never holds all states: it keeps one state per chunk, and the backward pass computes the
states of a chunk again from the one before it. Decays and inputs of a chunk fill a block that fits the
cache, with the channels side by side in memory, so that only the recurrence goes position by position.

Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), section 3.3
(recomputation) and algorithm 2. As in the authors' code, A is discretised exactly and B by Euler's rule.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from paperback.errors import DataError, MissingExtraError, NotSupportedError
from paperback.layers.scan import associative_recurrence, scan_, scan_back_, sequential_recurrence

Backend = Literal["auto", "chunk", "sequential", "associative", "mamba_ssm", "compile"]

BLOCK = 2**18  # elements of (rows, chunk, N, channels) worked on at once: three such blocks stay in the cache


def selective_scan(
    u: Float[Tensor, "batch length channels"],
    dt: Float[Tensor, "batch length channels"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch length state"] | Float[Tensor, "channels state"],
    C: Float[Tensor, "batch length state"] | Float[Tensor, "channels state"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch length channels"] | None = None,
    h0: Float[Tensor, "batch channels state"] | None = None,
    reset: Bool[Tensor, "batch length"] | None = None,
    mask: Bool[Tensor, "batch length"] | None = None,
    backend: Backend = "auto",
    chunk: int = 32,
    return_last: bool = False,
) -> Any:
    """Scan a batch of sequences; float32 inside, or float64 where u is, also under autocast.

    Args:
        u: input.
        dt: step sizes Δ >= 0 (after the softplus).
        A: decay rates, none positive.
        B: input directions, one per position; ``(channels, state)`` where they do not depend on the input.
        C: output directions, likewise.
        D: skip connection; none if not given.
        z: gate; the output is multiplied by SiLU(z).
        h0: state before the first position; zero if not given.
        reset: True where a document starts; nothing before it reaches it.
        mask: True at real positions; the others leave the state untouched.
        backend: "chunk" is this module's scan with recomputation; "sequential" the definition and
            "associative" a tree, both recorded by autograd; "compile" the tree compiled by torch.compile (a
            C++ compiler is needed on a CPU); "mamba_ssm" the CUDA kernel of that package; "auto" is
            "mamba_ssm" where it can be used, otherwise "chunk".
        chunk: positions per chunk of "chunk".
        return_last: also return the state after the last position.

    Returns:
        y ``(batch, length, channels)`` in the dtype of u; with ``return_last=True`` also h
        ``(batch, channels, state)``.

    Raises:
        DataError: if a shape does not fit, A is positive somewhere, or the back end is unknown.
        MissingExtraError: for "mamba_ssm" where its kernel is not installed.
        NotSupportedError: for "mamba_ssm" on the CPU, or with h0 or reset.
    """
    if not torch.compiler.is_compiling() and bool((A > 0).any()):
        raise DataError("A is positive somewhere; a decay rate must be negative, for example -exp(A_log).")
    y, h = scan(u, dt, A, B, C, D, z, h0, reset, mask, backend, chunk, return_last)
    return (y, h) if return_last else y


def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
    chunk: int = 32,
    return_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` for an A that is negative by construction."""
    _check(u, dt, A, B, C, h0, reset, mask, backend, chunk)
    wide = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        x, dt, A, B, C = (t.to(wide) for t in (u, dt, A, B, C))
        h0 = None if h0 is None else h0.to(wide)
        if mask is not None:
            dt = dt * mask[..., None]
        run = _choose(backend, u, h0, reset, return_last)
        y, h = run(x, dt, A, B, C, h0, reset, chunk)
        if D is not None:
            y = y + D.to(wide) * x
        if z is not None:
            y = y * F.silu(z.to(wide))
        return y.to(u.dtype), h


# -- the chunked scan ----------------------------------------------------------------------------------------


def _chunked(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    y, h, _ = chunked_scan(u, dt, A, B, C, h0, reset, chunk)
    return y, h


# An operator of torch instead of an autograd.Function: torch.export and torch.compile keep it as one node,
# for any length, and do not unroll its loop.
@torch.library.custom_op("paperback::selective_scan", mutates_args=())
def chunked_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan, without skip connection and gate; all of one dtype.

    Returns:
        y, the last state ``(batch, channels, state)``, and the state before each chunk
        ``(>= chunks, batch, state, channels)`` for the backward pass.
    """
    u, dt = u.contiguous(), dt.contiguous()
    batch, length, channels = u.shape
    decay_rates, B, C = A.mT.contiguous(), _channels_last(B), _channels_last(C)
    states = A.shape[1]
    y = torch.empty_like(u)
    entering = u.new_zeros(_room(length, chunk), batch, states, channels)
    last = u.new_empty(batch, states, channels)
    h = u.new_zeros(batch, states, channels) if h0 is None else h0.mT
    for rows, columns, buffers in _blocks(u, states, chunk, buffers=2):
        state = h[rows, :, columns]
        for index, span in enumerate(_chunks(length, chunk)):
            step = dt[rows, span, columns]
            a, states_ = (_view(buffer, step, states) for buffer in buffers)
            before = entering[index, rows, :, columns].copy_(
                state
            )  # state lies in a buffer about to be filled
            _decays(step, decay_rates[:, columns], reset, rows, span, out=a)
            torch.mul((step * u[rows, span, columns])[:, :, None], _at(B, rows, span, columns), out=states_)
            scan_(a.transpose(0, 1), states_.transpose(0, 1), before)
            y[rows, span, columns] = _over_states(states_, _at(C, rows, span, columns))
            state = states_[:, -1]
        last[rows, :, columns] = state
    return y, last.mT.contiguous(), entering


@torch.library.custom_op("paperback::selective_scan_backward", mutates_args=())
def chunked_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reset: Tensor | None,
    entering: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, Δ, A, B, C and h0, chunk by chunk from the last.

    With g_t the gradient of h_t (the adjoint of the recurrence), the gradients are
    ∂(Δu)_t = g_t B_t, ∂B_t = g_tᵀ (Δu)_t, ∂C_t = h_tᵀ ∂y_t, and ∂(ΔA)_t = g_t ⊙ h_{t-1} ⊙ exp(Δ_t A).
    """
    u, dt, grad_y = u.contiguous(), dt.contiguous(), grad_y.contiguous()
    length, states = u.shape[1], A.shape[1]
    decay_rates, B, C = A.mT.contiguous(), _channels_last(B), _channels_last(C)
    grad_u, grad_dt = torch.empty_like(u), torch.empty_like(dt)
    grad_B, grad_C, grad_A = torch.zeros_like(B), torch.zeros_like(C), torch.zeros_like(decay_rates)
    grad_h = grad_last.mT.contiguous()
    for rows, columns, buffers in _blocks(u, states, chunk, buffers=3):
        carried = grad_h[rows, :, columns]
        rates = decay_rates[:, columns]
        for index, span in reversed(list(enumerate(_chunks(length, chunk)))):
            step = dt[rows, span, columns]
            a, h, g = (_view(buffer, step, states) for buffer in buffers)
            B_here, C_here = _at(B, rows, span, columns), _at(C, rows, span, columns)
            gy, x = grad_y[rows, span, columns], step * u[rows, span, columns]
            before = entering[index, rows, :, columns]
            _decays(step, rates, reset, rows, span, out=a)
            torch.mul(x[:, :, None], B_here, out=h)
            scan_(a.transpose(0, 1), h.transpose(0, 1), before)
            torch.mul(gy[:, :, None], C_here, out=g)
            carried = scan_back_(a.transpose(0, 1), g.transpose(0, 1), carried)

            _add_over_channels(_at(grad_C, rows, span, columns), h, gy)
            _add_over_channels(_at(grad_B, rows, span, columns), g, x)
            grad_x = _over_states(g, B_here)
            grad_exponent = g.mul_(a)  # ∂(ΔA), in place from here on
            grad_exponent[:, 1:].mul_(h[:, :-1])
            grad_exponent[:, 0].mul_(before)
            grad_A[:, columns] += torch.mul(grad_exponent, step[:, :, None], out=a).sum((0, 1))
            through_decay = torch.mul(grad_exponent, rates, out=a).sum(2)
            grad_dt[rows, span, columns] = through_decay.addcmul_(grad_x, u[rows, span, columns])
            grad_u[rows, span, columns] = grad_x.mul_(step)
        grad_h[rows, :, columns] = carried
    grad_B, grad_C = (g.mT if g.ndim == 2 else g[..., 0] for g in (grad_B, grad_C))
    outputs = (grad_u, grad_dt, grad_A.mT, grad_B, grad_C, grad_h.mT)
    return tuple(t.contiguous() for t in outputs)  # type: ignore[return-value]


def _blocks(u: Tensor, states: int, chunk: int, buffers: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows and channels to be scanned together, with memory for their decays and states of one chunk."""
    batch, length, channels = u.shape
    chunk = min(chunk, length)
    width = min(channels, max(64, BLOCK // (chunk * states)))
    height = min(batch, max(1, BLOCK // (chunk * states * width)))
    memory = u.new_empty(buffers, height * chunk * states * width)
    for top in range(0, batch, height):
        for left in range(0, channels, width):
            yield slice(top, top + height), slice(left, left + width), memory


def _room(length: int, chunk: int) -> int:
    """At least the number of chunks; never 1, a size that torch.export would take to be fixed."""
    return length // chunk + 2


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _view(buffer: Tensor, step: Tensor, states: int) -> Tensor:
    """The beginning of a buffer as (rows, positions, states, channels)."""
    rows, positions, channels = step.shape
    shape = (rows, positions, states, channels)
    return buffer[: math.prod(shape)].view(shape)


def _channels_last(x: Tensor) -> Tensor:
    """B or C so that it broadcasts against (batch, length, state, channels)."""
    return x[..., None] if x.ndim == 3 else x.mT.contiguous()


def _at(x: Tensor, rows: slice, span: slice, columns: slice) -> Tensor:
    """The part of B, C or their gradients that belongs to a chunk of a block."""
    return x[rows, span] if x.ndim == 4 else x[:, columns]


def _decays(step: Tensor, rates: Tensor, reset: Tensor | None, rows: slice, span: slice, out: Tensor) -> None:
    """exp(Δ A), zero where a document starts."""
    torch.mul(step[:, :, None], rates, out=out)
    out.exp_()
    if reset is not None:
        out.masked_fill_(reset[rows, span, None, None], 0.0)


def _over_states(h: Tensor, weights: Tensor) -> Tensor:
    """Σ_n h_n w_n for each channel: (rows, positions, channels)."""
    if weights.ndim == 2:
        return (h * weights).sum(2)
    rows, positions, states, channels = h.shape
    product = weights.reshape(-1, 1, states) @ h.view(-1, states, channels)
    return product.view(rows, positions, channels)


def _add_over_channels(total: Tensor, h: Tensor, x: Tensor) -> None:
    """Add to a gradient of B or C what h (rows, positions, states, channels) and x give it."""
    if total.ndim == 2:
        total += (h * x[:, :, None]).sum((0, 1))
        return
    rows, positions, states, channels = h.shape
    product = h.view(-1, states, channels) @ x.reshape(-1, channels, 1)
    total += product.view(rows, positions, states, 1)


@chunked_scan.register_fake
def _(u, dt, A, B, C, h0, reset, chunk):  # type: ignore[no-untyped-def]
    batch, length, channels = u.shape
    states = A.shape[1]
    last = u.new_empty(batch, channels, states)
    return u.new_empty(u.shape), last, u.new_empty(_room(length, chunk), batch, states, channels)


@chunked_scan_backward.register_fake
def _(grad_y, grad_last, u, dt, A, B, C, reset, entering, chunk):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (u, dt, A, B, C, grad_last))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, dt, A, B, C, h0, reset, chunk = inputs
    ctx.save_for_backward(u, dt, A, B, C, reset, output[2])
    ctx.chunk = chunk
    ctx.from_state = h0 is not None


def _backward(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    u, dt, A, B, C, reset, entering = ctx.saved_tensors
    *grads, grad_h0 = chunked_scan_backward(grad_y, grad_last, u, dt, A, B, C, reset, entering, ctx.chunk)
    return *grads, grad_h0 if ctx.from_state else None, None, None


chunked_scan.register_autograd(_backward, setup_context=_remember)


# -- the other back ends -------------------------------------------------------------------------------------


def _recorded(recurrence: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A scan that holds all states and leaves the gradient to autograd."""

    def run(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        h0: Tensor | None,
        reset: Tensor | None,
        _: int,
    ) -> tuple[Tensor, Tensor]:
        a = (dt[..., None] * A).exp()
        if reset is not None:
            a = a.masked_fill(reset[..., None, None], 0.0)
        b = (dt * u)[..., None] * (B[:, :, None] if B.ndim == 3 else B)
        h = recurrence(a, b, h0)
        return (h * (C[:, :, None] if C.ndim == 3 else C)).sum(-1), h[:, -1]

    return run


_sequential = _recorded(sequential_recurrence)
_associative = _recorded(associative_recurrence)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_associative)


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., Any] | None:
    """mamba_ssm's CUDA scan, if that is installed with its kernel."""
    try:
        importlib.import_module("selective_scan_cuda")
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError:
        return None


def _mamba_ssm(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None, reset: Tensor | None, _: int
) -> tuple[Tensor, Tensor]:
    kernel = _kernel()
    assert kernel is not None
    B, C = (t.mT if t.ndim == 3 else t for t in (B, C))
    y, h = kernel(u.mT, dt.mT, A, B, C, return_last_state=True)
    return y.mT, h


def _choose(
    backend: Backend, u: Tensor, h0: Tensor | None, reset: Tensor | None, return_last: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan behind a name."""
    if backend in ("auto", "mamba_ssm"):
        # The kernel starts from zero, knows no documents, and has no gradient of the last state.
        carries = h0 is not None or reset is not None or (return_last and torch.is_grad_enabled())
        if backend == "auto":
            return _mamba_ssm if u.is_cuda and not carries and _kernel() is not None else _chunked
        if not u.is_cuda:
            raise NotSupportedError(
                f'backend="mamba_ssm" needs tensors on a GPU, u is on {u.device}; use backend="chunk" there.'
            )
        if _kernel() is None:
            raise MissingExtraError(
                'backend="mamba_ssm" needs the package mamba-ssm built with its CUDA kernel '
                "(MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation)."
            )
        if carries:
            raise NotSupportedError(
                'backend="mamba_ssm" takes no h0 and no reset, and has no gradient of the last state; '
                'use backend="auto" or "chunk".'
            )
        return _mamba_ssm
    if backend == "compile":
        return _compiled()
    return {"chunk": _chunked, "sequential": _sequential, "associative": _associative}[backend]


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
    backend: str,
    chunk: int,
) -> None:
    if backend not in get_args(Backend):
        raise DataError(f"backend is {backend!r}; it must be one of {', '.join(get_args(Backend))}.")
    if chunk < 1:
        raise DataError(f"chunk is {chunk}; a chunk has at least one position.")
    if u.ndim != 3 or u.shape[1] == 0 or not u.is_floating_point():
        raise DataError(
            f"u has shape {tuple(u.shape)} and dtype {u.dtype}; expected floats (batch, length, channels)."
        )
    batch, length, channels = u.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise DataError(
            f"A has shape {tuple(A.shape)}; u has {channels} channels, so it must be ({channels}, N)."
        )
    states = A.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[tuple[int, ...], ...]]] = {
        "dt": (dt, ((batch, length, channels),)),
        "B": (B, ((batch, length, states), (channels, states))),
        "C": (C, ((batch, length, states), (channels, states))),
        "h0": (h0, ((batch, channels, states),)),
        "reset": (reset, ((batch, length),)),
        "mask": (mask, ((batch, length),)),
    }
    for name, (tensor, shapes) in expected.items():
        if tensor is not None and not any(_has_shape(tensor, shape) for shape in shapes):
            allowed = " or ".join(map(str, shapes))
            raise DataError(f"{name} has shape {tuple(tensor.shape)}; u and A need {allowed}.")
    for name, flags in {"reset": reset, "mask": mask}.items():
        if flags is not None and flags.dtype != torch.bool:
            raise DataError(f"{name} has dtype {flags.dtype}; it must be boolean, for example {name} > 0.")


def _has_shape(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    # The number of axes first: comparing sizes of other axes would make torch.export believe they must
    # differ.
    return tensor.ndim == len(shape) and all(
        own == given for own, given in zip(tensor.shape, shape, strict=True)
    )
