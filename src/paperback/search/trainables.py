"""A trainable for ordinary supervised training: a model, an optimizer, a loss, and loaders.

Settings are mapped to where they act by their names. A plain name is an option of the optimizer's parameter
groups ("lr", "weight_decay"; "betas.0" is the first of a pair). A name with a dot is an attribute of a
module: "features.drop.p" by its path in the model, "dropout.p" of all modules of the class Dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from paperback.errors import DataError
from paperback.search.parameters import Config
from paperback.training import seeded

Loss = Callable[[nn.Module, Any], Tensor]


class TorchTrainable:
    """Trains a model by gradient descent; a step is some optimizer steps and an evaluation.

    Population training takes what makes trainables, so give it ``functools.partial(TorchTrainable, ...)``.

    The order of the rows and everything else that is random in an epoch come from the seed of the setup and
    the number of the epoch or step, and not from the state: a member that copies another goes on with random
    numbers of its own.

    Args:
        model: makes a new model.
        optimizer: makes the optimizer of some parameters, such as ``lambda p: torch.optim.SGD(p, lr=0.1)``;
            settings then take the place of its options.
        loss: ``loss(model, batch)``, a scalar, the mean over the rows.
        train: batches to train with; a map-style data set, without a generator of its own.
        validation: batches to evaluate with.
        steps: of the optimizer in one step of the trainable, >= 1.
        metrics: further numbers to evaluate, of the same form as the loss.
        device: where to train.

    Raises:
        DataError: if the loaders or steps cannot be used.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        loss: Loss,
        train: DataLoader[Any],
        validation: DataLoader[Any],
        *,
        steps: int = 100,
        metrics: Mapping[str, Loss] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if steps < 1:
            raise DataError(f"steps is {steps}; it is at least 1.")
        _check_loader(train)
        self._make_model, self._make_optimizer = model, optimizer
        self._loss, self._metrics = loss, {"loss": loss, **(metrics or {})}
        self._train, self._validation = train, validation
        self._steps, self._device = steps, torch.device(device)

    def setup(self, config: Config, seed: int) -> None:
        """Begin with new weights.

        Raises:
            DataError: if a setting acts on nothing.
        """
        self.seed = seed
        with seeded(seed, "weights"):
            self.model = self._make_model().to(self._device)
        self.optimizer = self._make_optimizer(self.model.parameters())
        self.calls, self.epoch, self.position = 0, 0, 0
        self._batches: Iterator[Any] | None = None
        self.reconfigure(config)

    def step(self) -> dict[str, float]:
        """Make some optimizer steps, and evaluate.

        Returns:
            score (minus the validation loss), loss, the other metrics, and train_loss, the mean over these
            steps.
        """
        self.model.train()
        total = 0.0
        with seeded(self.seed, "step", self.calls):
            for _ in range(self._steps):
                loss = self._loss(self.model, self._next_batch())
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                total += float(loss.detach())
        self.calls += 1
        found = self.evaluate(self._validation)
        return {"score": -found["loss"], **found, "train_loss": total / self._steps}

    def evaluate(self, loader: DataLoader[Any]) -> dict[str, float]:
        """The loss and the other metrics over all rows of a loader.

        Raises:
            DataError: if it is empty.
        """
        self.model.eval()
        rows, sums = 0, dict.fromkeys(self._metrics, 0.0)
        with seeded(self.seed, "evaluate"), torch.no_grad():
            for batch in loader:
                batch = _to(batch, self._device)
                n = _rows(batch)
                rows += n
                for name, metric in self._metrics.items():
                    sums[name] += n * float(metric(self.model, batch))
        if rows == 0:
            raise DataError("the validation loader has no rows; give it some.")
        return {name: value / rows for name, value in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, the optimizer's state, and how far the training is."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.calls, self.epoch, self.position),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with the options of its optimizer."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.calls, self.epoch, self.position = state["progress"]
        self._batches = None

    def reconfigure(self, config: Config) -> None:
        """Apply settings to the live optimizer and model; momenta stay.

        Raises:
            DataError: if a setting acts on nothing.
        """
        for name, value in config.items():
            apply_setting(self.model, self.optimizer, name, value)

    def _next_batch(self) -> Any:
        """The next batch of the epoch, or the first of the next one."""
        if self._batches is None:
            self._batches = self._rest_of_epoch()
        batch = next(self._batches, None)
        if batch is None:
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._rest_of_epoch()
            batch = next(self._batches)
        self.position += 1
        return _to(batch, self._device)

    def _rest_of_epoch(self) -> Iterator[Any]:
        """Batches that are left of the epoch; those before are not read again."""
        loader = self._train
        with seeded(self.seed, "epoch", self.epoch):
            order = list(loader.batch_sampler)  # type: ignore[arg-type]
            rest = DataLoader(
                loader.dataset,
                batch_sampler=order[self.position :],
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
                pin_memory=loader.pin_memory,
                worker_init_fn=loader.worker_init_fn,
            )
            return iter(rest)


def apply_setting(model: nn.Module, optimizer: Optimizer, name: str, value: Any) -> None:
    """Set an option of all parameter groups, or an attribute of a module.

    Args:
        model: whose modules a name with a dot may mean.
        optimizer: whose options a name may mean.
        name: see the module's docstring.
        value: to set.

    Raises:
        DataError: if there is nothing of this name.
    """
    option, _, place = name.partition(".")
    groups = [group for group in optimizer.param_groups if option in group]
    if groups and (not place or place.isdecimal()):
        for group in groups:
            group[option] = _with_entry(group[option], int(place), value, name) if place else value
        return
    path, _, attribute = name.rpartition(".")
    modules = _modules(model, path) if path else []
    found = [module for module in modules if isinstance(getattr(module, attribute, None), Real)]
    if not found:
        options = [key for key in optimizer.param_groups[0] if key != "params"]
        paths = [path for path, _ in model.named_modules() if path]
        raise DataError(
            f"the setting {name!r} acts on nothing: the optimizer's options are {', '.join(options)}, and "
            f"the model's modules are {', '.join(paths) or 'none'}; name an option, or module.attribute."
        )
    for module in found:
        setattr(module, attribute, value)


def _modules(model: nn.Module, path: str) -> list[nn.Module]:
    """The module at a path; without one, all modules of a class of this name, in lower case."""
    named = dict(model.named_modules())
    if path in named:
        return [named[path]]
    return [module for module in named.values() if type(module).__name__.lower() == path]


def _with_entry(values: Any, place: int, value: Any, name: str) -> tuple[Any, ...]:
    """A pair such as betas with one of its numbers changed."""
    if not isinstance(values, tuple | list) or place >= len(values):
        raise DataError(f"the setting {name!r} names an entry that the option {values!r} does not have.")
    return (*values[:place], value, *values[place + 1 :])


def _check_loader(loader: DataLoader[Any]) -> None:
    """Refuse loaders whose order could not be had again after a stop."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise DataError("train is a loader of a stream; use a data set with a length, and a batch size.")
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if loader.generator is not None or getattr(sampler, "generator", None) is not None:
        raise DataError("train has a generator of its own; leave it out, the trainable seeds the order.")
    if len(loader) == 0:
        raise DataError("train has no batches; give it rows, and drop_last=False if they are few.")


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_to(value, device) for value in batch]
    return batch


def _rows(batch: Any) -> int:
    """Rows of a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(values, list | tuple) or not values:
        raise DataError(f"a batch is a {type(batch).__name__}; use a tensor, or a list or mapping of them.")
    return _rows(values[0])
