"""Inference in latent tree circuits, batched over the nodes of a level.

Node v holds a latent Z_v of M states with the variable X_v below it. Upwards, with T the transitions,

    u_v(z) = p(x_v | z) prod_c m_c(z),        m_c(z) = sum_z' T_c[z, z'] u_c(z'),

the root's sum gives p(x); an unobserved x_v contributes 1. Messages are rescaled by their largest entry and
the logs of the scales summed apart, so that float32 keeps its digits over hundreds of variables. Downwards
go the posteriors of the latents, and with them the circuit's flows: the expected counts of EM.

All arrays have a component axis C: a mixture of C trees of one shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.density.probabilistic_circuit.structure import RootedTree
from paperback.numerics.spins import sample_categorical

LOWEST = -1e30  # stands for log 0 as a scale


@dataclass(frozen=True)
class Parameters:
    """Log-probabilities of a latent tree.

    Attributes:
        root: log p(component, Z_root), normalised over both.
        transition: log p(Z_node | Z_parent); the entry of the root is not used.
        emission: log p(X_node = k | Z_node), -inf at states that the variable does not have.
    """

    root: Float[Tensor, "components latents"]
    transition: Float[Tensor, "nodes components latents latents"]
    emission: Float[Tensor, "nodes components states latents"]


@dataclass(frozen=True)
class Upward:
    """What the upward pass leaves.

    Attributes:
        log_prob: log-probability of the observed part, in nats, float64.
        likelihood: u_v, largest entry 1, ``(nodes, components, batch, latents)``.
        message: m_v in the same scale; the root's is not used.
        component: posterior of (component, Z_root), ``(components, batch, latents)``.
    """

    log_prob: Float[Tensor, " batch"]
    likelihood: Tensor
    message: Tensor
    component: Tensor


def emitted(
    tree: RootedTree, p: Parameters, states: Int[Tensor, "batch variables"], observed: Tensor | None
) -> Float[Tensor, "nodes components batch latents"]:
    """log p(x_v | z) of every node, 0 where x_v was not observed."""
    variables = torch.tensor(tree.variables, device=states.device)
    x = states.T[variables]
    nodes = torch.arange(len(tree), device=x.device)[:, None, None]
    components = torch.arange(len(p.root), device=x.device)[:, None]
    log_e = p.emission[nodes, components, x[:, None, :]]
    if observed is not None:
        log_e = log_e.masked_fill(~observed.T[variables][:, None, :, None], 0.0)
    return log_e


def upward(
    tree: RootedTree, p: Parameters, states: Int[Tensor, "batch variables"], observed: Tensor | None = None
) -> Upward:
    """One pass from the leaves to the root.

    Args:
        tree: the shape.
        p: the log-probabilities.
        states: values; unobserved entries are ignored.
        observed: mask of the known entries; all, if not given.
    """
    u = emitted(tree, p, states, observed)
    parents = torch.tensor(tree.parents, device=u.device)
    message = torch.empty_like(u)
    scale = torch.zeros(u.shape[1:3], dtype=torch.float64, device=u.device)
    for level in reversed(tree.levels):
        top = u[level].amax(-1, keepdim=True).clamp(min=LOWEST)
        u[level] = (u[level] - top).exp_()
        scale += top[..., 0].double().sum(0)
        if level.start:
            message[level] = u[level] @ p.transition[level].exp().transpose(-1, -2)
            u.index_add_(0, parents[level], message[level].log())
    joint = p.root[:, None, :].double() + u[0].double().log() + scale[..., None]
    log_prob = joint.permute(1, 0, 2).flatten(1).logsumexp(1)
    component = (joint - log_prob.clamp(min=LOWEST)[:, None]).exp().to(u.dtype)
    return Upward(log_prob, u, message, component)


def posteriors(
    tree: RootedTree, p: Parameters, up: Upward
) -> Float[Tensor, "nodes components batch latents"]:
    """p(component, Z_v | observed) of every node."""
    result = torch.empty_like(up.likelihood)
    result[0] = up.component
    parents = torch.tensor(tree.parents, device=result.device)
    for level in tree.levels[1:]:
        ratio = result[parents[level]] / up.message[level].clamp(min=torch.finfo(result.dtype).tiny)
        result[level] = (ratio @ p.transition[level].exp()) * up.likelihood[level]
    return result


def flows(
    tree: RootedTree, p: Parameters, states: Int[Tensor, "batch variables"]
) -> tuple[Parameters, Tensor]:
    """Expected counts theta d log p / d theta, summed over the rows, and the rows' log-probabilities."""
    up = upward(tree, p, states)
    post = posteriors(tree, p, up)
    parents = torch.tensor(tree.parents, device=post.device)
    edges = torch.zeros_like(p.transition)
    for level in tree.levels[1:]:
        ratio = post[parents[level]] / up.message[level].clamp(min=torch.finfo(post.dtype).tiny)
        edges[level] = p.transition[level].exp() * (ratio.transpose(-1, -2) @ up.likelihood[level])
    nodes, components, n_states, _ = p.emission.shape
    x = states.T[torch.tensor(tree.variables, device=states.device)]
    row = torch.arange(nodes * components, device=x.device).view(nodes, components, 1) * n_states + x[:, None]
    leaves = torch.zeros_like(p.emission).flatten(0, 2)
    leaves.index_add_(0, row.flatten(), post.flatten(0, 2))
    return Parameters(post[0].sum(1), edges, leaves.view_as(p.emission)), up.log_prob


