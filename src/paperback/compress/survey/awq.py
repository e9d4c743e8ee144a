"""AWQ: before rounding, the channels that carry large inputs are scaled up in the weight and down in the
input.

For a pair of a norm (or layer) and the layers that take in its output, with x̄ the mean |x| of each channel
and w̄ the mean over rows of |w| / max of its group,

    s = x̄^a / w̄^(1 - a),   s / sqrt(max s min s),   a in {0, 1/20, ..., 19/20}

and the a is taken with which the smallest module that holds those layers gives most nearly what it gave, its
weights being Q(W diag(s)) diag(s)⁻¹. The scale is folded into the norm. Afterwards each group's range is
clipped where that brings the layer's output nearer. Nothing is trained.

Source: Lin et al. (2024), AWQ, MLSys, equations 4 and 5; the clip search is that of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.compress.data import run
from paperback.compress.interface import Job, Streamed
from paperback.compress.statistics import LayerStatistics
from paperback.compress.storage import PackedLinear
from paperback.compress.survey.rtn import UniformQuantizer
from paperback.compress.survey.smoothing import Pair, fold, small_batch, smoothing_pairs
from paperback.errors import DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, set_weight_matrix, weight_matrix
from paperback.numerics.quantized import Grid, Layout, QuantizedTensor, Scheme, uniform_grid

CLIPS = tuple(1 - 0.05 * i for i in range(11))  # 1.0 to 0.5


@dataclass
class _Call:
    """One call of a module in the original model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass
class _Search:
    """What the search of one compression holds: the pairs, and the calls of the block at hand."""

    pairs: dict[str, list[Pair]]  # by parent
    calls: dict[str, list[_Call]] = field(default_factory=dict)


