"""What an optimisation has evaluated, and what it needs to go on as if it had never stopped."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paperback.errors import ArtefactError, DataError

FORMAT = 1


@dataclass
class History:
    """Points and their values, in the order in which they were told.

    Args:
        X: ``(n, features)``, in the units of the problem.
        Y: ``(n, outputs)``; NaN where an evaluation failed.
        asked: how often points were asked for.
        pending: points that were asked for and not told yet, ``(m, features)``.
        variances: what the surrogate chose of its hyper-parameters when it last chose, name to value.
        seconds: of every `ask`, fitting and acquisition together.
    """

    X: NDArray[np.float64]
    Y: NDArray[np.float64]
    asked: int = 0
    pending: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    variances: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, features: int) -> History:
        """One without points."""
        return cls(np.zeros((0, features)), np.zeros((0, 0)), pending=np.zeros((0, features)))

    def __len__(self) -> int:
        return len(self.X)

    def best(self) -> tuple[NDArray[np.float64], float]:
        """The point with the largest value, of one output, and that value.

        Raises:
            DataError: if there is no value yet or there are several outputs.
        """
        values = self._single()
        if not np.isfinite(values).any():
            raise DataError("no evaluation has succeeded yet; tell the optimizer a finite value first.")
        index = int(np.nanargmax(values))
        return self.X[index], float(values[index])

    def best_so_far(self) -> NDArray[np.float64]:
        """Running maximum after each evaluation, ``(n,)``; -infinity before the first success."""
        values = self._single()
        return np.maximum.accumulate(np.where(np.isfinite(values), values, -np.inf))

    def hypervolume(self, ref_point: ArrayLike) -> NDArray[np.float64]:
        """Volume dominated after each evaluation, ``(n,)``, of several outputs to be maximised.

        Args:
            ref_point: ``(outputs,)``; a point counts where it is better in every output.
        """
        import torch
        from botorch.utils.multi_objective.hypervolume import Hypervolume
        from botorch.utils.multi_objective.pareto import is_non_dominated

        reference = torch.as_tensor(np.asarray(ref_point, dtype=np.float64))
        measure, volumes = Hypervolume(reference), []
        Y = torch.as_tensor(self.Y)
        front = Y[:0]
        for y in Y:
            if bool(y.isfinite().all()):
                front = torch.cat([front, y[None]])
                front = front[is_non_dominated(front)]
            volumes.append(float(measure.compute(front)) if len(front) else 0.0)
        return np.array(volumes)

    def save(self, path: str | Path) -> None:
        """Write the history as JSON; a file of that name is replaced in one step."""
        path = Path(path)
        values = [[None if not np.isfinite(y) else y for y in row] for row in self.Y.tolist()]
        content: dict[str, Any] = {
            "format": FORMAT,
            "X": self.X.tolist(),
            "Y": values,
            "asked": self.asked,
            "pending": self.pending.tolist(),
            "variances": self.variances,
            "seconds": self.seconds,
            "features": self.X.shape[1],
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what `save` wrote.

        Raises:
            ArtefactError: if the file is missing, damaged or of another format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ArtefactError(
                    f"{path} has format {content['format']}, not {FORMAT}; start a new history."
                )
            features = content["features"]
            Y = np.array(
                [[np.nan if y is None else y for y in row] for row in content["Y"]], dtype=np.float64
            )
            X, pending = (
                np.array(content[key], dtype=np.float64).reshape(-1, features) for key in ("X", "pending")
            )
            if len(X) != len(Y):
                raise ValueError(f"{len(X)} points and {len(Y)} values")
            return cls(
                X,
                Y if len(Y) else np.zeros((0, 0)),
                int(content["asked"]),
                pending,
                {str(key): float(value) for key, value in content["variances"].items()},
                [float(each) for each in content["seconds"]],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path} is not a whole history ({error}); start a new one.") from error

    def _single(self) -> NDArray[np.float64]:
        if len(self.Y) and self.Y.shape[1] != 1:
            raise DataError(
                f"there are {self.Y.shape[1]} outputs and no single best; ask for the hypervolume."
            )
        return self.Y.reshape(-1)
