"""The augmentation graph: overlap, spectrum, features, Nystroem, labelling error."""

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components

from paperback.data.augment import Augment, Views
from paperback.errors import DataError
from paperback.represent.adaptive_inflation import augmentation_graph, disc_overlap, view_overlap
from paperback.represent.adaptive_inflation.graph import graph_of


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    return np.stack([4.0 * labels, np.zeros(80)], 1) + 0.4 * rng.normal(size=(80, 2)), labels


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.1, 1.9])
def test_disc_overlap_against_monte_carlo(distance):
    rng = np.random.default_rng(1)
    n, radius = 400_000, 1.0
    angle, length = rng.uniform(0, 2 * np.pi, n), radius * np.sqrt(rng.uniform(size=n))
    view = np.stack([length * np.cos(angle), length * np.sin(angle)], 1)  # of a point at the origin
    inside = np.linalg.norm(view - [distance, 0], axis=1) < radius
    # int A(x|0) A(x|d) dx is the mean of A(x|d) over views of the first point.
    estimate, error = inside.mean() / np.pi, inside.std() / np.pi / np.sqrt(n)
    assert abs(disc_overlap(distance, radius) - estimate) <= 4 * error + 1e-12


def test_disc_overlap_ends():
    assert disc_overlap(2.0, 1.0) == 0
    assert disc_overlap(5.0, 1.0) == 0
    assert disc_overlap(0.0, 0.5) == pytest.approx(1 / (np.pi * 0.25))


def test_the_spectrum(points):
    x, _ = points
    for radius in (0.1, 0.2, 0.4, 1.0, 3.0):
        graph = augmentation_graph(x, radius, k=80)
        assert len(graph.eigenvalues) == 80
        assert graph.eigenvalues[0] == pytest.approx(0, abs=1e-9)
        assert (np.diff(graph.eigenvalues) >= -1e-9).all()
        assert graph.eigenvalues[-1] <= 2
        parts = connected_components(graph.weights)[0]
        assert (graph.eigenvalues < 1e-9).sum() == parts
        direct = _laplacian_values(graph)
        assert np.allclose(graph.eigenvalues, direct, atol=1e-9)


def _laplacian_values(graph):
    p, w = graph.probabilities, graph.weights
    scale = np.sqrt(p / (w @ p))
    return np.linalg.eigvalsh(np.eye(len(w)) - scale[:, None] * w * scale[None])


def test_part_of_a_spectrum_with_other_probabilities(points):
    x, _ = points
    p = np.random.default_rng(0).dirichlet(np.full(80, 3.0))
    for radius, k in ((0.3, 3), (0.3, 30), (1.5, 5)):
        graph = augmentation_graph(x, radius, probabilities=p, k=k)
        assert np.allclose(graph.eigenvalues, _laplacian_values(graph)[: k + 1], atol=1e-9)
        assert np.allclose(graph.vectors.T @ graph.vectors, np.eye(k + 1), atol=1e-8)


def test_more_augmentation_connects_more(points):
    found = [augmentation_graph(points[0], r, k=3).lambda_after(3) for r in (0.1, 0.3, 0.5, 1.0, 2.0, 3.0)]
    assert found == sorted(found)
    assert found[0] == 0 < found[-1]


def test_features_minimise_the_spectral_contrastive_loss(points):
    x, _ = points
    graph, k = augmentation_graph(x, 0.6, k=80), 5
    p, w = graph.probabilities, graph.weights
    scale = np.sqrt(p / (w @ p))
    adjacency = torch.tensor(scale[:, None] * w * scale[None])
    f = torch.tensor(graph.features(k) * np.sqrt(p)[:, None], requires_grad=True)

    def loss(f):
        return -2 * torch.trace(f.T @ adjacency @ f) + (f @ f.T).square().sum()

    value = loss(f)
    value.backward()
    assert f.grad.abs().max() < 1e-9
    assert value.item() == pytest.approx(-((1 - graph.eigenvalues[:k]) ** 2).sum())
    for seed in range(3):
        away = f.detach() + 0.1 * torch.randn(f.shape, generator=torch.Generator().manual_seed(seed))
        assert loss(away) > value


def test_nystroem_gives_the_features_of_the_points_themselves(points):
    x, _ = points
    p = np.random.default_rng(0).dirichlet(np.full(80, 3.0))
    for radius in (0.3, 1.0):
        graph = augmentation_graph(x, radius, probabilities=p, k=6)
        assert np.allclose(graph.transform(x, 6), graph.features(6), atol=1e-8)
    assert np.array_equal(graph.transform(np.array([[100.0, 100.0]]), 6), np.zeros((1, 6)))


