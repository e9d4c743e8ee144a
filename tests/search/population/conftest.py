"""Trainables for the tests of populations, made inside functions, so that workers get them by value."""

import pytest


def make_noisy():
    """A noisy quadratic, whose random numbers are part of its state."""
    import torch

    class Noisy:
        def setup(self, config, seed):
            self.x = torch.full((8,), 3.0, dtype=torch.float64)
            self.momentum = torch.zeros_like(self.x)
            self.random = torch.Generator().manual_seed(seed)
            self.reconfigure(config)

        def step(self):
            noise = torch.randn(8, generator=self.random, dtype=torch.float64)
            self.momentum = 0.5 * self.momentum + self.x + noise
            self.x = self.x - self.lr * self.momentum
            return {"score": -float(self.x.square().sum())}

        def state_dict(self):
            return {"x": self.x, "momentum": self.momentum, "random": self.random.get_state()}

        def load_state_dict(self, state):
            self.x, self.momentum = state["x"], state["momentum"]
            self.random.set_state(state["random"])

        def reconfigure(self, config):
            self.lr = config["lr"]

    return Noisy


def make_faulty(fault):
    """A counter; `fault(config, steps)` may do something to it before each step, or give the score."""

    class Faulty:
        def setup(self, config, seed):
            self.config, self.steps = config, 0

        def step(self):
            self.steps += 1
            score = fault(self.config, self.steps)
            return {"score": self.steps - abs(self.config["x"]) if score is None else score}

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

        def reconfigure(self, config):
            self.config = config

    return Faulty


@pytest.fixture
def noisy():
    return make_noisy()


@pytest.fixture
def faulty():
    return make_faulty
