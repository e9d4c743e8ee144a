"""The first codes: centres of k-means of a model's activations.

What takes an activation's place has the scale of LayerNorm's output, 1 in each coordinate, whatever the scale
of the activation was; a trained model falls apart by that alone. Before clustering, the weight and bias of
each LayerNorm are therefore set to the line of least squares from normalised to given activations. They are
trained on from there. (The authors start from 1 and 0, and train for as long as it takes.)
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paperback.errors import DataError
from paperback.explain.codebook_features.inputs import Inputs, batches
from paperback.explain.codebook_features.layer import EPS, CodebookLayer
from paperback.study.progress import Bars
from paperback.training import derive, generator

if TYPE_CHECKING:
    from paperback.explain.codebook_features.model import CodebookModel


@torch.no_grad()
def set_by_kmeans(
    model: CodebookModel, inputs: Inputs, tokens: int, batch_size: int, seed: int, progress: bool
) -> None:
    """See `CodebookModel.init_kmeans`. The activations are those of the model without codebooks."""
    seen = _activations(model, inputs, tokens, batch_size, seed)
    work = [(name, group) for name in model.names for group in range(model.codebook(name).groups)]
    for name, group in Bars(progress).track(work, "k-means", len(work)):
        layer = model.codebook(name)
        if name not in seen:
            raise DataError(f"site {name!r} was not called by the model; leave it out.")
        _fit_scale(layer, seen[name], group)
        u = layer.normalise(seen[name])[:, group]
        if len(u) < layer.n_codes:
            raise DataError(
                f"site {name!r} has {len(u)} activations for {layer.n_codes} codes; give more rows or tokens."
            )
        layer.codes[group] = _centres(u, layer.n_codes, derive(seed, "k-means", name, group)).to(layer.codes)


def _activations(
    model: CodebookModel, inputs: Inputs, tokens: int, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """By site up to so many activations ``(tokens, dim)``, as many of each row of the inputs."""
    rows = len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))
    share = 0
    draw = generator(seed, "k-means tokens")
    seen: dict[str, list[Tensor]] = {name: [] for name in model.names}

    def keep(name: str, x: Tensor, _: Tensor, __: Tensor | None) -> None:
        flat = x.flatten(0, -2)
        seen[name].append(flat[torch.randperm(len(flat), generator=draw)[:share].to(flat.device)])

    with model.disabled(), model.watched(keep):
        for first, part in enumerate(batches(inputs, batch_size)):
            begin = first * batch_size
            share = -(-tokens * (min(begin + batch_size, rows) - begin) // rows)
            model.run(part)
    return {name: torch.cat(found)[:tokens] for name, found in seen.items() if found}


def _fit_scale(layer: CodebookLayer, x: Tensor, group: int) -> None:
    """Set a LayerNorm so that its output is, in least squares, its input: coordinate by coordinate."""
    layer.weight[group], layer.bias[group] = 1.0, 0.0
    z = layer.normalise(x)[:, group].double()
    given = x.double().reshape(len(x), layer.groups, -1)[:, group]
    centred = z - z.mean(0)
    slope = (centred * given).sum(0) / centred.square().sum(0).clamp(min=EPS)
    layer.weight[group] = slope.to(layer.weight)
    layer.bias[group] = (given.mean(0) - slope * z.mean(0)).to(layer.bias)


def _centres(u: Tensor, n: int, seed: int) -> Tensor:
    """Centres of `n` clusters. Where there are fewer different activations, some are doubled."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = MiniBatchKMeans(
            n, batch_size=max(1024, 3 * n), max_iter=10, n_init=1, random_state=seed
        ).fit(u.double().cpu().numpy())
    return torch.from_numpy(clusters.cluster_centers_)