def variable_marginals(
    tree: RootedTree, p: Parameters, states: Tensor, observed: Bool[Tensor, "batch variables"]
) -> Float[Tensor, "batch variables states"]:
    """p(x_v = k | observed) of every variable."""
    post = posteriors(tree, p, upward(tree, p, states, observed))
    result = torch.zeros(post.shape[2], len(tree), p.emission.shape[2], dtype=post.dtype, device=post.device)
    for node, variable in enumerate(tree.variables):  # one matrix product each; keeps memory at the result's
        result[:, variable] = torch.einsum("cbm,ckm->bk", post[node], p.emission[node].exp())
    return result / result.sum(-1, keepdim=True).clamp(min=torch.finfo(result.dtype).tiny)


def sample_conditional(
    tree: RootedTree, p: Parameters, states: Tensor, observed: Tensor, generator: torch.Generator
) -> Int[Tensor, "batch variables"]:
    """An exact joint draw given the observed entries: latents from the root down, then the variables."""
    up = upward(tree, p, states, observed)
    batch, latents = states.shape[0], p.root.shape[1]
    rows = torch.arange(batch, device=states.device)
    first = sample_categorical(up.component.permute(1, 0, 2).flatten(1), generator)
    component = first // latents
    z = torch.empty(len(tree), batch, dtype=torch.int64, device=states.device)
    z[0] = first % latents
    parents = torch.tensor(tree.parents, device=states.device)
    for level in tree.levels[1:]:
        nodes = torch.arange(level.start, level.stop, device=states.device)[:, None]
        row = p.transition[nodes, component, z[parents[level]]].exp()
        weight = row * up.likelihood[nodes, component, rows]
        z[level] = sample_categorical(weight / weight.sum(-1, keepdim=True), generator)
    result = states.clone()
    for node, variable in enumerate(tree.variables):
        pmf = p.emission[node, component, :, z[node]].exp()
        draw = sample_categorical(pmf / pmf.sum(-1, keepdim=True), generator)
        result[:, variable] = torch.where(observed[:, variable], states[:, variable], draw)
    return result


def most_probable(
    tree: RootedTree, p: Parameters, states: Tensor, observed: Bool[Tensor, "batch variables"]
) -> Int[Tensor, "batch variables"]:
    """Latents and variables of largest joint probability with the observed entries (max-product)."""
    best, state = p.emission.max(2)
    seen = observed.T[torch.tensor(tree.variables, device=states.device)][:, None, :, None]
    u = torch.where(seen, emitted(tree, p, states, None), best[:, :, None])
    choice = torch.empty(u.shape, dtype=torch.int64, device=u.device)
    for node in range(len(tree) - 1, 0, -1):  # one node at a time: M^2 scores for each row
        message, choice[node] = (p.transition[node][:, None] + u[node][:, :, None]).max(-1)
        u[tree.parents[node]] += message
    latents, rows = p.root.shape[1], torch.arange(len(states), device=states.device)
    first = (p.root[:, None] + u[0]).permute(1, 0, 2).flatten(1).argmax(1)
    component, z = first // latents, torch.empty(u.shape[0], len(states), dtype=torch.int64, device=u.device)
    z[0] = first % latents
    result = states.clone()
    for node, variable in enumerate(tree.variables):
        if node:
            z[node] = choice[node, component, rows, z[tree.parents[node]]]
        result[:, variable] = state[node, component, z[node]]
    return result