class AWQ(UniformQuantizer, Streamed):
    """Rounds weights after scaling up the channels that matter for the activations; any network.

    Args:
        bits: of a weight, 2 to 8.
        group: neighbouring inputs of a row that share a grid; None for the whole row.
        symmetric: a grid about zero without a zero point.
        steps: exponents a that are tried.
        clip: whether ranges are clipped after the scaling.
        search_batches: calibration batches on which exponents are compared; their inputs are held for one
            block at a time.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: not used.

    Raises:
        DataError: if a setting is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    statistics = frozenset({"abs_max", "gram"})

    def __init__(
        self,
        bits: int = 4,
        group: int | None = 32,
        *,
        symmetric: bool = False,
        steps: int = 20,
        clip: bool = True,
        search_batches: int = 4,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(bits, group, symmetric=symmetric, targets=targets, ignore=ignore, seed=seed)
        if steps < 1 or search_batches < 1:
            raise DataError(f"steps is {steps}, search_batches {search_batches}; both must be at least 1.")
        self.steps, self.clip, self.search_batches = steps, clip, search_batches

    def _compress(self, job: Job) -> None:
        assert job.data is not None
        batch = small_batch(next(job.data.batches("train")))
        pairs = smoothing_pairs(job.model, lambda: run(job.model, batch), job.layers)
        by_parent: dict[str, list[Pair]] = {}
        for pair in pairs:
            by_parent.setdefault(pair.parent, []).append(pair)
        self._search = _Search(by_parent)
        job.extras["scales"] = {}
        if not pairs:
            job.note("No norm feeds these layers alone, so nothing was scaled.")
        with ExitStack() as stack:
            for name in by_parent:
                module = job.model.get_submodule(name)
                handle = module.register_forward_hook(self._catch(name), with_kwargs=True)
                stack.callback(handle.remove)
            super()._compress(job)
        del self._search

    def _catch(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls = self._search.calls.setdefault(name, [])
            if name in self._search.pairs and len(calls) < self.search_batches:
                calls.append(_Call(args, kwargs, _first(output)))

        return hook

    def visit_block(self, name: str, block: nn.Module, stats: Mapping[str, LayerStatistics]) -> None:
        """Find and fold the scales of a block's pairs."""
        prefix = f"{name}." if name else ""
        for parent in [p for p in self._search.pairs if p.startswith(prefix)]:
            for pair in self._search.pairs.pop(parent):
                known = [stats[layer] for layer in pair.layers if layer in stats]
                if not known:
                    continue
                scale = self._best_scale(pair, known[0].abs_mean.float())
                self.job.extras["scales"][pair.source] = scale
                fold(self.job.model, pair, scale)
            self._search.calls.pop(parent, None)

    def _best_scale(self, pair: Pair, activation: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
        """The scale of the exponent whose rounded layers change their parent's output least."""
        model = self.job.model
        layers = [model.get_submodule(name) for name in pair.layers]
        original = [weight_matrix(layer).clone() for layer in layers]
        importance = _importance(torch.cat(original).float(), self.group)
        best, least = torch.ones_like(activation), float("inf")
        for step in range(self.steps):
            exponent = step / self.steps
            scale = activation.clamp(min=1e-4) ** exponent / importance.clamp(min=1e-4) ** (1 - exponent)
            scale = scale / (scale.max() * scale.min()).sqrt()
            for layer, weight in zip(layers, original, strict=True):
                set_weight_matrix(layer, self._rounded(weight.float() * scale) / scale)
            error = self._output_error(model.get_submodule(pair.parent), self._search.calls[pair.parent])
            if error < least:
                best, least = scale, error
        for layer, weight in zip(layers, original, strict=True):
            set_weight_matrix(layer, weight)
        return best

    def _rounded(self, weight: Tensor) -> Tensor:
        layout = Layout(tuple(weight.shape), self.per, self.group)
        groups = layout.split(weight)
        return layout.merge(uniform_grid(groups, self.bits, self.scheme).round(groups))

    @staticmethod
    @torch.no_grad()
    def _output_error(module: nn.Module, calls: Sequence[_Call]) -> float:
        errors = [
            (_first(module.forward(*call.args, **call.kwargs)) - call.output).float().square().mean()
            for call in calls
        ]
        return float(torch.stack(errors).mean())

    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> nn.Module:
        """The packed layer, its ranges clipped."""
        if not self.clip:
            return PackedLinear.from_dense(layer, self.bits, self.group, self.scheme)
        quantized = round_clipped(weight_matrix(layer), stats.gram, self.bits, self.group, self.scheme)
        return PackedLinear.from_quantized(layer, quantized)


def round_clipped(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    bits: int,
    group: int | None,
    scheme: Scheme = "affine",
) -> QuantizedTensor:
    """Round a weight with the range of each group clipped so that the group's part of the output changes
    least.

    Args:
        weight: the dense weight.
        gram: X Xᵀ of its inputs.
        bits: 2 to 8.
        group: inputs that share a grid; None for whole rows.
        scheme: of the grids.

    Returns:
        The rounded weight.
    """
    layout = Layout(tuple(weight.shape), "channel" if group is None else "group", group)
    out, columns, width = *weight.shape, layout.width
    missing = -columns % width
    padded = nn.functional.pad(gram.float(), (0, missing, 0, missing))  # a padded weight has no input
    places = torch.arange(columns + missing, device=gram.device).view(-1, width)
    grams = padded[places[:, :, None], places[:, None, :]]  # (groups of a row, width, width)
    groups = layout.split(weight.float())
    least: Tensor | None = None
    for clip in CLIPS:
        grid = uniform_grid(groups, bits, scheme, clip=clip, scale_dtype=torch.float16)
        change = (grid.round(groups) - groups).view(out, -1, width)
        error = torch.einsum("ogi,gij,ogj->og", change, grams, change).reshape(-1)
        if least is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, grid.scale, best.scale)  # type: ignore[arg-type]
        zero = None if grid.zero is None else torch.where(better, grid.zero, best.zero)  # type: ignore[arg-type]
        best = Grid(bits, scheme, scale, zero)
    return QuantizedTensor(layout.merge(best.encode(groups)), best, layout, weight.dtype)


def _importance(weight: Float[Tensor, "out in"], group: int | None) -> Float[Tensor, " in"]:
    """Mean over rows of |w| / max|w| of its group."""
    layout = Layout(tuple(weight.shape), "channel" if group is None else "group", group)
    groups = layout.split(weight.abs())
    return layout.merge(groups / groups.amax(1, keepdim=True).clamp(min=1e-8)).mean(0)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
