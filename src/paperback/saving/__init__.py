"""Saving a fitted model to a folder and getting it back.

A saved model is a folder with `model.safetensors` (the tensors) and `config.json`: the constructor's
arguments, and a block "paperback" that names the class, the format, and the SHA-256 of the weights and of the
config itself. `Saved` gives a module `save_pretrained` and `from_pretrained`, on top of
`huggingface_hub.PyTorchModelHubMixin`, so that it can also be pushed to the Hub; `SavedEstimator` gives them
to a scikit-learn estimator. `load` finds the class from the config. It takes only classes of the modules that
the catalogue names and of a wing's baselines, and it runs nothing that stands in the folder: both files are
data. What is damaged, foreign or of another format is refused with an `ArtefactError`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from paperback.saving.estimator import SavedEstimator
from paperback.saving.folder import BLOCK, CONFIG, FORMAT, WEIGHTS, read_config, resolve
from paperback.saving.module import Saved

__all__ = ["BLOCK", "CONFIG", "FORMAT", "WEIGHTS", "Saved", "SavedEstimator", "load"]


def load(folder: str | Path) -> nn.Module | SavedEstimator:
    """Load a model that `save_pretrained` wrote, whatever method it is of. Nothing in the folder is run.

    Args:
        folder: the folder of the model.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        ArtefactError: if the folder is missing, damaged, foreign, of another format, or its class is not one
            of paperback's.
    """
    path = Path(folder)
    cls = resolve(read_config(path, path)[BLOCK]["class"], path, (Saved, SavedEstimator))
    return cls.from_pretrained(path)
