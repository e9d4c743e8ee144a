"""The estimators against closed forms, brute force, trusted libraries, and channels of known information."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import mutual_info_score

from paperback.errors import DataError
from paperback.theory.information import (
    ESTIMATORS,
    AdaptiveBins,
    AdaptiveKDE,
    CauchySchwarz,
    FixedBins,
    NearestNeighbours,
    Sample,
    bin_states,
    cs_qmi,
    discrete_mutual_information,
    ebab_edges,
    entropy,
    fixed_edges,
    ksg,
    ksg_with_labels,
    make_estimator,
    median_bandwidth,
    mixture_information,
    number_states,
    subsample,
)

LN2 = math.log(2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- discrete states -----------------------------------------------------------------------------------------


def test_entropy_is_scipys(rng):
    states = rng.integers(0, 7, 500)
    assert entropy(states) == pytest.approx(stats.entropy(np.bincount(states), base=2), abs=1e-12)


def test_information_of_states_is_sklearns(rng):
    a, b = rng.integers(0, 5, 400), rng.integers(0, 3, 400)
    assert discrete_mutual_information(a, b) == pytest.approx(mutual_info_score(a, b) / LN2, abs=1e-12)


def test_miller_madow_corrects_the_bias_of_a_fair_die(rng):
    draws = [rng.integers(0, 32, 100) for _ in range(400)]
    plug_in = np.mean([entropy(d) for d in draws])
    corrected = np.mean([entropy(d, "miller_madow") for d in draws])
    assert plug_in < 5 - 0.15
    assert abs(corrected - 5) < 0.05
    one = draws[0]
    extra = (len(np.unique(one)) - 1) / (2 * len(one) * LN2)
    assert entropy(one, "miller_madow") - entropy(one) == pytest.approx(extra, abs=1e-12)


@given(
    arrays.arrays(np.int64, st.tuples(st.integers(1, 30), st.integers(1, 40)), elements=st.integers(0, 2**20))
)
@settings(max_examples=50, deadline=None)
def test_numbered_states_are_equal_exactly_where_rows_are(table):
    expected = np.unique(table, axis=0, return_inverse=True)[1].ravel()
    found = number_states(table.T)
    assert sorted(set(found.tolist())) == list(range(expected.max() + 1))
    assert len({*zip(found.tolist(), expected.tolist(), strict=True)}) == expected.max() + 1


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.5])
def test_binary_symmetric_channel(flip, rng):
    sent = rng.integers(0, 2, 40_000)
    received = sent ^ (rng.random(40_000) < flip)
    truth = 1 - stats.entropy([flip, 1 - flip], base=2)
    assert discrete_mutual_information(sent, received) == pytest.approx(truth, abs=0.015)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: entropy([]), "states has shape"),
        (lambda: entropy([1, 2], "jackknife"), "correction is 'jackknife'"),
        (lambda: discrete_mutual_information([1, 2], [1]), "a has 2 rows and b 1"),
        (lambda: number_states([]), "no columns"),
    ],
)
def test_states_that_cannot_be_counted(call, says):
    with pytest.raises(DataError, match=says):
        call()


# -- bins ----------------------------------------------------------------------------------------------------

MAPS = [lambda t: t**3, np.expm1, lambda t: np.log1p(50 * t), lambda t: 1e4 * t]


def relu_layer(rng, n=600, d=4):
    return np.maximum(rng.standard_normal((n, d)), 0.0)


def test_bins_hold_equally_many_levels_and_zeros_have_their_own(rng):
    T = relu_layer(rng)
    T[:200] = T[0]  # repeats must not move the edges
    edges = ebab_edges(T, 30)
    assert edges[0] == 0
    assert edges[-1] == T.max()
    assert len(edges) == 32
    levels = np.unique(T[T > 0])
    counts = np.bincount(np.searchsorted(edges[1:-1], levels, side="right"), minlength=31)
    assert counts[0] == 0
    assert counts[1:].max() - counts[1:].min() <= 1
    bins = np.searchsorted(edges[1:-1], T, side="right")
    assert ((bins == 0) == (T == 0)).all()


@pytest.mark.parametrize("change", MAPS)
def test_adaptive_bins_do_not_change_under_increasing_maps(change, rng):
    T, y = relu_layer(rng), rng.integers(0, 2, 600)
    before, after = (AdaptiveBins(low=0.0).estimate(Sample(t, y)) for t in (T, change(T)))
    assert (before.xt, before.ty) == (after.xt, after.ty)
    assert FixedBins(bin_range=(0, 10)).estimate(Sample(T, y)) != FixedBins(bin_range=(0, 10)).estimate(
        Sample(change(T), y)
    )


def test_a_layer_of_negative_values_has_no_bin_for_a_bound(rng):
    T = np.tanh(rng.standard_normal((500, 3)))
    for low in ("auto", -1.000001):
        states = np.searchsorted(ebab_edges(T, 10, low)[1:-1], T, side="right")
        assert set(np.unique(states)) == set(range(1, 11))


def test_few_levels_get_a_bin_each():
    T = np.array([[0.0, 1.0], [2.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    assert number_states(T.astype(int).T).tolist() == bin_states(T, ebab_edges(T, 30)).tolist()


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_a_constant_layer_tells_nothing(value):
    y = np.arange(150) % 2
    for name in ("ebab", "fixed", "akde", "cs_qmi"):
        found = make_estimator(name).estimate(Sample(np.full((150, 3), value), y))
        assert found.xt == pytest.approx(0, abs=1e-9)
        assert found.ty == pytest.approx(0, abs=1e-9)
    assert ebab_edges(np.zeros((5, 2))).tolist() == [0.0]


def test_one_hot_labels_tell_the_label_and_no_more(rng):
    y = rng.integers(0, 3, 500)
    for bins in (AdaptiveBins(), FixedBins()):
        found = bins.estimate(Sample(np.eye(3)[y], y))
        assert found.xt == pytest.approx(entropy(y), abs=1e-12)
        assert found.ty == pytest.approx(entropy(y), abs=1e-12)


def test_repeated_inputs_with_different_activations_leave_information_out(rng):
    ids = np.repeat(np.arange(100), 4)
    T = rng.integers(0, 4, (400, 1)).astype(float)
    noisy = AdaptiveBins().estimate(Sample(T, ids % 2, ids)).xt
    assert noisy == pytest.approx(discrete_mutual_information(ids, T[:, 0]), abs=1e-12)
    assert noisy < entropy(T[:, 0])  # H(T|X) > 0
    same = AdaptiveBins().estimate(Sample(ids[:, None] % 4.0, ids % 2, ids)).xt
    assert same == pytest.approx(2.0, abs=1e-12)


def test_data_processing(rng):
    """A function of the state cannot tell more: coarser and coarser versions of one layer."""
    T = relu_layer(rng, 1000, 3)
    fine = bin_states(T, ebab_edges(T, 30))
    y = (T.sum(1) > 1.2).astype(int)
    told_x, told_y = [entropy(fine)], [discrete_mutual_information(fine, y)]
    for base in (500, 100, 10, 2):
        fine = fine % base
        told_x.append(entropy(fine))
        told_y.append(discrete_mutual_information(fine, y))
    assert told_x == sorted(told_x, reverse=True)
    assert told_y == sorted(told_y, reverse=True)


def test_ranges_of_fixed_bins(rng):
    T = rng.uniform(0, 3, (50, 2))
    assert fixed_edges(T)[[0, -1]].tolist() == [0.0, T.max()]
    assert fixed_edges(np.tanh(T - 1.5))[[0, -1]].tolist() == [-1.0, 1.0]
    assert fixed_edges(T - 9)[[0, -1]].tolist() == [(T - 9).min(), (T - 9).max()]
    assert len(fixed_edges(T, 7, (0, 100))) == 8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, "torch.bfloat16"])
def test_numbers_of_any_kind(dtype, rng):
    T = np.round(4 * relu_layer(rng)) / 4
    given = torch.tensor(T).bfloat16() if dtype == "torch.bfloat16" else (4 * T).astype(dtype)
    expected = bin_states(T, ebab_edges(T))
    assert (
        bin_states(np.asarray(torch.as_tensor(given).double()), ebab_edges(given)).tolist()
        == expected.tolist()
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda T: ebab_edges(T, 1), "n_bins is 1"),
        (lambda T: AdaptiveBins(n_bins=0), "n_bins is 0"),
        (lambda T: fixed_edges(T, 30, (2.0, 1.0)), "bin_range"),
        (lambda T: ebab_edges(T - 1, low=0.0), "low is 0.0, but T goes down to"),
        (lambda T: ebab_edges(np.where(T > 0.5, np.nan, T)), "not finite at"),
        (lambda T: ebab_edges(T[:0]), "T is empty"),
        (lambda T: ebab_edges(T.astype(str)), "give numbers"),
    ],
)
def test_bins_that_cannot_be(call, says, rng):
    with pytest.raises(DataError, match=says):
        call(relu_layer(rng))


# -- kernels -------------------------------------------------------------------------------------------------


def test_far_groups_are_told_apart_by_both_bounds(rng):
    T = 100.0 * np.eye(8)[np.arange(400) % 8]
    found = mixture_information(T, 1.0)
    assert found.lower == pytest.approx(3, abs=1e-9)
    assert found.upper == pytest.approx(3, abs=1e-9)


@pytest.mark.parametrize("d", [1, 2])
def test_bounds_hold_a_gaussian_output_between_them(d, rng):
    """T ~ N(0, v I): I(X; T + noise) = d/2 log2(1 + v / s^2), from enough centres."""
    T = math.sqrt(3.0) * rng.standard_normal((3000, d))
    found = mixture_information(T, 1.0)
    assert found.lower < d / 2 * math.log2(1 + 3.0) < found.upper


def test_bounds_are_those_of_the_formula(rng):
    """Kolchinsky and Tracey's expressions written out, with d and pi in them."""
    T, s2 = rng.standard_normal((40, 3)), 0.2
    squares = ((T[:, None] - T) ** 2).sum(-1)
    d = T.shape[1]

    def mixture_entropy(v):
        log_p = np.log(np.exp(-squares / (2 * v)).mean(1)) - d / 2 * np.log(2 * np.pi * v)
        return d / 2 - log_p.mean()

    of_noise = d / 2 * (np.log(2 * np.pi * s2) + 1)
    upper, lower = mixture_entropy(s2), mixture_entropy(4 * s2) + d / 2 * np.log(0.25)
    found = mixture_information(T, s2)
    assert found.upper == pytest.approx((upper - of_noise) / LN2, abs=1e-10)
    assert found.lower == pytest.approx((lower - of_noise) / LN2, abs=1e-10)