def test_labelling_error(points):
    x, labels = points
    margin = min(np.linalg.norm(a - b) for a in x[labels == 0] for b in x[labels == 1])
    assert augmentation_graph(x, 0.49 * margin).labelling_error(labels) == 0
    assert augmentation_graph(x, margin).labelling_error(labels) > 0
    all_alike = graph_of(np.ones((4, 4)))
    assert all_alike.labelling_error([0, 0, 1, 1]) == pytest.approx(0.5)
    assert all_alike.labelling_error([0, 0, 0, 0]) == 0


def test_more_parts_than_vectors_are_drawn_by_seed(points):
    x, _ = points
    first, again, other = (augmentation_graph(x, 0.05, k=3, seed=s) for s in (0, 0, 1))
    assert np.array_equal(first.vectors, again.vectors)
    assert not np.allclose(first.vectors, other.vectors)
    p, w = first.probabilities, first.weights
    scale = np.sqrt(p / (w @ p))
    adjacency = scale[:, None] * w * scale[None]
    assert np.allclose(adjacency @ first.vectors, first.vectors)


# -- images --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clothes():
    from paperback.data import images

    train = images.fashion_mnist(120, n_val=1000).train
    return train.x[:, None].float() / 255, train.y


def test_view_overlap_against_a_loop(clothes):
    x = clothes[0][:6]
    augment, h = Views.of("weak").first, 0.2
    weights = view_overlap(x, augment, views=3, bandwidth=h, seed=1)
    draws = torch.Generator().manual_seed(1)
    sets = []
    for _ in range(3):
        flat = augment(x, draws).flatten(1).double()
        centred = flat - flat.mean(1, keepdim=True)
        sets.append(centred / centred.norm(dim=1, keepdim=True))
    for i in range(6):
        for j in range(6):
            pairs = [
                float(torch.exp(-((sets[a][i] - sets[b][j]).norm() ** 2) / (4 * h * h)))
                for a in range(3)
                for b in range(3)
                if i != j or a != b
            ]
            assert weights[i, j] == pytest.approx(np.mean(pairs), rel=1e-3, abs=1e-6)


def test_stronger_augmentation_connects_images_and_mixes_classes(clothes):
    x, y = clothes
    weak, strong = (
        augmentation_graph(x, augment=Views.of(name).first, k=10) for name in ("weak", "standard")
    )
    assert weak.lambda_after(10) < strong.lambda_after(10)
    assert weak.labelling_error(y) < strong.labelling_error(y)


def test_images_that_never_meet_are_parts_of_their_own():
    x = torch.eye(16).view(16, 1, 4, 4)
    graph = augmentation_graph(x, augment=Augment(noise=0.5), bandwidth=1e-3, k=16)
    assert np.allclose(graph.eigenvalues, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: augmentation_graph(x), "exactly one"),
        (lambda x: augmentation_graph(x, 1.0, augment=Augment()), "exactly one"),
        (lambda x: augmentation_graph(x, -1.0), "radius"),
        (lambda x: augmentation_graph(x[:1], 1.0), "2 to"),
        (lambda x: augmentation_graph(np.zeros((5000, 2)), 1.0), "4,000"),
        (lambda x: augmentation_graph(np.zeros((5, 3)), 1.0), "points"),
        (lambda x: augmentation_graph(x, 1.0, probabilities=np.ones(80)), "sum to 1"),
        (lambda x: augmentation_graph(x, 1.0, k=3).lambda_after(4), "k is 4"),
        (lambda x: augmentation_graph(x, 1.0, k=3).labelling_error([0, 1]), "labels"),
        (lambda x: augmentation_graph(x, 1.0, k=3).transform(x, 9), "k is 9"),
        (lambda x: graph_of(np.ones((3, 3)), k=2).transform(x, 1), "weights alone"),
        (lambda x: augmentation_graph(torch.zeros(5, 1, 4, 4), augment=Augment()), "equal to another"),
        (lambda x: augmentation_graph(torch.rand(5, 1, 4, 4), augment=Augment(), views=1), "views"),
        (lambda x: augmentation_graph(torch.rand(5, 2, 4, 4), augment=Augment()), "channels"),
    ],
)
def test_what_does_not_fit(call, words, points):
    with pytest.raises(DataError, match=words):
        call(points[0])
