"""`SavedEstimator`: what gives a scikit-learn estimator `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from paperback.errors import ArtefactError
from paperback.saving.folder import (
    BLOCK,
    CARD,
    CARD_TEMPLATE,
    CONFIG,
    WEIGHTS,
    read_config,
    read_weights,
    replacing,
    survives_json,
    write_config,
)

PARAMETERS, FITTED, ARRAYS = "parameters", "fitted", "arrays"


class SavedEstimator:
    """Gives a scikit-learn estimator `save_pretrained` and `from_pretrained`.

    Put it before `BaseEstimator` in the bases. What is saved are the parameters, which must be JSON values,
    and every attribute whose name ends with an underscore: numbers, strings, lists and dictionaries, numpy
    arrays, tensors, and modules. An estimator with modules makes them again in `_build_modules`.
    """

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the fitted estimator to a folder; an older model in that folder is replaced.

        Args:
            folder: it is made when it is not there.

        Raises:
            NotFittedError: if the estimator is not fitted.
            ArtefactError: if the folder holds something that is not a saved model, or a parameter or an
                attribute cannot be written as data.
        """
        check_is_fitted(self)
        name = type(self).__name__
        parameters = self.get_params(deep=False)  # type: ignore[attr-defined]
        for key, value in parameters.items():
            if not survives_json(value):
                raise ArtefactError(
                    f"{name} cannot be saved: {CONFIG} cannot hold its parameter {key!r}; "
                    "use numbers, strings, lists and dictionaries with string keys."
                )
        tensors: dict[str, Tensor] = {}
        fitted: dict[str, Any] = {}
        arrays: dict[str, Any] = {}
        for key, value in vars(self).items():
            if not key.endswith("_") or key.startswith("_"):
                continue
            if survives_json(value):
                fitted[key] = _plain(value)
            elif isinstance(value, nn.Module):
                tensors |= {f"{key}.{part}": tensor for part, tensor in value.state_dict().items()}
            elif isinstance(value, Tensor):
                tensors[key] = value
            elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
                tensors[key] = torch.from_numpy(np.ascontiguousarray(value))
                arrays[key] = None
            elif isinstance(value, np.ndarray) and survives_json(value.tolist()):
                arrays[key] = {"values": value.tolist(), "dtype": value.dtype.str}
            else:
                raise ArtefactError(f"{name} cannot be saved: its attribute {key!r} is a {type(value)}.")
        config = {PARAMETERS: _plain(parameters), FITTED: fitted, ARRAYS: arrays}
        with replacing(Path(folder)) as temporary:
            temporary.mkdir()
            contiguous = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, temporary / WEIGHTS)
            write_config(temporary, config, type(self))
            card = CARD_TEMPLATE.replace("{{ card_data }}", "library_name: paperback")
            (temporary / CARD).write_text(card, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a fitted estimator of this class; nothing in the folder is run.

        Args:
            folder: what `save_pretrained` wrote.

        Returns:
            The estimator.

        Raises:
            ArtefactError: if the folder is not a whole saved estimator of this class.
        """
        path = Path(folder)
        config = read_config(path, path)
        saved = config[BLOCK]["class"].rpartition(":")[2]
        if saved != cls.__name__:
            raise ArtefactError(
                f"{path} holds a {saved}, not a {cls.__name__}; paperback.load finds the class by itself."
            )
        tensors = read_weights(path, path, config[BLOCK])
        try:
            for key in {*config[FITTED], *config[ARRAYS], *(name.partition(".")[0] for name in tensors)}:
                if not key.endswith("_") or key.startswith("_"):
                    raise ValueError(f"{key!r} is no fitted attribute")
            estimator = cls(**config[PARAMETERS])
            for key, value in config[FITTED].items():
                setattr(estimator, key, value)
            for key, array in config[ARRAYS].items():
                if array is None:
                    setattr(estimator, key, tensors.pop(key).numpy())
                else:
                    setattr(estimator, key, np.array(array["values"], dtype=array["dtype"]))
            estimator._restore(tensors)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtefactError(f"{path} does not fit a {cls.__name__}: {error}; save it again.") from error
        return estimator

    def _build_modules(self) -> Mapping[str, nn.Module]:
        """Modules among the fitted attributes, by name, with any weights; all else is in place already."""
        return {}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Set tensors and modules."""
        modules = self._build_modules()
        for name, module in modules.items():
            prefix = f"{name}."
            own = {key[len(prefix) :]: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
            dtypes = {tensor.dtype for tensor in own.values() if tensor.is_floating_point()}
            if len(dtypes) == 1:
                module.to(dtypes.pop())
            module.load_state_dict(own)
            setattr(self, name, module.eval().requires_grad_(False))
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


def _plain(value: Any) -> Any:
    """The value with numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
