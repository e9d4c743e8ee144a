"""A small training as a program of its own, for the tests that kill it or launch it in two processes.

Usage: program.py OUT [--checkpoint FOLDER] [--kill-at CALL] [--plain]

It trains twice in a row, as a study would, and writes what came out to OUT.RANK.safetensors and
OUT.RANK.json. With --plain the loss draws nothing and the model has no dropout, so that the number of
processes does not matter.
"""

import argparse
import itertools
import json
import os
import signal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paperback.training import generator, seeded, train

torch.set_num_threads(1)


class Model(nn.Module):
    """Trained by a method that is not forward, with a buffer that changes and a head that is not used."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)]
        extra = [] if plain else [nn.BatchNorm1d(8), nn.Dropout(0.3)]
        self.body = nn.Sequential(layers[0], *extra, *layers[1:])
        self.unused = nn.Linear(2, 2)

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.body(x) - y).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--checkpoint")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    calls = itertools.count(1)

    def loss(model: Model, batch: tuple[Tensor, ...], draws: torch.Generator) -> dict[str, Tensor]:
        if next(calls) == arguments.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch
        if not arguments.plain and model.training:
            x = x * (torch.rand(x.shape, generator=draws) < 0.8)
        return {"loss": model.error(x, y), "size": x.square().mean()}

    draws = generator(0, "data")
    x = torch.randn(45, 4, generator=draws)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(45, 1, generator=draws)
    with seeded(
        int(os.environ.get("RANK", "0")), "weights"
    ):  # processes must agree though they begin differently
        model = Model(arguments.plain)
    settings = {"epochs": 6, "batch_size": 8, "lr": 0.02, "schedule": "one-cycle", "clip_norm": 1.0}
    settings |= {"val_tensors": (x[:11], y[:11]), "gradient_accumulation": 2, "progress": False}
    history = train(model, loss, (x, y), checkpoint=arguments.checkpoint, **settings)
    second = train(model, loss, (x, y), **settings | {"epochs": 2, "keep_best": False})
    rank = os.environ.get("RANK", "0")
    save_file(model.state_dict(), f"{arguments.out}.{rank}.safetensors")
    with open(f"{arguments.out}.{rank}.json", "w") as file:
        json.dump({"first": [history.train_loss, history.val_metric], "second": second.train_loss}, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
