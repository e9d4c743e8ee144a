"""Our regressors as BoTorch models, so that any acquisition function can use them (extra ``bayes``).

A normal law becomes BoTorch's own `GPyTorchPosterior`. The others become a `LawPosterior`, whose samples are
functions of standard normal base samples: a mixture of normal vectors, as a Student-t law is one, spends one
more normal number for what it mixes over, a set of sampled functions spends one for the index of the
function, and a method that knows single points only gets them independently by inverse cdf. With fixed base
samples an acquisition function is deterministic and smooth in the points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paperback.bayes.distributions import (
    EDGE,
    FunctionDraws,
    MultivariateStudentT,
    NormalVectorMixture,
    Rescaled,
)
from paperback.errors import MissingExtraError, NotSupportedError

try:
    from botorch.models.model import Model
    from botorch.posteriors import GPyTorchPosterior, Posterior
    from botorch.sampling.get_sampler import GetSampler
    from botorch.sampling.normal import SobolQMCNormalSampler
    from gpytorch.distributions import MultitaskMultivariateNormal
    from gpytorch.distributions import MultivariateNormal as GPyTorchNormal
    from linear_operator.operators import CholLinearOperator, TriangularLinearOperator
except ModuleNotFoundError as error:
    raise MissingExtraError(
        'BoTorch models need botorch and gpytorch: pip install "paperback[bayes]"'
    ) from error

if TYPE_CHECKING:
    from paperback.bayes.interface import BayesianRegressor


def as_botorch(estimator: BayesianRegressor) -> EstimatorModel:
    """A fitted regressor as a BoTorch model; `BayesianRegressor.to_botorch` says more."""
    return EstimatorModel(estimator)


class EstimatorModel(Model):
    """A BoTorch model whose posterior is that of a fitted estimator.

    Args:
        estimator: fitted.
        outputs: which of its outputs; all if not given.
    """

    def __init__(self, estimator: BayesianRegressor, outputs: Sequence[int] | None = None) -> None:
        super().__init__()
        self.estimator = estimator
        self.outputs = list(range(estimator.n_outputs_) if outputs is None else outputs)

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return len(self.outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: there is one model."""
        return torch.Size([])

    def subset_output(self, idcs: list[int]) -> EstimatorModel:
        """The model of some of the outputs."""
        return EstimatorModel(self.estimator, [self.outputs[index] for index in idcs])

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Callable[[Posterior], Posterior] | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """The law of the function at points.

        Args:
            X: ``(..., q, features)``, in the units of the estimator's X.
            output_indices: some of the outputs.
            observation_noise: must be false; the law of observations is `predict_distribution`'s.
            posterior_transform: applied to the posterior.
            **kwargs: nothing else is taken.

        Returns:
            A posterior of ``(..., q, outputs)``, differentiable in X.

        Raises:
            NotSupportedError: if observation noise is asked for.
        """
        if kwargs or (isinstance(observation_noise, Tensor) or observation_noise):
            raise NotSupportedError(
                "the posterior is of the noise-free function; leave observation_noise false."
            )
        chosen = [
            self.outputs[i] for i in (range(self.num_outputs) if output_indices is None else output_indices)
        ]
        posterior = _posterior(self.estimator, X, chosen)
        return posterior if posterior_transform is None else posterior_transform(posterior)


def _posterior(estimator: BayesianRegressor, X: Tensor, outputs: list[int]) -> Posterior:
    """The posterior in the units of the data."""
    x = estimator._scaled(X.to(torch.float64))
    shift, scale = (part[outputs].to(x) for part in estimator._target_units())
    if not has_joint(estimator):
        law = estimator._law(x)  # batch (..., q, all outputs)
        full = tuple(part.to(x).expand(law.batch_shape) for part in estimator._target_units())
        return independent_posterior(Rescaled(law, *full), outputs)
    joint = estimator._joint(x)  # batch (..., all outputs), event (q,)
    if isinstance(joint, FunctionDraws):
        values = joint.values.movedim(-2, -1)[..., outputs]
        return function_posterior(shift + scale * values)
    loc = shift[:, None] + scale[:, None] * joint.loc[..., outputs, :]
    if isinstance(joint, MultivariateStudentT | NormalVectorMixture):
        tril = scale[:, None, None] * joint.scale_tril[..., outputs, :, :]
        if isinstance(joint, NormalVectorMixture):
            return mixture_posterior(NormalVectorMixture(joint.log_weights, loc, tril, joint.factors))
        return mixture_posterior(MultivariateStudentT(joint.df[..., outputs], loc, tril))
    # The factor is handed over as it is: a covariance made of it again might have none.
    lower = scale[:, None, None] * joint.scale_tril[..., outputs, :, :]
    if len(outputs) == 1:
        factor = CholLinearOperator(TriangularLinearOperator(lower[..., 0, :, :]))
        return GPyTorchPosterior(GPyTorchNormal(loc[..., 0, :], factor))
    normal = GPyTorchNormal(loc, CholLinearOperator(TriangularLinearOperator(lower)))
    return GPyTorchPosterior(MultitaskMultivariateNormal.from_batch_mvn(normal, task_dim=-1))


