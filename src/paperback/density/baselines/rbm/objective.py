"""What a restricted Boltzmann machine is trained on, and what its validation part is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.density.baselines.rbm.energy import Weights

N_PROBES = 8  # variables of each row on which the pseudo-likelihood is measured


class LikelihoodGradient:
    """A loss with the gradient of the negative log-likelihood, Gibbs chains standing for the model.

    The value of the loss, a difference of free energies, says little; the gradient is what counts.

    Args:
        chains: first states of the chains, visible variables and class, one-hot.
        k: Gibbs steps per update.
        persistent: go on from the last states (PCD); otherwise start at the batch each time (CD).
    """

    def __init__(self, chains: tuple[Tensor, Tensor], k: int, *, persistent: bool) -> None:
        self.chains = chains
        self.k = k
        self.persistent = persistent

    def __call__(self, weights: Weights, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        """Free energy of the batch minus that of the chains, after k more steps of them."""
        v, y = self.chains if self.persistent else (batch[0], batch[1])
        with torch.no_grad():
            for _ in range(self.k):
                v, y = weights.draw_visible(weights.draw_hidden(v, y, generator), generator)
        self.chains = (v, y)
        return weights.log_weight(v, y).mean() - weights.log_weight(batch[0], batch[1]).mean()


def mean_pseudo_log_likelihood(
    weights: Weights,
    v: Float[Tensor, "batch entries"],
    y: Float[Tensor, "batch classes"],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Mean of log p(x_i | all others) over variables, the class being one of them, in nats.

    It needs no partition function. The mean over visible variables is estimated on a few chosen at random in
    each row.

    Args:
        weights: the machine.
        v: visible variables, one-hot.
        y: class, one-hot; no columns without classes.
        generator: of the choice.

    Returns:
        A scalar <= 0.
    """
    n_variables = len(weights.valid)
    table = weights.visible.unflatten(0, weights.valid.shape)
    bias = weights.visible_bias.unflatten(0, weights.valid.shape)
    one_hot, hidden = v.unflatten(1, weights.valid.shape), weights.hidden_input(v, y)
    row = torch.arange(len(v), device=v.device)
    total = v.new_zeros(())
    for _ in range(N_PROBES):
        i = torch.randint(0, n_variables, (len(v),), generator=generator, device=v.device)
        truth = one_hot[row, i]
        without = hidden - torch.einsum("bk,bkh->bh", truth, table[i])
        logits = bias[i] + nn.functional.softplus(without[:, None] + table[i]).sum(-1)
        log_prob = logits.masked_fill(~weights.valid[i], -torch.inf).log_softmax(1)
        total = total + log_prob[truth > 0].mean() / N_PROBES
    if len(weights.label_bias) == 0:
        return total
    of_class = weights.log_weight_by_class(v).log_softmax(1)[y > 0].mean()
    return (n_variables * total + of_class) / (n_variables + 1)


def adam(lr: float, weight_decay: float) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Adam without momentum, which persistent chains cannot follow; only couplings decay.

    Args:
        lr: learning rate.
        weight_decay: of the matrices; biases are left alone.

    Returns:
        A function from parameters to the optimizer.
    """

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        every = list(parameters)
        couplings, biases = [p for p in every if p.ndim == 2], [p for p in every if p.ndim != 2]
        groups = [
            {"params": couplings, "weight_decay": weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.0, 0.999))

    return make
