"""What the tests of searches share."""

from __future__ import annotations

import pytest

from paperback.search import Float, Integer


@pytest.fixture
def space():
    return {"x": Float(-1.0, 1.0), "n": Integer(1, 4)}


@pytest.fixture(scope="module")
def cluster():
    """A real Ray cluster on this machine, one for each module of tests."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def engine(request):
    """The engine that a test is parametrised with, by name; Ray's cluster is up by then."""
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return request.param
