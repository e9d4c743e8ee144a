import pytest
from fake_bench import BASELINE, HEALTHY, METRICS, contender, evaluate, good, load

from paperback.compare.bench import Bench, bench_of
from paperback.errors import PaperbackError


def test_baselines_are_compared_whatever_methods_are_named():
    assert [c.name for c in HEALTHY.choose(["brisk"])] == ["plain", "brisk"]
    assert [c.name for c in HEALTHY.choose(None)] == ["plain", "sharp", "brisk"]


@pytest.mark.parametrize(
    ("name", "hint"), [("shrap", "did you mean sharp"), ("zzz", "there are plain, sharp, brisk")]
)
def test_an_unknown_method_is_refused_with_close_names(name, hint):
    with pytest.raises(PaperbackError, match=hint):
        HEALTHY.choose([name])


@pytest.mark.parametrize(
    ("metrics", "contenders", "message"),
    [
        (METRICS[1:], (BASELINE,), "primary"),
        ((METRICS[0], METRICS[0]), (BASELINE,), "primary"),
        ((*METRICS, METRICS[1]), (BASELINE,), "two metrics called 'accuracy'"),
        (METRICS, (BASELINE, BASELINE), "two contenders called 'plain'"),
        (METRICS, (contender("sharp", good(1.0, 1.0)),), "no baseline"),
    ],
)
def test_a_bench_that_cannot_rank_is_refused(metrics, contenders, message):
    with pytest.raises(PaperbackError, match=message):
        Bench("density", metrics, contenders, load, evaluate)


def test_the_first_cost_is_what_quality_is_drawn_against():
    assert HEALTHY.primary.name == "loss"
    assert HEALTHY.cost is not None
    assert HEALTHY.cost.name == "fit_seconds"


def test_a_task_is_found_or_refused():
    with pytest.raises(PaperbackError, match="did you mean density"):
        bench_of("densty")
    with pytest.raises(PaperbackError, match="embed cannot be compared yet; what can is"):
        bench_of("embed")