def test_information_within_groups_is_that_of_each_group(rng):
    T, groups = rng.standard_normal((90, 2)), rng.integers(0, 3, 90)
    found = mixture_information(T, 0.3, groups)
    parts = [(mixture_information(T[groups == g], 0.3), (groups == g).mean()) for g in range(3)]
    assert found.within_upper == pytest.approx(sum(p * m.upper for m, p in parts), abs=1e-10)
    assert found.within_lower == pytest.approx(sum(p * m.lower for m, p in parts), abs=1e-10)


def test_chunks_change_nothing(rng, monkeypatch):
    T, groups = rng.standard_normal((300, 2)), rng.integers(0, 3, 300)
    whole = mixture_information(T, 0.3, groups)
    monkeypatch.setattr("paperback.theory.information.mixture._ENTRIES_AT_A_TIME", 7 * 300)
    assert mixture_information(T, 0.3, groups) == pytest.approx(whole, abs=1e-10)


def test_kde_with_noise_as_the_square_of_the_range_has_no_scale(rng):
    T, y = relu_layer(rng), rng.integers(0, 2, 600)
    free, paper = AdaptiveKDE(noise_rule="range2"), AdaptiveKDE()
    assert free.estimate(Sample(37 * T, y)).xt == pytest.approx(free.estimate(Sample(T, y)).xt, abs=1e-9)
    assert abs(paper.estimate(Sample(37 * T, y)).xt - paper.estimate(Sample(T, y)).xt) > 0.1


