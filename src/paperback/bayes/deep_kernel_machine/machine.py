"""The two machines: the full one, whose Gram matrices are those of all data, and the sparse one.

The full machine maximises, over its Gram matrices and kernels,

    L = log p(Y | K(G_L)) - sum_l nu_l KL(N(0, G_l) || N(0, K(G_{l-1}))).

The sparse one has the Gram matrices of inducing points only and maximises, on mini-batches,

    (1/B) sum_t E_q log p(y_t | f_t) - (1/N) (sum_l nu_l KL_l + KL(q(u) || p(u))),

which is a lower bound of L / N and reaches it when all data are inducing points. A step costs O(depth
(inducing^3 + B inducing^2)), whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal

from paperback.bayes.deep_kernel_machine.gram import Features2Gram, GramNorm, Normalisation, StructGram
from paperback.bayes.deep_kernel_machine.kernels import make_kernel
from paperback.bayes.deep_kernel_machine.layers import (
    Divergence,
    ExactReadout,
    GPReadout,
    GramLayer,
    Marginals,
)

Likelihood = Literal["gaussian", "categorical"]

CHUNK = 4096  # points that are propagated at once where no gradient is needed
FIRST_NOISE = 0.1  # variance that a Gaussian likelihood begins with, of standardised targets
LEAST_NOISE = 1e-4
PRIOR_ON = ("log_scale", "log_variance", "log_inverse_length", "log_bias")
PRIOR_STD = 2.0
LOG_2_PI = math.log(2 * math.pi)


class Machine(nn.Module):
    """Inputs, kernels and Gram layers, up to the kernel of the readout.

    Args:
        inducing: inputs of the inducing points, ``(inducing, features)``.
        kernels: names of the kernels, one more than there are layers.
        dof: nu of each layer.
        learn_inducing: train the inputs of the inducing points.
        ard: train one scale for each feature.
        gram_norm: normalisation behind each Gram layer.
        columns: of the noise of Gram matrices in training, or None.
        divergence: exact or its quadratic expansion.
        jitter: part of the mean diagonal that is added to kernel matrices before they are factorised.
    """

    def __init__(
        self,
        inducing: Float[Tensor, "inducing features"],
        kernels: Sequence[str],
        dof: Sequence[float],
        *,
        learn_inducing: bool = True,
        ard: bool = True,
        gram_norm: Normalisation = "no",
        columns: int | None = None,
        divergence: Divergence = "exact",
        jitter: float = 1e-6,
    ) -> None:
        super().__init__()
        self.inputs = Features2Gram(inducing, learn_inducing=learn_inducing, ard=ard)
        self.layers = nn.Sequential(make_kernel(kernels[0]))
        for number, (kernel, nu) in enumerate(zip(kernels[1:], dof, strict=True), 1):
            self.layers.append(
                GramLayer(
                    len(inducing), nu, number=number, jitter=jitter, divergence=divergence, columns=columns
                )
            )
            if gram_norm != "no":
                self.layers.append(GramNorm(gram_norm))
            self.layers.append(make_kernel(kernel))

    def kernel(self, x: Float[Tensor, "*batch points features"], whole: bool = False) -> StructGram:
        """The learned kernel of the readout, K(G_L)."""
        return self.layers(self.inputs(x, whole))

    def gram(self, layer: int, x: Float[Tensor, "*batch points features"], whole: bool = False) -> StructGram:
        """The Gram matrix G_l behind layer l; layer 0 is that of the inputs."""
        gram, met = self.inputs(x, whole), 0
        for part in self.layers:
            if met == layer and not isinstance(part, GramNorm):
                return gram
            gram = part(gram)
            met += isinstance(part, GramLayer)
        return gram

    @property
    def gram_layers(self) -> list[GramLayer]:
        """The layers of learned Gram matrices, from the input to the readout."""
        return [layer for layer in self.layers if isinstance(layer, GramLayer)]

    def log_prior(self) -> Tensor:
        """log density, up to a constant, of a normal prior on the logarithms of all kernel parameters.

        Without it little would set the scales of the layers apart: a kernel that is nearly linear before one
        that amplifies is as good as one kernel, until the amplified jitter passes for noise of the data.
        """
        logs = [p for name, p in self.named_parameters() if name.rpartition(".")[2] in PRIOR_ON]
        squares = [p.square().sum() for p in logs]
        return -sum(squares, self.inputs.inducing.new_zeros(())) / (2 * PRIOR_STD**2)

    def layer_kls(self) -> list[Tensor]:
        """nu_l KL_l of each layer, nats."""
        return [layer.kl() for layer in self.gram_layers]


class FullMachine(Machine):
    """The machine whose inducing points are its training data, with a Gaussian likelihood.

    Args:
        x: training inputs, ``(rows, features)``.
        y: training targets, ``(rows, outputs)``.
        kernels: as for `Machine`.
        dof: as for `Machine`.
        noise: variance that observations begin with; 0 is kept at 0.
        **options: of `Machine`.
    """

    log_noise: Tensor | None

    def __init__(
        self,
        x: Float[Tensor, "rows features"],
        y: Float[Tensor, "rows outputs"],
        kernels: Sequence[str],
        dof: Sequence[float],
        *,
        noise: float = FIRST_NOISE,
        **options: object,
    ) -> None:
        super().__init__(x, kernels, dof, learn_inducing=False, **options)  # type: ignore[arg-type]
        self.readout = ExactReadout(y)
        self.log_noise = _noise_parameter(noise) if noise else None

    @property
    def noise(self) -> Tensor:
        """Variance of an observation."""
        like = self.readout.y
        return like.new_zeros(()) if self.log_noise is None else LEAST_NOISE + self.log_noise.exp()

    def objective(self) -> Tensor:
        """L, nats."""
        kernel = self.kernel(self.inputs.inducing[:0])
        value = self.readout.log_marginal(kernel.ii, self.noise)
        return value - sum(self.layer_kls(), torch.zeros_like(value))

    def forward(self, x: Float[Tensor, "*batch points features"], whole: bool = False) -> Marginals:
        """The law of the noise-free functions at other points."""
        return self.readout(self.kernel(x, whole), self.noise)


class SparseMachine(Machine):
    """The machine on inducing points.

    Args:
        inducing: inputs of the inducing points to begin with, ``(inducing, features)``.
        kernels: as for `Machine`.
        dof: as for `Machine`.
        outputs: number of functions: targets, or classes.
        likelihood: "gaussian" or "categorical" (softmax of the functions).
        noise: variance that observations begin with.
        **options: of `Machine`.
    """

    def __init__(
        self,
        inducing: Float[Tensor, "inducing features"],
        kernels: Sequence[str],
        dof: Sequence[float],
        outputs: int,
        *,
        likelihood: Likelihood = "gaussian",
        noise: float = FIRST_NOISE,
        jitter: float = 1e-6,
        **options: object,
    ) -> None:
        super().__init__(inducing, kernels, dof, jitter=jitter, **options)  # type: ignore[arg-type]
        self.readout = GPReadout(len(inducing), outputs, jitter=jitter)
        self.log_noise = _noise_parameter(noise) if likelihood == "gaussian" else None

    @property
    def noise(self) -> Tensor:
        """Variance of an observation, of a Gaussian likelihood."""
        assert self.log_noise is not None
        return LEAST_NOISE + self.log_noise.exp()

    def kl(self) -> Tensor:
        """All divergences, nats."""
        return sum(self.layer_kls(), self.readout.kl())

    def forward(self, x: Float[Tensor, "*batch points features"], whole: bool = False) -> Marginals:
        """The law of the noise-free functions."""
        return self.readout(self.kernel(x, whole))

    def expected_log_likelihood(
        self,
        x: Float[Tensor, "points features"],
        y: Tensor,
        *,
        draws: int = 100,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " points"]:
        """E_q log p(y | f) of each point, nats.

        Args:
            x: the points.
            y: targets ``(points, outputs)``, for which the expectation is exact, or labels ``(points,)`` of
                int64, for which it is a mean over draws of f.
            draws: of f.
            generator: of the draws.
        """
        mean, variance = self(x)
        if self.log_noise is not None:
            error = (y - mean).square() + variance[:, None]
            return -(error / self.noise + self.noise.log() + LOG_2_PI).sum(-1) / 2
        normal = torch.randn(draws, *mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        log_p = (mean + variance.clamp_min(0).sqrt()[:, None] * normal).log_softmax(-1)
        return log_p.gather(-1, y.expand(draws, -1)[..., None])[..., 0].mean(0)

    def elbo(
        self, x: Tensor, y: Tensor, rows: int, *, draws: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        """The objective per data point, from a batch.

        Args:
            x: ``(batch, features)``.
            y: targets or labels.
            rows: of all training data, N.
            draws: of f, for labels.
            generator: of the draws.
        """
        fit = self.expected_log_likelihood(x, y, draws=draws, generator=generator).mean()
        return fit - self.kl() / rows

    @torch.no_grad()
    def whole_elbo(self, x: Tensor, y: Tensor, *, draws: int = 100, seed: int = 0) -> float:
        """The objective per data point over all data, in chunks."""
        generator = torch.Generator(x.device).manual_seed(seed)
        total = sum(
            float(self.expected_log_likelihood(part, target, draws=draws, generator=generator).sum())
            for part, target in zip(x.split(CHUNK), y.split(CHUNK), strict=True)
        )
        return (total - float(self.kl())) / len(x)

    @torch.no_grad()
    def solve_readout(self, x: Float[Tensor, "rows features"], y: Float[Tensor, "rows outputs"]) -> None:
        """Set q(u) to its optimum for the machine as it is, in one pass over the data."""
        inducing, outputs = self.readout.mean.shape
        moment, response = x.new_zeros(inducing, inducing), x.new_zeros(inducing, outputs)
        for part, target in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            a = self.readout.project(self.kernel(part))
            moment += a @ a.mT
            response += a @ target
        self.readout.solve(moment, response, self.noise)


def normal_law(machine: FullMachine | SparseMachine, x: Float[Tensor, "*batch features"]) -> Normal:
    """The law of an observation at each point, batch ``(*batch, outputs)``; differentiable in x."""
    flat = x.reshape(-1, x.shape[-1])
    parts = [machine(part) for part in flat.split(CHUNK)]
    mean = torch.cat([part.mean for part in parts])
    variance = torch.cat([part.covariance for part in parts])
    std = (variance.clamp_min(0) + machine.noise).sqrt()[:, None].expand_as(mean)
    shape = (*x.shape[:-1], mean.shape[-1])
    return Normal(mean.reshape(shape), std.reshape(shape))


def _noise_parameter(noise: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(math.log(noise), dtype=torch.float64))
