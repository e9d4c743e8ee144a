"""Random shallow networks and small data for the tests of the prototype network."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from paperback.data import images
from paperback.explain.prototype_rbf import PrototypeNetwork


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other slow small networks down, a hundredfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_network():
    """A network with everything drawn: components in a box, sigmas about 1, reasoning of any shape."""

    def make(seed, *, n_features=2, n_components=6, n_classes=3, spread=2.0, sigma_range=(0.3, 3.0), **rest):
        draws = torch.Generator().manual_seed(seed)
        network = PrototypeNetwork(n_features, n_components, n_classes, **rest)
        low, high = np.log(sigma_range)
        with torch.no_grad():
            network.components.uniform_(-2, 2, generator=draws)
            network.log_sigma.uniform_(low, high, generator=draws)
            network.head.logits.normal_(0, spread, generator=draws)
            if getattr(network.head, "bias", None) is not None:
                network.head.bias.normal_(0, 0.1, generator=draws)
        return network

    return make


@pytest.fixture
def blobs():
    rows, labels = make_blobs(240, centers=4, n_features=3, cluster_std=1.5, random_state=0)
    return rows[:160], labels[:160], rows[160:], labels[160:]


@pytest.fixture(scope="session")
def digits():
    """Training and test rows of the digits in 0..1, float64, with labels."""
    data = images.digits(0, n_val=0)
    parts = (data.train.x, data.test.x)
    train, test = (np.asarray(x.flatten(1), dtype=float) / 16 for x in parts)
    return train, data.train.y.numpy(), test, data.test.y.numpy()