def test_kde_values_lie_in_their_intervals(rng):
    T, y = relu_layer(rng), rng.integers(0, 3, 600)
    for bound in ("upper", "lower"):
        for ids in (None, np.repeat(np.arange(300), 2)):
            e = AdaptiveKDE(bound=bound).estimate(Sample(T, y, ids))
            assert e.xt_bounds[0] <= e.xt <= e.xt_bounds[1]
            assert e.ty_bounds[0] <= e.ty <= e.ty_bounds[1] <= entropy(y)


def test_kde_of_an_input_that_is_repeated_is_that_of_the_input(rng):
    """Every row twice, with the same id: the mixture and its information are those of the rows once."""
    T, y = relu_layer(rng, 150), rng.integers(0, 2, 150)
    once = AdaptiveKDE().estimate(Sample(T, y))
    twice = AdaptiveKDE().estimate(Sample(np.repeat(T, 2, 0), np.repeat(y, 2), np.repeat(np.arange(150), 2)))
    assert twice.xt == pytest.approx(once.xt, abs=1e-9)
    assert twice.ty == pytest.approx(once.ty, abs=1e-9)


def gram(x, sigma):
    return np.exp(-((x[:, None] - x) ** 2).sum(-1) / (2 * sigma**2))


def test_cs_qmi_is_its_formula(rng):
    x, t = rng.standard_normal((50, 3)), rng.standard_normal((50, 2))
    K, Q, n = gram(x, 1.3), gram(t, 0.7), 50
    ones = np.ones(n)
    expected = (
        np.log(np.trace(K @ Q) / n**2)
        + np.log((ones @ K @ ones) * (ones @ Q @ ones) / n**4)
        - 2 * np.log(ones @ K @ Q @ ones / n**3)
    )
    found = cs_qmi(torch.tensor(x), torch.tensor(t), 1.3, 0.7, normalised=False)
    assert float(found) == pytest.approx(expected, abs=1e-10)


