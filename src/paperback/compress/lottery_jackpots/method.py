"""The compressor: how many weights each layer keeps, which ones to begin with, and the search."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.interface import Compressor, Job
from paperback.compress.lottery_jackpots.search import (
    RESTRICTIONS,
    MaskSearch,
    Restriction,
    restriction_at,
)
from paperback.compress.masked import MaskedWeight, asking, masking, write_masked
from paperback.compress.masks import Allocation, allocate, hold_masks, topk_mask
from paperback.compress.survey.healing import to_batch, training_rows
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, Found, find_layers, is_transposed, weight_matrix
from paperback.training import generator, seeded, train

Rule = Literal["global_l1", "uniform", "erk"]
Start = Literal["magnitude", "random", "snip", "movement"]
RULES: dict[str, Allocation] = {"global_l1": "global", "uniform": "uniform", "erk": "erk"}
LEAST_SHARE = 0.005  # of a layer's weights, that "global_l1" leaves it
ALL_ROWS = 2**62
GRADIENT_BATCHES = 10  # that "snip" and "movement" look at


class LotteryJackpots(Compressor):
    """Searches the mask of a trained network, whose weights, biases and norms' factors stay as they are.

    Running statistics of batch norms follow the masked network, as in the paper; they belong to the mask and
    are handed over as ``extras["buffers"]``. ``extras["masks"]`` are the masks by layer, for
    `masks.masks_to_bytes` and `masked.apply_masks`; ``extras["history"]`` counts the exchanges of each step,
    and ``extras["overlap"]`` is the share of kept weights that the magnitude mask keeps too.

    Args:
        sparsity: share of the handled weights that become 0, in [0, 1).
        epochs: passes of the search over the training part, >= 0.
        lr: of SGD on the scores; it falls with a cosine to 0.
        momentum: of SGD.
        weight_decay: of SGD, on the scores.
        alloc: who keeps how many. "global_l1" by the largest magnitudes of all layers together, where each
            layer keeps its best weights to the number of its outputs and half a percent of them at least;
            "uniform" the same share everywhere; "erk" more in thin layers.
        init: the first mask. "magnitude"; "random", whose scores are uniform in (0, 1); "snip", |W g|;
            "movement", -W g; or a function of the layer's name and weight that gives scores ``(out, in)``.
        restriction: of the exchanges, see `restriction_at`; None for none.
        keep_classifier: leave the last layer of the model whole.
        weights: "random" draws all weights anew first (hidden networks in random weights, edge-popup).
        batch_size: rows of a step.
        finetune_epochs: passes that train the surviving weights after the search. The result is then no
            jackpot, and the report says so.
        finetune_lr: of Adam.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: see `Compressor`.

    Raises:
        DataError: if a setting is out of range.
    """

    family = "prune"
    needs = frozenset({"training", "loss"})
    tuning_free = False
    budgets = ("density",)

    def __init__(
        self,
        sparsity: float = 0.9,
        epochs: int = 5,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        alloc: Rule = "global_l1",
        init: Start | Callable[[str, Tensor], Tensor] = "magnitude",
        restriction: Restriction | None = "power4",
        keep_classifier: bool = True,
        weights: Literal["pretrained", "random"] = "pretrained",
        batch_size: int = 256,
        finetune_epochs: int = 0,
        finetune_lr: float = 1e-3,
        *,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if not 0 <= sparsity < 1:
            raise DataError(f"sparsity is {sparsity}; it must lie in [0, 1).")
        if epochs < 0 or finetune_epochs < 0 or batch_size < 1:
            raise DataError(
                f"epochs is {epochs}, finetune_epochs {finetune_epochs}, batch_size {batch_size}; "
                "the first two must be at least 0, the last at least 1."
            )
        if not (lr > 0 and finetune_lr > 0 and 0 <= momentum < 1 and weight_decay >= 0):
            raise DataError(
                f"lr is {lr}, finetune_lr {finetune_lr}, momentum {momentum}, weight_decay "
                f"{weight_decay}; they must be positive, positive, in [0, 1), and at least 0."
            )
        _check_choice("alloc", alloc, tuple(RULES))
        _check_choice("restriction", restriction, (*RESTRICTIONS, None))
        _check_choice("weights", weights, ("pretrained", "random"))
        if not callable(init):
            _check_choice("init", init, get_args(Start))
        self.sparsity, self.epochs, self.batch_size = sparsity, epochs, batch_size
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.alloc, self.init, self.restriction = alloc, init, restriction
        self.keep_classifier, self.weights = keep_classifier, weights
        self.finetune_epochs, self.finetune_lr = finetune_epochs, finetune_lr

    def _find(self, model: nn.Module) -> Found:
        """The classifier, the last layer that the model defines, is left."""
        found = find_layers(model, self.targets, self.ignore)
        with_weight = {*found.layers, *found.skipped}
        last = next((name for name, _ in reversed(list(model.named_modules())) if name in with_weight), None)
        if not self.keep_classifier or last not in found.layers or len(found.layers) == 1:
            return found
        layers = {name: layer for name, layer in found.layers.items() if name != last}
        tied = {name: owner for name, owner in found.tied.items() if owner != last}
        return Found(layers, found.skipped | {last: "it is the classifier, which is kept whole"}, tied)

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        if budget.unit != "density":
            raise budget.refuse(type(self).__name__, *self.budgets)
        settled = copy.copy(self)
        settled.sparsity = 1 - float(budget.value)
        return settled

    def _compress(self, job: Job) -> None:
        if self.weights == "random":
            _draw_weights(job.model, self.seed)
            job.note("All weights were drawn at random first; nothing of the trained network is left.")
        weights = {name: weight_matrix(layer).float() for name, layer in job.layers.items()}
        for name, weight in weights.items():
            if not bool(weight.any()):
                raise DataError(
                    f"all weights of {name} are 0, so that none can be chosen; ignore this layer."
                )
        kept = self._allocate(job, weights)
        magnitude = {name: topk_mask(weights[name].abs(), kept[name], name=name) for name in weights}
        searches = self._start(job, weights, kept, magnitude)
        buffers = {name: value.clone() for name, value in job.model.named_buffers()}
        job.extras["history"] = self._search(job, searches)
        masks = {name: search.mask.cpu() for name, search in searches.items()}
        for name, mask in masks.items():
            write_masked(job.layers[name], mask)
        both = sum(int((masks[name] & magnitude[name].cpu()).sum()) for name in masks)
        job.extras |= {
            "masks": masks,
            "overlap": both / sum(kept.values()),
            "buffers": {
                name: value.clone()
                for name, value in job.model.named_buffers()
                if name in buffers and not torch.equal(value, buffers[name])
            },
        }
        if self.finetune_epochs:
            self._finetune(job, masks)

    # -- who keeps how many, and which first ---------------------------------------------------------------

    def _allocate(self, job: Job, weights: Mapping[str, Tensor]) -> dict[str, int]:
        density = 1 - self.sparsity
        total = sum(weight.numel() for weight in weights.values())
        zeros = total - sum(int(weight.count_nonzero()) for weight in weights.values())
        if zeros > self.sparsity * total + 1e-9:
            job.note(
                f"{zeros / total:.0%} of the weights were 0 already, more than the sparsity of "
                f"{self.sparsity:.0%} asks for; kept weights may be 0."
            )
        if self.alloc != "global_l1":
            return allocate(weights, density, RULES[self.alloc])
        least = {
            name: min(w.numel(), max(len(w), math.ceil(LEAST_SHARE * w.numel())))
            for name, w in weights.items()
        }
        if sum(least.values()) > density * total:
            raise BudgetError(
                f"a density of {density:.4g} leaves some layer fewer weights than outputs; the density that "
                f"'global_l1' reaches is {sum(least.values()) / total:.4g} to 1, or choose alloc='uniform'."
            )
        # Raised above all magnitudes, the best weights of each layer are among the largest of all.
        above = 1 + max(float(w.abs().max()) for w in weights.values())
        scores = {name: w.abs() + above * topk_mask(w.abs(), least[name]) for name, w in weights.items()}
        return allocate(weights, density, "global", scores=scores)

    def _start(
        self,
        job: Job,
        weights: Mapping[str, Tensor],
        kept: Mapping[str, int],
        magnitude: Mapping[str, Tensor],
    ) -> dict[str, MaskSearch]:
        searches = {}
        gradients = self._gradients(job) if self.init in ("snip", "movement") else {}
        for name, weight in weights.items():
            scores = None
            if self.init == "magnitude":
                mask = magnitude[name]
            elif self.init == "random":
                draws = generator(self.seed, "scores", name)
                scores = torch.rand(weight.shape, generator=draws).to(weight.device)
                mask = topk_mask(scores, kept[name], name=name)
            elif callable(self.init):
                mask = topk_mask(self.init(name, weight.clone()).reshape(weight.shape), kept[name], name=name)
            else:
                saliency = weight * gradients[name]
                saliency = saliency.abs() if self.init == "snip" else -saliency
                mask = topk_mask(saliency, kept[name], name=name)
            searches[name] = MaskSearch(mask, scores)
        return searches

    def _gradients(self, job: Job) -> dict[str, Tensor]:
        """The loss's gradient by each dense weight, summed over a few batches, ``(out, in)``."""
        assert job.data is not None  # the method needs training data
        rows, keys = training_rows(job.data, GRADIENT_BATCHES * self.batch_size, self.seed)
        weights: dict[str, Any] = {name: layer.weight for name, layer in job.layers.items()}
        sums: dict[str, Tensor] = {}
        for start in range(0, len(rows[0]), self.batch_size):
            batch = to_batch(tuple(part[start : start + self.batch_size] for part in rows), keys)
            with torch.enable_grad(), asking(weights.values()):
                found = torch.autograd.grad(job.loss(job.model, batch), list(weights.values()))
            for name, gradient in zip(weights, found, strict=True):
                turned = is_transposed(job.layers[name])
                oriented = (gradient.T if turned else gradient.flatten(1)).float()
                sums[name] = sums[name] + oriented if name in sums else oriented
        return sums

    # -- the search ----------------------------------------------------------------------------------------

    def _search(self, job: Job, searches: Mapping[str, MaskSearch]) -> dict[str, list[float]]:
        """Train the scores; every parameter of the model is frozen meanwhile."""
        history: dict[str, list[float]] = {"exchanges": [], "share": [], "loss": []}
        if not self.epochs or self.sparsity == 0:
            return history
        assert job.data is not None
        rows, keys = training_rows(job.data, ALL_ROWS, self.seed)
        steps = self.epochs * math.ceil(len(rows[0]) / self.batch_size)
        tied = find_layers(job.model, self.targets, self.ignore).tied
        layers = job.layers | {n: job.model.get_submodule(n) for n, o in tied.items() if o in searches}

        def refresh(*_: Any) -> None:
            share = restriction_at(self.restriction, len(history["share"]) / steps)
            history["exchanges"].append(sum(search.refresh(share) for search in searches.values()))
            history["share"].append(share)

        def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            sgd = torch.optim.SGD(
                parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
            sgd.register_step_post_hook(refresh)
            return sgd

        with asking(job.model.parameters(), False), masking(layers) as places:
            objective = _Objective(job, searches, places, keys)
            trained = train(
                job.model, objective, rows, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr,
                optimizer=optimizer, schedule="cosine", seed=self.seed, progress=job.progress,
                description="searching masks",
            )  # fmt: skip
        return history | {"loss": trained.train_loss}

    def _finetune(self, job: Job, masks: Mapping[str, Tensor]) -> None:
        """Train the weights that are left; pruned ones stay 0."""
        assert job.data is not None
        rows, keys = training_rows(job.data, ALL_ROWS, self.seed)
        held: dict[Tensor, Tensor] = {}
        for name, layer in job.layers.items():
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            mask = masks[name].T if is_transposed(layer) else masks[name].view(weight.shape)
            held[weight] = mask.to(weight.device)

        def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            adam = torch.optim.Adam(parameters, lr=self.finetune_lr)
            hold_masks(adam, held)
            return adam

        train(
            job.model, lambda model, batch, _: job.loss(model, to_batch(batch, keys)), rows,
            epochs=self.finetune_epochs, batch_size=self.batch_size, lr=self.finetune_lr, optimizer=optimizer,
            schedule="cosine", seed=self.seed, progress=job.progress, description="tuning what is left",
        )  # fmt: skip
        job.note(
            "The surviving weights were trained after the search, so that this is not a lottery jackpot."
        )


class _Objective(nn.Module):
    """The loss with the masks of now; its parameters are the scores."""

    def __init__(
        self,
        job: Job,
        searches: Mapping[str, MaskSearch],
        places: Mapping[str, MaskedWeight],
        keys: tuple[str, ...] | None,
    ) -> None:
        super().__init__()
        self.searches = nn.ModuleList(searches.values())
        self._places = [places[name] for name in searches]
        self._job, self._keys = job, keys

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
        for place, search in zip(self._places, self.searches, strict=True):
            place.mask = search()
        return self._job.loss(model, to_batch(batch, self._keys))


# -- helpers -------------------------------------------------------------------------------------------------


def _draw_weights(model: nn.Module, seed: int) -> None:
    """Draw all weights anew, by each module's own rule."""
    with seeded(seed, "random weights"):
        for name, module in model.named_modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise DataError(f"{name} has no reset_parameters, so that its weights cannot be drawn anew.")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise DataError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}.")
