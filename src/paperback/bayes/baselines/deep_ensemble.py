"""Deep ensemble: networks that give mean and variance, trained apart from different first weights.

Source: Lakshminarayanan, Pritzel and Blundell, Simple and scalable predictive uncertainty estimation using
deep ensembles (2017), algorithm 1 without adversarial training.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperback.bayes.distributions import FunctionDraws, NormalMixture
from paperback.bayes.interface import BayesianClassifier, BayesianRegressor, _BayesianEstimator
from paperback.errors import DataError
from paperback.training import derive, generator, seeded, train

LOWEST_VARIANCE = 1e-4  # of standardised targets: a network that fits a target exactly must not be certain


class Members(nn.Module):
    """Networks of one shape that are evaluated together.

    Args:
        members: number of networks.
        features: inputs.
        hidden: widths of the hidden layers.
        outputs: of each network.
    """

    def __init__(self, members: int, features: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        widths = [features, *hidden, outputs]
        pairs = list(itertools.pairwise(widths))
        self.weights = nn.ParameterList([_uniform(members, a, b, a) for a, b in pairs])
        self.biases = nn.ParameterList([_uniform(members, 1, b, a) for a, b in pairs])

    def forward(self, x: Tensor) -> Tensor:
        """From rows ``(rows, features)``, or each member its own, to ``(members, rows, outputs)``."""
        for layer, (weights, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer:
                x = F.silu(x)
            x = torch.baddbmm(bias, x.expand(len(weights), *x.shape[-2:]), weights)
        return x


def _uniform(members: int, rows: int, columns: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter((2 * torch.rand(members, rows, columns, dtype=torch.float64) - 1) * fan_in**-0.5)


class _DeepEnsemble(_BayesianEstimator):
    """What the regressor and the classifier share: the members and how they are trained."""

    members_: Members

    def __init__(
        self,
        n_members: int = 5,
        hidden: Sequence[int] = (64, 64),
        epochs: int = 300,
        batch_size: int = 64,
        lr: float = 1e-2,
        weight_decay: float = 1e-4,
        random_state: int = 0,
    ) -> None:
        self.n_members = n_members
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.random_state = random_state

    @abstractmethod
    def _outputs(self) -> int:
        """Outputs of one network."""

    def _build_modules(self) -> Mapping[str, nn.Module]:
        return {"members_": Members(self.n_members, self.n_features_in_, self.hidden, self._outputs())}

    def _train(self, x: Tensor, target: Tensor, losses: nn.Module) -> None:
        """Every member on its own order of the rows; early stopping on a fifth of them."""
        if self.n_members < 1:
            raise DataError(f"n_members is {self.n_members}; an ensemble has at least one.")
        with seeded(derive(self.random_state, "weights")):
            self.members_ = self._build_modules()["members_"]  # type: ignore[assignment]
        order = torch.randperm(len(x), generator=generator(self.random_state, "validation"))
        held_out = len(x) // 5 if len(x) >= 50 else 0
        kept, val = order[held_out:], order[:held_out]

        def loss(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
            rows, targets = batch
            orders = torch.rand(self.n_members, len(rows), generator=draws).argsort(1)
            half = orders[:, : max(1, (3 * len(rows)) // 4)]  # members see different rows of a batch
            return losses(model(rows[half]), targets[half])

        def metric(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
            return losses(model(batch[0]), batch[1].expand(self.n_members, *batch[1].shape))

        history = train(
            self.members_,
            loss,
            [x[kept], target[kept]],
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            val_tensors=[x[val], target[val]] if held_out else None,
            val_metric=metric if held_out else None,
            optimizer="adamw",
            schedule="cosine",
            weight_decay=self.weight_decay,
            clip_norm=10.0 * self.n_members,
            patience=100 if held_out else None,
            seed=self.random_state,
            progress=False,
        )
        self.diagnostics_ = {"epochs": float(len(history))}


class _GaussianLoss(nn.Module):
    """Negative log density of targets under means and log variances."""

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        mean, variance = _mean_and_variance(out)
        return F.gaussian_nll_loss(mean, target, variance)


class _CrossEntropy(nn.Module):
    """Cross-entropy of all members."""

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), target.flatten())


def _mean_and_variance(out: Tensor) -> tuple[Tensor, Tensor]:
    mean, raw = out.chunk(2, -1)
    return mean, F.softplus(raw) + LOWEST_VARIANCE


class DeepEnsembleRegressor(_DeepEnsemble, BayesianRegressor):
    """Networks with a mean and a variance for each target; their equal mixture is the prediction.

    Args:
        n_members: networks, >= 1.
        hidden: widths of the hidden layers.
        epochs: at most; training stops early on a fifth of the rows, if there are 50 at least.
        batch_size: rows of a step.
        lr: of AdamW, falling to zero as a cosine.
        weight_decay: of AdamW.
        random_state: of the first weights and the order of rows.
    """

    def _outputs(self) -> int:
        return 2 * self.n_outputs_

    def _fit(self, x: Tensor, y: Tensor) -> None:
        self._train(x, y, _GaussianLoss())

    def _law(self, x: Tensor) -> NormalMixture:
        out = self.members_(x.reshape(-1, x.shape[-1]))
        mean, variance = _mean_and_variance(out.reshape(len(out), *x.shape[:-1], -1))
        return NormalMixture(mean, variance.sqrt())

    def _joint(self, x: Tensor) -> FunctionDraws:
        out = self.members_(x.reshape(-1, x.shape[-1]))
        mean, _ = _mean_and_variance(out.reshape(len(out), *x.shape[:-1], -1))
        return FunctionDraws(mean.movedim(-1, -2))


class DeepEnsembleClassifier(_DeepEnsemble, BayesianClassifier):
    """Networks trained on the cross-entropy; the mean of their probabilities is the prediction.

    Args:
        n_members: networks, >= 1.
        hidden: widths of the hidden layers.
        epochs: at most; training stops early on a fifth of the rows, if there are 50 at least.
        batch_size: rows of a step.
        lr: of AdamW, falling to zero as a cosine.
        weight_decay: of AdamW.
        random_state: of the first weights and the order of rows.
    """

    def _outputs(self) -> int:
        return len(self.classes_)

    def _fit(self, x: Tensor, labels: Tensor) -> None:
        self._train(x, labels, _CrossEntropy())

    def _probabilities(self, x: Tensor) -> Tensor:
        return self.members_(x).softmax(-1).mean(0)

    def _logits(self, x: Tensor, n: int, seed: int) -> Tensor:
        index = torch.randint(self.n_members, (n,), generator=generator(seed, "members"))
        return self.members_(x)[index]
