"""The encoder: any contrastive learner, trained on real and generated images as AdaInf says."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from paperback.data.augment import Views
from paperback.errors import DataError
from paperback.represent.adaptive_inflation.gap import classifier_tv, total_variation_mixture
from paperback.represent.adaptive_inflation.generator import MixtureGenerator
from paperback.represent.adaptive_inflation.inflated import inflate
from paperback.represent.adaptive_inflation.rules import (
    GRAPH_IMAGES,
    LADDER,
    Choice,
    between,
    given_rule,
    graph_rule,
    mixed_graph,
    paper_replication,
    paper_rule,
    pick,
    some,
)
from paperback.represent.contrastive import MoCo, SimCLR
from paperback.represent.contrastive.barlow_twins import BarlowTwins
from paperback.represent.contrastive.byol import BYOL
from paperback.represent.contrastive.learner import ContrastiveLearner
from paperback.represent.evaluate import knn
from paperback.represent.interface import LEAST_SPREAD, Encoder, Images, as_images, as_labels
from paperback.study.measure import Stopwatch
from paperback.training import History
from paperback.training.contrastive import alignment, uniformity

LEARNERS: dict[str, type[ContrastiveLearner]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "barlow_twins": BarlowTwins,
}
RULES = ("paper", "graph", "grid")
CLASSES = 10  # that are assumed where there are no labels
TWO_SAMPLES = 2000  # of each kind, that the gap is estimated from
NEIGHBOURS = 5  # of the k-NN by which a grid is judged
MOMENTS_AT_A_TIME = 10_000  # images of a pass over memory-mapped data


class AdaptiveInflation(Encoder):
    """A contrastive learner whose training set is inflated by generated images.

    Args:
        learner: "simclr", "moco", "byol" or "barlow_twins"; or a mapping with that under "name" and the
            learner's arguments beside it; or any `Encoder`, with which this one cannot be saved (save the
            encoder itself). An encoder that is not one of these four keeps its own views and budget.
        generator: "mixture", or a mapping with that under "name" and `MixtureGenerator`'s arguments.
            Another generator, or images that were generated before, are given to `fit`.
        rule: "paper" (the paper's share of real images, its augmentations interpolated in data size), "graph"
            (the weakest augmentation with which the mixture hangs together as the real images do alone),
            "grid" (trains a short arm for each choice and compares), or a mapping with "replicate" or "beta",
            and "augment".
        n_generated: generated images; 10 for each real one if not given.
        steps: of the optimizer, the same whatever the number of images: no arm gets more compute.
        grid_steps: of each arm of the grid; a tenth of the steps if not given.
        allow_unlabelled: let "grid" compare by alignment and uniformity where there are no labels.
        diagnose: measure the graph and the gap for the report, some seconds.
        in_channels: of the images, 1 or 3.
        image_size: of the images, for a "vit".
        seed: of everything drawn.

    Attributes:
        learner: the encoder inside.
        report_: what was chosen and measured, once fitted: rule, replicate, beta, augmentation (where between
            the standard one, 0, and AdaInf's, 1), lambda_k1 (of the mixture), alpha (labelling error, with
            labels), classifier_tv (of generated from real images), tv_bound (at least so much of it is left
            in the mixture), scores (what the rule compared).

    Raises:
        DataError: if an argument is out of range or not known.
    """

    report_: dict[str, Any]

    def __init__(
        self,
        learner: str | Mapping[str, Any] | Encoder = "simclr",
        generator: str | Mapping[str, Any] = "mixture",
        rule: str | Mapping[str, Any] = "paper",
        n_generated: int | None = None,
        steps: int = 1000,
        grid_steps: int | None = None,
        allow_unlabelled: bool = False,
        diagnose: bool = True,
        in_channels: int = 1,
        image_size: int = 28,
        seed: int = 0,
    ) -> None:
        made = (
            learner if isinstance(learner, Encoder) else make_learner(learner, in_channels, image_size, seed)
        )
        super().__init__(made.backbone, made.in_channels, made.image_size, seed)
        if isinstance(rule, str) and rule not in RULES:
            raise DataError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}, or a mapping.")
        for name, value in (("n_generated", n_generated), ("steps", steps), ("grid_steps", grid_steps)):
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1.")
        self.learner = made
        self.generator = make_generator(generator, seed)
        self.rule, self.n_generated, self.steps = rule, n_generated, steps
        self.grid_steps = grid_steps if grid_steps is not None else max(1, steps // 10)
        self.allow_unlabelled, self.diagnose = allow_unlabelled, diagnose
        if isinstance(made, ContrastiveLearner):
            made.steps = steps

    def fit(
        self, images: Images, labels: Images | None = None, *, generated: Any = None, progress: bool = True
    ) -> Self:
        """Learn from real images and generated ones. uint8 images stay as they are, also in memory maps.

        Args:
            images: the real ones, as `Encoder.fit` takes them.
            labels: integers ``(n,)``, -1 where there is none. Only the rule "grid" and the report use them.
            generated: images of the same shape and type; or an object with ``fit(images)`` and ``sample(n)``;
                the constructor's generator if not given. It never sees labels.
            progress: show bars.

        Returns:
            The encoder itself, in evaluation mode.

        Raises:
            DataError: if images, labels or the generator cannot be used.
        """
        self._checked(images[:1])
        if len(images) < 2:
            raise DataError(f"images hold {len(images)}; an encoder needs at least two to learn from.")
        y = None if labels is None else as_labels(labels, len(images))
        with Stopwatch() as watch:
            self.history_ = self._fit(images, y, progress, generated)
        self.fit_seconds_ = watch.seconds
        return self.eval()

    def _fit(
        self, images: Images, labels: Tensor | None, progress: bool, generated: Any = None
    ) -> History | None:
        drawn = self._generated(images, generated)
        inflate(images, drawn, 1)  # refuses what does not fit, before anything is trained
        for module in (self, self.learner):
            set_moments(module, images)
        choice = self._choose(images, drawn, labels)
        if isinstance(self.learner, ContrastiveLearner):
            assert choice.views is not None
            self.learner.views = choice.views
        dataset = inflate(images, drawn, choice.replicate, shuffle_seed=self.seed)
        if isinstance(self.learner, ContrastiveLearner):
            history: History | None = self.learner.learn_from(dataset, progress=progress)
        else:
            self.learner.fit(dataset.images(), progress=progress)
            history = self.learner.history_
        self.report_ = self._report(images, drawn, labels, choice, dataset.beta)
        return history

    def _features(self, images: Tensor) -> Tensor:
        return self.learner._features(images)

    # -- steps of fit ----------------------------------------------------------------------------------------

    def _generated(self, images: Images, given: Any) -> Any:
        """Generated images: those given, or drawn from a generator that was fitted to the real ones."""
        if given is not None and hasattr(given, "shape"):
            drawn = given
        else:
            source = self.generator if given is None else given
            if not (callable(getattr(source, "fit", None)) and callable(getattr(source, "sample", None))):
                raise DataError(
                    f"generated is a {type(source).__name__}; give images, or an object with fit and sample."
                )
            source.fit(images)
            drawn = source.sample(self.n_generated or 10 * len(images))
        batch = min(getattr(self.learner, "batch_size", 1), len(images))
        if len(drawn) < batch:
            raise DataError(
                f"there are {len(drawn)} generated images, less than a batch of {batch}; make more."
            )
        return drawn

    def _choose(self, images: Images, drawn: Any, labels: Tensor | None) -> Choice:
        n, m = len(images), len(drawn)
        if not isinstance(self.learner, ContrastiveLearner):  # its own views stay
            rule = self.rule if isinstance(self.rule, Mapping) else {}
            if "augment" in rule or self.rule in ("graph", "grid"):
                raise DataError(
                    f"a {type(self.learner).__name__} has views of its own; use the rule 'paper', or a "
                    "mapping with replicate or beta only."
                )
            given = given_rule(rule, n, m, ContrastiveLearner.presets)
            return Choice(str(self.rule) if rule is self.rule else "paper", given.replicate, None)
        presets = self.learner.presets
        if isinstance(self.rule, Mapping):
            return given_rule(self.rule, n, m, presets)
        if self.rule == "grid":
            return self._grid(images, drawn, labels, presets)
        if self.rule == "graph":
            real, generated = (as_images(some(x, GRAPH_IMAGES // 2, self.seed)) for x in (images, drawn))
            return graph_rule(real, generated, (n, m), presets, self._classes(labels), self.seed)
        return paper_rule(n, m, presets)

    def _grid(self, images: Images, drawn: Any, labels: Tensor | None, presets: tuple[str, str]) -> Choice:
        """Train a short arm for each replication and augmentation, and keep the best.

        With labels an arm is worth its k-NN accuracy on real images, without them its alignment plus
        uniformity.
        """
        labelled = labels is not None and int((labels >= 0).sum()) > 2 * NEIGHBOURS
        if not labelled and not self.allow_unlabelled:
            raise DataError(
                "the rule 'grid' compares by labels; give fit some, or set allow_unlabelled=True to compare "
                "by alignment and uniformity."
            )
        paper = paper_replication(len(images), len(drawn))
        scores: dict[tuple[int, float], float] = {}
        for replicate in sorted({1, paper, 3 * paper}):
            for share in (LADDER[-1], 0.5, LADDER[0]):
                arm = copy.deepcopy(self.learner)
                assert isinstance(arm, ContrastiveLearner)
                arm.steps, arm.views = self.grid_steps, between(presets, share)
                arm.learn_from(inflate(images, drawn, replicate, shuffle_seed=self.seed), progress=False)
                if labelled:
                    assert labels is not None
                    scores[replicate, share] = self._neighbours(arm, images, labels)
                else:
                    scores[replicate, share] = -self._spread(arm, images, presets)
        best = max(scores, key=scores.__getitem__)
        named = {f"replicate {r}, augmentation {s:g}": score for (r, s), score in scores.items()}
        return Choice("grid", best[0], between(presets, best[1]), best[1], named)

    def _neighbours(self, arm: ContrastiveLearner, images: Images, labels: Tensor) -> float:
        """k-NN accuracy on one half of the labelled real images, from the other half."""
        rows = torch.nonzero(labels >= 0)[:, 0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        first, second = rows[order].chunk(2)
        x, x_test = (arm.transform(as_images(pick(images, part))) for part in (first, second))
        return knn(x, labels[first], x_test, labels[second], k=NEIGHBOURS).accuracy

    def _spread(self, arm: ContrastiveLearner, images: Images, presets: tuple[str, str]) -> float:
        """Alignment plus uniformity of two views under the standard augmentation; lower is better."""
        draws = torch.Generator().manual_seed(self.seed)
        views = Views.of(presets[0])(as_images(some(images, TWO_SAMPLES, self.seed)), draws)
        first, second = (arm.transform(view) for view in views)
        return float(alignment(first, second) + uniformity(first))

    def _report(
        self, images: Images, drawn: Any, labels: Tensor | None, choice: Choice, beta: float
    ) -> dict[str, Any]:
        report: dict[str, Any] = {
            "rule": choice.rule,
            "replicate": choice.replicate,
            "beta": beta,
            "augmentation": choice.share,
            "views": [] if choice.views is None else [v.settings() for v in vars(choice.views).values()],
            "scores": choice.scores,
        }
        if not self.diagnose:
            return report
        gap = classifier_tv(
            some(images, TWO_SAMPLES, self.seed), some(drawn, TWO_SAMPLES, self.seed), self.seed
        )
        report["classifier_tv"] = gap.estimate
        report["tv_bound"] = total_variation_mixture(beta, gap.at_least)
        if choice.views is not None:
            k = self._classes(labels)
            real, generated = (as_images(some(x, GRAPH_IMAGES // 2, self.seed)) for x in (images, drawn))
            graph = mixed_graph(real, generated, beta, choice.views.first, k, self.seed)
            report["lambda_k1"] = graph.lambda_after(k)
            if labels is not None and (labels >= 0).any():
                known = some(torch.nonzero(labels >= 0)[:, 0], GRAPH_IMAGES, self.seed)
                own = as_images(pick(images, known))
                graph = mixed_graph(own, own[:0], 1.0, choice.views.first, k, self.seed)
                report["alpha"] = graph.labelling_error(labels[known])
        return report

    @staticmethod
    def _classes(labels: Tensor | None) -> int:
        known = 0 if labels is None else len(labels[labels >= 0].unique())
        return known or CLASSES


def make_learner(
    learner: str | Mapping[str, Any], in_channels: int, image_size: int, seed: int
) -> ContrastiveLearner:
    """A learner from its name and arguments; see `AdaptiveInflation`.

    Raises:
        DataError: if there is none of that name, or it does not take the arguments.
    """
    arguments = {"name": learner} if isinstance(learner, str) else dict(learner)
    name = arguments.pop("name", None)
    if name not in LEARNERS:
        raise DataError(f"there is no learner {name!r}; take one of {', '.join(LEARNERS)}, or an Encoder.")
    try:
        return LEARNERS[name](
            **{"in_channels": in_channels, "image_size": image_size, "seed": seed} | arguments
        )
    except TypeError as error:
        raise DataError(f"the learner {name!r} does not take these arguments: {error}.") from error


def make_generator(generator: str | Mapping[str, Any], seed: int) -> MixtureGenerator:
    """A generator from its name and arguments; see `AdaptiveInflation`.

    Raises:
        DataError: if there is none of that name, or it does not take the arguments.
    """
    if not isinstance(generator, str | Mapping):
        raise DataError(
            f"generator is a {type(generator).__name__}; give your own, or its images, to fit(generated=)."
        )
    arguments = {"name": generator} if isinstance(generator, str) else dict(generator)
    name = arguments.pop("name", None)
    if name != "mixture":
        raise DataError(f"there is no generator {name!r}; take 'mixture', or give fit(generated=) your own.")
    try:
        return MixtureGenerator(**{"seed": seed} | arguments)
    except TypeError as error:
        raise DataError(f"the generator 'mixture' does not take these arguments: {error}.") from error


def set_moments(encoder: Encoder, images: Images) -> None:
    """Mean and deviation of each channel of the real images, in pieces, for `Encoder.normalise`."""
    pieces = [images[i : i + MOMENTS_AT_A_TIME] for i in range(0, len(images), MOMENTS_AT_A_TIME)]
    moments = torch.zeros(2, encoder.in_channels, dtype=torch.float64)  # of the values and their squares
    for piece in pieces:
        x = as_images(piece).double().cpu()
        share = len(piece) / len(images)
        moments += share * torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
    mean, std = moments[0], (moments[1] - moments[0] ** 2).clamp(min=0).sqrt()
    encoder.mean.copy_(mean[:, None, None])
    encoder.std.copy_(torch.where(std > LEAST_SPREAD, std, 1.0)[:, None, None])
