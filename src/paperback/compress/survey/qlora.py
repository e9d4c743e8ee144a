"""QLoRA: the weight is frozen in 4-bit normal floats, and a thin matrix product beside it is trained.

    y = Q x + (α / r) B A x,   A (r, in) drawn, B (out, r) zero at the start

Only A and B have gradients, so that tuning takes a few percent of the memory that tuning the weight takes.
The scales of the 64-value buckets are kept in 16 bits; the second quantization of the paper, which would
save another eighth of a bit a weight, is left out.

Source: Dettmers et al. (2023), QLoRA, NeurIPS, section 3; Hu et al. (2022), LoRA, ICLR.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.interface import Compressor, Family, Job
from paperback.compress.storage import CodebookLinear, StoredLayer, build, spec_of, storage_module
from paperback.compress.survey.fitting import largest_that_fits
from paperback.compress.survey.healing import Healing, heal
from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, Found, find_layers, swap
from paperback.training import seeded

BUCKET = 64  # weights that share a scale


@storage_module
class LoRALinear(StoredLayer):
    """A linear layer with a frozen quantized weight and a trained product of low rank beside it."""

    kind = "lora"
    trainable = True

    def __init__(self, base: CodebookLinear, down: Tensor, up: Tensor, scaling: float) -> None:
        """Only for `from_dense` and `empty`."""
        super().__init__(base.form, None)
        self.base = base
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scaling = scaling

    @classmethod
    def from_dense(cls, layer: nn.Module, rank: int = 8, alpha: float = 16.0, bits: int = 4) -> Self:
        """The layer with its weight in normal floats and a product that is zero.

        Args:
            layer: Linear or transformers' Conv1D.
            rank: r, at least 1.
            alpha: α; the product counts α / r times.
            bits: of the normal floats.
        """
        base = CodebookLinear.from_dense(layer, "normal-float", bits, BUCKET)
        out, inputs = base.form.shape
        dtype = base.dense().dtype
        down = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        return cls(base, down.to(dtype), torch.zeros(out, rank, dtype=dtype), alpha / rank)

    @classmethod
    def empty(cls, spec: dict[str, Any]) -> Self:
        """A module with tensors of the right shapes and any contents."""
        base, rank = build(spec.get("base") or {}), spec.get("rank")
        scaling, dtype = spec.get("scaling"), getattr(torch, str(spec.get("dtype")), None)
        if (
            not isinstance(base, CodebookLinear)
            or not isinstance(rank, int)
            or not 0 < rank <= max(base.form.shape)
            or not isinstance(scaling, float)
            or not isinstance(dtype, torch.dtype)
        ):
            raise ArtefactError("this is not the description of a layer with an adapter.")
        out, inputs = base.form.shape
        return cls(base, torch.empty(rank, inputs, dtype=dtype), torch.empty(out, rank, dtype=dtype), scaling)

    def spec(self) -> dict[str, Any]:
        """The quantized layer, rank and scaling as JSON values."""
        return {
            "base": spec_of(self.base), "rank": len(self.down), "scaling": float(self.scaling),
            "dtype": str(self.down.dtype)[6:],
        }  # fmt: skip

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight with the product added."""
        return self.base.dense() + self.scaling * (self.up @ self.down)

    def forward(self, x: Tensor) -> Tensor:
        """What the quantized layer gives plus the product."""
        return self.base(x) + self.scaling * F.linear(F.linear(x, self.down), self.up)


class QLoRA(Compressor):
    """Puts weights into 4-bit normal floats and trains adapters beside them; linear layers of any network.

    Args:
        rank: of the adapters.
        alpha: the adapters count alpha / rank times.
        bits: of the normal floats, 2 to 8.
        healing: steps, batch size, learning rate; with ``teacher_weight=0`` the adapters learn the job's
            loss, otherwise also the answers of the dense model (or the teacher that is given).
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: of the adapters' start and the order of the rows.

    Raises:
        DataError: if a setting is out of range.
    """

    family: ClassVar[Family] = "quantize"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    tuning_free: ClassVar[bool] = False
    budgets: ClassVar[tuple[str, ...]] = ("bytes", "ratio")

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        bits: int = 4,
        *,
        healing: Healing | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if rank < 1 or not alpha > 0 or type(bits) is not int or not 2 <= bits <= 8:
            raise DataError(
                f"rank is {rank}, alpha {alpha}, bits {bits}; rank is at least 1, alpha positive, "
                "bits 2 to 8."
            )
        self.rank, self.alpha, self.bits = rank, alpha, bits
        self.healing = healing or Healing(teacher_weight=0.0)

    def _find(self, model: nn.Module) -> Found:
        return find_layers(model, self.targets, self.ignore, kinds=(nn.Linear,))

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """The most bits, and with them the highest rank up to this one, that meet the budget."""
        if budget.unit not in self.budgets:
            raise budget.refuse("QLoRA", *self.budgets)
        ranks = sorted({self.rank, *(r for r in (1, 2, 4, 8, 16, 32) if r < self.rank)}, reverse=True)
        pairs = [(bits, rank) for bits in range(self.bits, 1, -1) for rank in ranks]

        def shrink(trial: nn.Module, pair: tuple[int, int]) -> None:
            for name in layers:
                layer = trial.get_submodule(name)
                swap(trial, name, LoRALinear.from_dense(layer, pair[1], self.alpha, pair[0]))

        settled = copy.copy(self)
        with seeded(self.seed, "fitting"):
            settled.bits, settled.rank = largest_that_fits(budget, model, pairs, shrink, "QLoRA")
        return settled

    def _compress(self, job: Job) -> None:
        imitates = self.healing.teacher_weight > 0
        teacher = (job.teacher or copy.deepcopy(job.model)) if imitates else None
        flags = [(p, p.requires_grad) for p in job.model.parameters()]
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with seeded(job.seed, "adapters"):
            for name, layer in job.layers.items():
                swap(job.model, name, LoRALinear.from_dense(layer, self.rank, self.alpha, self.bits))
        job.extras["losses"] = heal(job, self.healing, teacher=teacher, description="tuning adapters")
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
