"""Looking for codes: precision and recall against a mask of tokens; and the best single neuron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.errors import DataError
from paperback.explain.codebook_features.inputs import Inputs, batches

if TYPE_CHECKING:
    import pandas as pd

    from paperback.explain.codebook_features.model import CodebookModel


def count_codes(
    ids: Int[Tensor, "*tokens groups k"], mask: Bool[Tensor, "*tokens"], n_codes: int
) -> tuple[Int[Tensor, "groups codes"], Int[Tensor, "groups codes"]]:
    """At how many tokens each code is active, and at how many of the mask.

    Args:
        ids: codes of every token; -1 is none.
        mask: the tokens that are looked for.
        n_codes: codes of each group.

    Returns:
        Activations and hits.

    Raises:
        DataError: if the mask does not fit the tokens.
    """
    if ids.shape[:-2] != mask.shape or mask.dtype != torch.bool:
        raise DataError(
            f"the mask is {tuple(mask.shape)} of {mask.dtype}, the codes are of {tuple(ids.shape[:-2])} "
            "tokens; give one truth value per token."
        )
    groups = ids.shape[-2]
    flat, looked_for = ids.flatten(0, -3), mask.flatten()
    places = flat + torch.arange(groups, device=ids.device)[:, None] * n_codes
    active = torch.bincount(places[flat >= 0], minlength=groups * n_codes)
    hits = torch.bincount(places[looked_for][flat[looked_for] >= 0], minlength=groups * n_codes)
    return active.view(groups, n_codes), hits.view(groups, n_codes)


def search(
    model: CodebookModel,
    inputs: Inputs,
    mask: Tensor | Mapping[str, Tensor],
    sites: Sequence[str] | None,
    min_recall: float,
    min_precision: float,
    batch_size: int,
) -> Any:
    """See `CodebookModel.search`. Only counts are kept, whatever the number of tokens."""
    masks = {"": mask} if isinstance(mask, Tensor) else dict(mask)
    names = model.names if sites is None else tuple(sites)
    layers = {name: model.codebook(name) for name in names}
    for name, wanted in masks.items():
        if wanted.dtype == torch.bool and not wanted.any():
            raise DataError(f"the mask {name} has no token; look for something that occurs.")
    totals = {
        site: torch.zeros(1 + len(masks), layer.groups, layer.n_codes) for site, layer in layers.items()
    }
    start = 0
    for batch in batches(inputs, batch_size):
        for site, ids in model.codes(batch, batch_size=batch_size).items():
            if site in totals:
                parts = [wanted[start : start + len(ids)].cpu() for wanted in masks.values()]
                counts = [count_codes(ids, part, layers[site].n_codes) for part in parts]
                totals[site] += torch.stack([counts[0][0], *(hits for _, hits in counts)])
        start += len(ids)
    tables = {}
    for place, (name, wanted) in enumerate(masks.items(), 1):
        if start != len(wanted):
            raise DataError(f"the mask has {len(wanted)} rows and the inputs {start}; they must agree.")
        frames = [_table(site, counts[0], counts[place], wanted) for site, counts in totals.items()]
        tables[name] = _sorted(frames, min_recall, min_precision)
    return tables[""] if isinstance(mask, Tensor) else tables


def _sorted(frames: Sequence[pd.DataFrame], min_recall: float, min_precision: float) -> pd.DataFrame:
    import pandas as pd

    table = pd.concat(frames, ignore_index=True)
    table = table[(table["recall"] > min_recall) & (table["precision"] >= min_precision)]
    return table.sort_values(["precision", "recall"], ascending=False, kind="stable", ignore_index=True)


def _table(site: str, active: Tensor, hits: Tensor, mask: Tensor) -> pd.DataFrame:
    import pandas as pd

    wanted, others = int(mask.sum()), int((~mask).sum())
    group, code = (hits > 0).nonzero(as_tuple=True)
    n, h = active[group, code], hits[group, code]
    elsewhere = (n - h) / max(others, 1)
    return pd.DataFrame(
        {
            "site": site,
            "group": group.numpy(),
            "code": code.numpy(),
            "precision": (h / n).numpy(),
            "recall": (h / wanted).numpy(),
            "ratio": (h / wanted / elsewhere).numpy(),
            "hits": h.long().numpy(),
            "activations": n.long().numpy(),
        }
    )


@torch.no_grad()
def report(model: CodebookModel, inputs: Inputs, batch_size: int) -> pd.DataFrame:
    """See `CodebookModel.report`."""
    import pandas as pd

    counts = {
        name: torch.zeros(model.codebook(name).groups, model.codebook(name).n_codes) for name in model.names
    }
    sums = {name: torch.zeros(3, model.codebook(name).groups, dtype=torch.float64) for name in model.names}

    def add(name: str, x: Tensor, out: Tensor, ids: Tensor | None) -> None:
        layer = model.codebook(name)
        if ids is None:
            return
        u = layer.normalise(x)
        error = (out.reshape(u.shape) - u).square().sum(-1).sum(0)
        each = torch.stack((torch.full_like(error, len(u)), error, u.norm(dim=-1).sum(0)))
        sums[name] += each.double().cpu()
        everywhere = torch.ones(ids.shape[:-2], dtype=torch.bool, device=ids.device)
        counts[name] += count_codes(ids, everywhere, layer.n_codes)[0].cpu()

    with model.watched(add):
        for batch in batches(inputs, batch_size):
            model.run(batch)
    lines = []
    for name in model.names:
        layer = model.codebook(name)
        for group, (tokens, error, norm) in enumerate(sums[name].T.tolist()):
            used = int((counts[name][group] > 0).sum())
            lines.append(
                {
                    "site": name,
                    "group": group,
                    "tokens": int(tokens),
                    "used": used,
                    "dead": layer.n_codes - used,
                    "mse": error / max(tokens, 1),
                    "input_norm": norm / max(tokens, 1),
                    "code_norm": float(layer.codes[group].norm(dim=-1).mean()),
                }
            )
    return pd.DataFrame(lines)


# -- single neurons ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neuron:
    """A neuron as a classifier of tokens: active where ``sign * activation >= threshold``.

    Attributes:
        unit: which neuron.
        sign: 1 or -1.
        threshold: of the signed activation.
        precision: of the classifier on the tokens it was chosen on.
        recall: on the same.
    """

    unit: int
    sign: Literal[1, -1]
    threshold: float
    precision: float
    recall: float

    def active(self, activations: Float[Tensor, "*tokens units"]) -> Bool[Tensor, "*tokens"]:
        """At which tokens the neuron is active."""
        return self.sign * activations[..., self.unit] >= self.threshold


def best_neuron(
    activations: Float[Tensor, "*tokens units"], mask: Bool[Tensor, "*tokens"], recall: float
) -> Neuron:
    """The neuron, sign and threshold of the greatest precision among those that reach a recall.

    Args:
        activations: of every neuron at every token.
        mask: the tokens that are looked for.
        recall: least part of the mask that must be met, in (0, 1].

    Returns:
        The best of all neurons and both signs, each with the highest threshold that reaches the recall.

    Raises:
        DataError: if the mask is empty or does not fit, or the recall lies outside (0, 1].
    """
    if activations.shape[:-1] != mask.shape or not mask.any():
        raise DataError(
            f"the mask is {tuple(mask.shape)} with {int(mask.sum())} tokens for activations of "
            f"{tuple(activations.shape[:-1])}; it must fit them and not be empty."
        )
    if not 0 < recall <= 1:
        raise DataError(f"recall is {recall}; it must lie in (0, 1].")
    flat, wanted = activations.flatten(0, -2), mask.flatten()
    signed = torch.cat((flat, -flat), 1)
    positives = signed[wanted]
    needed = max(1, min(len(positives), int(-(-recall * len(positives) // 1))))
    thresholds = positives.kthvalue(len(positives) - needed + 1, dim=0).values
    met = (positives >= thresholds).sum(0)
    precision = met / (signed >= thresholds).sum(0)
    best = int(precision.argmax())
    units = flat.shape[1]
    return Neuron(
        best % units, 1 if best < units else -1, float(thresholds[best]), float(precision[best]),
        float(met[best] / len(positives)),
    )  # fmt: skip