def test_cs_qmi_of_itself_of_a_constant_and_of_independent_rows(rng):
    x = torch.tensor(rng.standard_normal((400, 2)))
    assert float(cs_qmi(x, x)) == pytest.approx(1, abs=1e-9)
    assert float(cs_qmi(x, torch.ones(400, 1).double())) == 0
    independent = [
        np.mean([float(cs_qmi(*torch.tensor(rng.standard_normal((2, n, 1))))) for _ in range(20)])
        for n in (20, 100, 500)
    ]
    assert independent[0] > independent[1] > independent[2] > 0
    assert independent[2] < independent[0] / 5


def test_cs_qmi_has_right_gradients_in_chunks_too(rng, monkeypatch):
    x = torch.tensor(rng.standard_normal((9, 2)), requires_grad=True)
    t = torch.tensor(rng.standard_normal((9, 3)), requires_grad=True)
    for normalised in (True, False):
        assert torch.autograd.gradcheck(lambda a, b, n=normalised: cs_qmi(a, b, 1.0, 0.8, n), (x, t))
    whole = cs_qmi(x, t)
    monkeypatch.setattr("paperback.theory.information.cauchy_schwarz._ENTRIES_AT_A_TIME", 18)
    assert cs_qmi(x, t).item() == pytest.approx(whole.item(), abs=1e-12)
    assert torch.autograd.gradcheck(cs_qmi, (x, t))


def test_median_bandwidth():
    x = torch.tensor([[0.0], [0.0], [1.0], [4.0]])
    assert median_bandwidth(x) == 3.0  # of 1, 1, 3, 4, 4
    assert median_bandwidth(torch.zeros(5, 2)) == 1.0


# -- neighbours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_ksg_finds_gaussian_information(rho, rng):
    x = rng.standard_normal((3000, 1))
    t = rho * x + math.sqrt(1 - rho**2) * rng.standard_normal((3000, 1))
    assert ksg(x, t) == pytest.approx(-0.5 * math.log2(1 - rho**2), abs=0.08)
    both = np.hstack([x, rng.standard_normal((3000, 1))])  # a column that says nothing
    assert ksg(both, t) == pytest.approx(-0.5 * math.log2(1 - rho**2), abs=0.12)


def test_ksg_counts_as_brute_force_does(rng):
    x, t, k = rng.standard_normal((60, 2)), rng.standard_normal((60, 1)), 4
    from scipy.special import digamma

    dx = np.abs(x[:, None] - x).max(-1)
    dt = np.abs(t[:, None] - t).max(-1)
    radius = np.sort(np.maximum(dx, dt), axis=1)[:, k]
    nx, nt = ((d < radius[:, None]).sum(1) - 1 for d in (dx, dt))
    expected = digamma(k) + digamma(60) - (digamma(nx + 1) + digamma(nt + 1)).mean()
    assert ksg(x, t, k) == pytest.approx(expected / LN2, abs=1e-6)