def has_joint(estimator: BayesianRegressor) -> bool:
    """Whether a method knows the law of several points together."""
    from paperback.bayes.interface import BayesianRegressor

    return type(estimator)._joint is not BayesianRegressor._joint


class LawPosterior(Posterior):
    """A posterior whose samples are a function of standard normal base samples.

    Args:
        mean: ``(*batch, q, outputs)``.
        variance: of that shape.
        base_shape: rows and columns of the base samples that one sample takes.
        draw: from base samples ``(*sample, *batch, *base_shape)`` to samples ``(*sample, *batch, q,
            outputs)``.
    """

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        base_shape: tuple[int, int],
        draw: Callable[[Tensor], Tensor],
    ) -> None:
        self.mean, self.variance = mean, variance
        self.batch_shape = mean.shape[:-2]
        self._base_shape, self._draw = base_shape, draw

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the samples."""
        return self.mean.dtype

    @property
    def base_sample_shape(self) -> torch.Size:
        """Of the base samples of one sample."""
        return torch.Size([*self.batch_shape, *self._base_shape])

    @property
    def batch_range(self) -> tuple[int, int]:
        """Base samples are the same for all batches."""
        return (0, -2)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return torch.Size([*sample_shape, *self.mean.shape])

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """The samples that belong to base samples.

        Args:
            sample_shape: number of samples.
            base_samples: standard normal, ``(*sample_shape, *base_sample_shape)``.

        Returns:
            ``(*sample_shape, *batch, q, outputs)``.
        """
        return self._draw(base_samples.to(self.mean).expand(*sample_shape, *self.base_sample_shape))

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Samples, differentiable in the points."""
        shape = torch.Size() if sample_shape is None else sample_shape
        base = torch.randn([*shape, *self.base_sample_shape], dtype=self.dtype, device=self.device)
        return self.rsample_from_base_samples(shape, base)


@GetSampler.register(LawPosterior)
def _sampler(posterior: LawPosterior, sample_shape: torch.Size, *, seed: int | None = None) -> Any:
    return SobolQMCNormalSampler(sample_shape, seed=seed)


def function_posterior(values: Tensor) -> LawPosterior:
    """A posterior of frozen functions: sample k of an acquisition is the same function for all points.

    Args:
        values: ``(draws, *batch, q, outputs)``.

    Returns:
        The posterior; a base sample is one normal number, whose quantile is the index of the function.
    """
    draws = values.shape[0]
    last = values.movedim(0, -1)  # (*batch, q, outputs, draws)

    def draw(base: Tensor) -> Tensor:
        index = (torch.special.ndtr(base) * draws).long().clamp(0, draws - 1)  # (*sample, *batch, 1, 1)
        index = index.expand(*base.shape[:-2], *values.shape[-2:])[..., None]
        return last.expand(*index.shape[:-1], draws).gather(-1, index)[..., 0]

    return LawPosterior(values.mean(0), values.var(0, correction=0), (1, 1), draw)


def mixture_posterior(law: MultivariateStudentT | NormalVectorMixture) -> LawPosterior:
    """A posterior of vectors that are normal given one more variable, which all outputs share.

    Args:
        law: batch ``(*batch, outputs)``, event ``(q,)``.

    Returns:
        The posterior; the first row of the base samples makes that variable.
    """
    q, outputs = law.event_shape[0], law.batch_shape[-1]

    def draw(base: Tensor) -> Tensor:
        first, normal = base[..., 0, :1], base[..., 1:, :].mT  # (..., 1), (..., outputs, q)
        return law.from_base(normal, first.expand(*first.shape[:-1], outputs)).mT

    return LawPosterior(law.mean.mT, law.variance.mT, (q + 1, outputs), draw)


def independent_posterior(law: Rescaled, outputs: list[int]) -> LawPosterior:
    """A posterior of independent points by inverse cdf.

    Args:
        law: batch ``(*batch, q, all outputs)``, with icdf.
        outputs: which of them.

    Returns:
        The posterior.
    """

    def draw(base: Tensor) -> Tensor:
        full = base.new_zeros(*base.shape[:-1], law.batch_shape[-1])
        full[..., outputs] = base
        return law.icdf(torch.special.ndtr(full).clamp(EDGE, 1 - EDGE))[..., outputs]

    mean, variance = law.mean[..., outputs], law.variance[..., outputs]
    return LawPosterior(mean, variance, (mean.shape[-2], len(outputs)), draw)
