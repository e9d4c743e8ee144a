"""The compressor: gates beside every frozen layer, trained on the network's own loss.

Step t of T has u = t/T; scale kappa and temperature tau go linearly from their first to their second value.
The loss is the network's, less lambda (1 - u) times the squared norm of all masked weights, which keeps the
surviving weights large and so their gradients alive (equation 9).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.data import Data, run
from paperback.compress.interface import Compressor, Job
from paperback.compress.masked import MaskedWeight, asking, masking, write_masked
from paperback.compress.maskllm.distribution import MaskDistribution, check_patterns, gate_bytes
from paperback.compress.maskllm.masks import MaskNM
from paperback.compress.masks import nm_mask
from paperback.compress.survey.healing import to_batch, training_rows
from paperback.errors import BudgetError, DataError, PaperbackError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, Found, find_layers, weight_matrix
from paperback.training import generator, train
from paperback.training.distillation import distillation_loss

PRIORS = ("sparsegpt", "wanda", "magnitude")
PRIOR_ROWS = 128  # of the training part, that the one-shot methods are calibrated on
BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 1e-5, 0.1, 1.0  # of the paper's AdamW
LAST_RATE = 0.1  # the learning rate ends at this part of its peak
RECORDS = 20  # times that the state of the gates is noted in a training


class MaskLLM(Compressor):
    """Learns an N:M mask of every linear layer and leaves the weights as they are.

    The result is dense with zeros; ``extras["masks"]`` are the masks (`MaskNM` by layer), for `save_masks`
    and, beside the dense model, `apply_masks`; ``extras["history"]`` is the course of the training.

    Args:
        nm: (N, M): of M consecutive inputs N stay.
        prior: mask to start from: "sparsegpt", "wanda" or "magnitude", masks by layer (bool or `MaskNM`, for
            instance of another domain), or None.
        prior_strength: alpha >= 0; the prior counts as so many standard deviations of the gates.
        logit_scale: kappa at the first and the last step, > 0.
        temperature: tau at the first and the last step, > 0.
        reg: lambda >= 0, of the sum of squares of the kept weights at the first step; it falls to 0.
        steps: of AdamW; the paper's 2,000.
        lr: peak learning rate of the gates; it falls with a cosine to a tenth. A few hundred steps need more
            than the paper's 5e-4.
        batch_size: rows of a step.
        hard: pass single patterns forward (straight-through); the paper found soft masks better.
        distill: weight in [0, 1] of T² KL from the teacher, by default the dense network itself.
        distill_temperature: T > 0.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: see `Compressor`.

    Raises:
        DataError: if a setting is out of range.
    """

    family = "prune"
    needs = frozenset({"training", "loss"})
    tuning_free = False
    budgets = ("nm", "density")

    def __init__(
        self,
        nm: tuple[int, int] = (2, 4),
        prior: str | Mapping[str, Tensor | MaskNM] | None = "sparsegpt",
        prior_strength: float = 3.0,
        logit_scale: tuple[float, float] = (1e2, 5e2),
        temperature: tuple[float, float] = (4.0, 0.05),
        reg: float = 1e-5,
        steps: int = 2000,
        lr: float = 5e-4,
        batch_size: int = 8,
        hard: bool = False,
        distill: float = 0.0,
        distill_temperature: float = 1.0,
        *,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        check_patterns(*nm)
        if isinstance(prior, str) and prior not in PRIORS:
            raise DataError(f"prior is {prior!r}; give one of {', '.join(PRIORS)}, masks by layer, or None.")
        if steps < 1 or batch_size < 1:
            raise DataError(f"steps is {steps} and batch_size {batch_size}; both must be at least 1.")
        positive = {"lr": lr, "distill_temperature": distill_temperature}
        positive |= {f"logit_scale[{i}]": value for i, value in enumerate(logit_scale)}
        positive |= {f"temperature[{i}]": value for i, value in enumerate(temperature)}
        for name, value in positive.items():
            if not value > 0:
                raise DataError(f"{name} is {value}; it must be positive.")
        if not reg >= 0 or not prior_strength >= 0 or not 0 <= distill <= 1:
            raise DataError(
                f"reg is {reg}, prior_strength {prior_strength}, distill {distill}; the first two must be at "
                "least 0, the last in [0, 1]."
            )
        self.nm, self.prior, self.prior_strength = (nm[0], nm[1]), prior, prior_strength
        self.logit_scale, self.temperature, self.reg = logit_scale, temperature, reg
        self.steps, self.lr, self.batch_size = steps, lr, batch_size
        self.hard, self.distill, self.distill_temperature = hard, distill, distill_temperature

    def _find(self, model: nn.Module) -> Found:
        """Layers whose inputs M does not divide are left, with the reason."""
        found = find_layers(model, self.targets, self.ignore)
        n, m = self.nm
        odd = {
            name: f"{m} does not divide its {width} inputs, so it cannot be {n}:{m}"
            for name, layer in found.layers.items()
            if (width := weight_matrix(layer).shape[1]) % m
        }
        layers = {name: layer for name, layer in found.layers.items() if name not in odd}
        tied = {name: owner for name, owner in found.tied.items() if owner in layers}
        return Found(layers, found.skipped | odd, tied)

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        n, m = self.nm
        if budget.nm is not None:
            check_patterns(*budget.nm)
            settled = copy.copy(self)
            settled.nm = budget.nm
            width = budget.nm[1]
            odd = [name for name, layer in layers.items() if weight_matrix(layer).shape[1] % width]
            if odd:
                raise BudgetError(f"{width} does not divide the inputs of {odd[0]}; put it into ignore.")
            return settled
        if budget.unit == "density":
            if not math.isclose(budget.density or 0, n / m):
                raise BudgetError(
                    f"{n}:{m} has the density {n / m:g} and no other, {budget.density} was asked for; "
                    "set nm, or give Budget(nm=(n, m))."
                )
            return self
        raise budget.refuse(type(self).__name__, *self.budgets)

    def _compress(self, job: Job) -> None:
        learned: dict[str, MaskDistribution] = {}
        for name, layer in job.layers.items():
            weight = weight_matrix(layer)
            draws = generator(self.seed, "gates", name)
            shape = len(weight), weight.shape[1]
            learned[name] = MaskDistribution(shape, *self.nm, draws).to(weight.device)
        for name, mask in self._prior_masks(job).items():
            learned[name].add_prior(mask.to(learned[name].gates.device), self.prior_strength)
        self._learn(job, learned)
        job.extras["masks"] = {
            name: MaskNM(law.codes().short().cpu(), *self.nm) for name, law in learned.items()
        }
        for name, law in learned.items():
            write_masked(job.layers[name], law.mode())

    # -- the prior -----------------------------------------------------------------------------------------

    def _prior_masks(self, job: Job) -> dict[str, Tensor]:
        n, m = self.nm
        if self.prior is None:
            return {}
        if isinstance(self.prior, Mapping):
            missing = [name for name in job.layers if name not in self.prior]
            if missing:
                raise DataError(f"the prior has no mask for {missing[0]}; give one for each layer.")
            given = {name: self.prior[name] for name in job.layers}
            return {name: mask.dense() if isinstance(mask, MaskNM) else mask for name, mask in given.items()}
        if self.prior == "magnitude":
            return {
                name: nm_mask(weight_matrix(layer).abs().float(), n, m, name=name)
                for name, layer in job.layers.items()
            }
        from paperback.compress.pruning import SparseGPT, Wanda

        assert job.data is not None  # the method needs training data
        one_shot = (SparseGPT if self.prior == "sparsegpt" else Wanda)(
            nm=self.nm, targets=tuple(job.layers), ignore=self.ignore, seed=self.seed
        )
        (rows, *others), keys = training_rows(job.data, PRIOR_ROWS, self.seed)
        batches = [
            to_batch(tuple(part[i : i + self.batch_size] for part in (rows, *others)), keys)
            for i in range(0, len(rows), self.batch_size)
        ]
        pruned = one_shot.compress(job.model, Data(train=batches), latency_runs=0, progress=job.progress)
        return dict(pruned.extras["masks"])

    # -- learning ------------------------------------------------------------------------------------------

    def _learn(self, job: Job, learned: Mapping[str, MaskDistribution]) -> None:
        """Train the gates; the model's own parameters are frozen meanwhile."""
        assert job.data is not None
        rows, keys = training_rows(job.data, self.steps * self.batch_size, self.seed)
        batch_size = min(self.batch_size, len(rows[0]))
        epochs = math.ceil(self.steps * batch_size / len(rows[0]))
        per_epoch = min(math.ceil(self.steps / epochs), len(rows[0]) // batch_size)
        rows = tuple(part[: per_epoch * batch_size] for part in rows)
        tied = find_layers(job.model, self.targets, self.ignore).tied
        layers = job.layers | {n: job.model.get_submodule(n) for n, owner in tied.items() if owner in learned}
        with asking(job.model.parameters(), False), masking(layers) as places:
            objective = _Objective(self, job, learned, places, keys, epochs * per_epoch)
            try:
                train(
                    job.model, objective, rows, epochs=epochs, batch_size=batch_size, lr=self.lr,
                    optimizer=self._optimizer, schedule="cosine", clip_norm=CLIP_NORM, seed=self.seed,
                    progress=job.progress, description="learning masks",
                )  # fmt: skip
            except DataError:
                raise
            except PaperbackError as error:
                job.note(f"Training stopped: {error} The masks are those of that time.")
        job.extras["history"] = objective.history

    def _optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)

        def raise_floor(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:  # the loop's cosine falls to 0, the paper's to a tenth
                group["lr"] = LAST_RATE * self.lr + (1 - LAST_RATE) * group["lr"]

        optimizer.register_step_pre_hook(raise_floor)
        return optimizer

    def _working_memory(self, model: nn.Module, layers: Mapping[str, nn.Module], tokens: int) -> int:
        weights = sum(weight_matrix(layer).numel() for layer in layers.values())
        return int((gate_bytes(*self.nm) + 8) * weights)  # and the masked weights with their gradients


class _Objective(nn.Module):
    """The loss of one step with masks drawn anew, and a record of the gates."""

    def __init__(
        self,
        method: MaskLLM,
        job: Job,
        learned: Mapping[str, MaskDistribution],
        places: Mapping[str, MaskedWeight],
        keys: tuple[str, ...] | None,
        steps: int,
    ) -> None:
        super().__init__()
        self.laws = nn.ModuleList(learned.values())  # trained with the model, of which all else is frozen
        self.method, self.job, self.keys, self.steps = method, job, keys, steps
        self._places = [places[name] for name in learned]  # a plain list: no parameters of the loss
        self._laws, self._names = list(learned.values()), list(learned)
        self._step = 0
        self._codes = [law.codes() for law in learned.values()]
        self.history: dict[str, list[float]] = {
            "step": [], "loss": [], "max_prob": [], "changed": [], "kept_square": [],
        }  # fmt: skip

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
        method, job, u = self.method, self.job, min(self._step / self.steps, 1.0)
        model.eval()  # dropout and running statistics are frozen with the weights
        data = to_batch(batch, self.keys)
        scale, temperature = _between(method.logit_scale, u), _between(method.temperature, u)
        teacher = self._teacher_logits(model, data) if method.distill else None
        for place, law in zip(self._places, self._laws, strict=True):
            place.mask = law.sample(scale, temperature, generator=draws, hard=method.hard)
        loss = torch.zeros(())
        if method.distill < 1:
            loss = (1 - method.distill) * job.loss(model, data)
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                raise DataError("the loss must give a scalar tensor for each batch.")
        if teacher is not None:
            ours = run(model, data)
            mask = data.get("attention_mask") if isinstance(data, Mapping) else None
            distance = distillation_loss(ours, teacher, method.distill_temperature, mask=mask)
            loss = loss.to(ours.device) + method.distill * distance
        square = self._kept_square(model)
        self._note(float(loss.detach()), scale, float(square.detach()))
        self._step += 1
        return loss - method.reg * (1 - u) * square if method.reg else loss

    def _teacher_logits(self, model: nn.Module, data: Any) -> Tensor:
        """Of the teacher, or of the model itself without masks."""
        for place in self._places:
            place.mask = None
        with torch.no_grad():
            return run(self.job.teacher or model, data)

    def _kept_square(self, model: nn.Module) -> Tensor:
        weights: list[Any] = [model.get_submodule(name).weight for name in self._names]
        return torch.stack([weight.float().square().sum() for weight in weights]).sum()

    @torch.no_grad()
    def _note(self, loss: float, scale: float, square: float) -> None:
        if self._step % max(1, self.steps // RECORDS) and self._step != self.steps - 1:
            return
        codes = [law.codes() for law in self._laws]
        counts = [law.gates.shape[1] for law in self._laws]
        changed = sum(int((new != old).sum()) for new, old in zip(codes, self._codes, strict=True))
        certain = sum(
            count * float(law.max_prob(scale)) for count, law in zip(counts, self._laws, strict=True)
        )
        self._codes = codes
        row = (self._step, loss, certain / sum(counts), changed / sum(counts), square)
        for values, value in zip(self.history.values(), row, strict=True):
            values.append(value)


def _between(ends: tuple[float, float], u: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * u