def test_information_with_labels_is_sklearns(rng):
    y = rng.integers(0, 3, 500)
    t = rng.standard_normal((500, 1)) + y[:, None]
    expected = mutual_info_classif(t, y, discrete_features=False, n_neighbors=3, random_state=0)[0]
    assert ksg_with_labels(t, y) == pytest.approx(expected / LN2, abs=1e-6)


def test_classes_of_one_row_are_left_out(rng):
    t = rng.standard_normal((50, 2))
    assert ksg_with_labels(t, np.arange(50)) == 0
    y = np.repeat([0, 1], 25)
    more = np.append(y, 2)
    assert ksg_with_labels(np.vstack([t, t[:1]]), more) == pytest.approx(ksg_with_labels(t, y), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: ksg(x, x[:3]), "x has 10 rows, t 3"),
        (lambda x: ksg(x, x, k=10), "k is 10"),
        (lambda x: ksg_with_labels(x, np.zeros(9, int)), "labels 9"),
        (lambda x: NearestNeighbours(k=0), "k is 0"),
        (lambda x: cs_qmi(torch.tensor(x), torch.tensor(x), sigma_x=0.0), "sigma_x is 0.0"),
        (lambda x: cs_qmi(torch.tensor(x[:1]), torch.tensor(x[:1])), "at least 2"),
        (lambda x: mixture_information(x, -1.0), "noise variance is -1.0"),
        (lambda x: AdaptiveKDE(noise=0), "noise is 0"),
        (lambda x: AdaptiveKDE(noise_rule="min"), "noise_rule"),
        (lambda x: AdaptiveKDE(bound="middle"), "bound"),
        (lambda x: make_estimator("mine"), "choose one of ebab"),
        (lambda x: make_estimator("akde", n_bins=3), "n_bins is no setting"),
        (lambda x: make_estimator(AdaptiveBins(), n_bins=3), "belongs into the estimator"),
        (lambda x: subsample(lambda rows: np.zeros(1), 10, 10), "size is 10 of 10"),
    ],
)
def test_what_cannot_be_estimated(call, says, rng):
    with pytest.raises(DataError, match=says):
        call(rng.standard_normal((10, 1)))


# -- all of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_repeat_leave_their_input_alone_and_state_their_bias(name, rng):
    T, y, x = relu_layer(rng, 200), rng.integers(0, 2, 200), rng.standard_normal((200, 3))
    copies = [a.copy() for a in (T, y, x)]
    estimator = make_estimator(name)
    first, second = (estimator.estimate(Sample(T, y, x=x)) for _ in range(2))
    assert first == second
    assert all((a == b).all() for a, b in zip((T, y, x), copies, strict=True))
    assert len(estimator.bias) > 50
    shuffled = rng.permutation(200)
    again = estimator.estimate(Sample(T, y, x=x).take(shuffled))
    tolerance = 0.2 if name == "ksg" else 1e-9  # the noise that parts equal points is drawn row by row
    assert (again.xt, again.ty) == pytest.approx((first.xt, first.ty), abs=tolerance)


def test_nearest_neighbours_need_vectors_for_the_input(rng):
    found = NearestNeighbours().estimate(Sample(rng.standard_normal((100, 1)), np.arange(100) % 2))
    assert math.isnan(found.xt)


def test_cauchy_schwarz_with_states_for_inputs(rng):
    T, y = rng.standard_normal((100, 2)), np.arange(100) % 2
    found = CauchySchwarz(sigma_t=1.0).estimate(Sample(T, y))
    ids = torch.arange(100.0).double()[:, None]
    assert found.xt == pytest.approx(float(cs_qmi(ids, torch.tensor(T), 0.02, 1.0)), abs=1e-12)


def test_half_samples_spread_as_fresh_samples_do(rng):
    """The standard error of a mean is known: sigma / sqrt(n)."""
    x = rng.standard_normal(2000)
    for size in (1000, 400):
        found = subsample(lambda rows: x[rows].mean(keepdims=True), 2000, size, repeats=300)
        assert found.standard_error[0] == pytest.approx(1 / math.sqrt(2000), rel=0.15)
        assert found.mean[0] == pytest.approx(x.mean(), abs=0.005)
