"""Explanations add up, show the largest first, and draw tables, images and text."""

import numpy as np
import pytest

from paperback.errors import DataError, NotSupportedError
from paperback.explain import ExplainableClassifier, Explanation

RNG = np.random.default_rng(0)


def explanation(n_classes=2, **rest):
    contributions = RNG.normal(size=(3, n_classes, 4))
    offsets = RNG.normal(size=(3, n_classes))
    settings = {
        "classes": np.array(["a", "b", "c"])[:n_classes],
        "scores": contributions.sum(-1) + offsets,
        "contributions": contributions,
        "offsets": offsets,
        "parts": [f"part {k}" for k in range(4)],
        "inputs": RNG.normal(size=(3, 9)),
    }
    return Explanation(**(settings | rest))


@pytest.mark.parametrize("top", [None, 1, 2, 4, 9])
def test_the_lines_of_a_table_add_up_to_its_last(top):
    found = explanation()
    for row in range(3):
        for class_ in ("a", "b"):
            table = found.table(row, class_, top=top)
            assert table["part"].iloc[-1] == "score"
            np.testing.assert_allclose(table["contribution"][:-1].sum(), table["contribution"].iloc[-1])
            sizes = table["contribution"][: min(top or 4, 4)].abs()
            assert (sizes.diff().dropna() <= 0).all()


def test_the_prediction_has_the_greatest_score_and_the_runner_up_the_next():
    found = explanation(n_classes=3)
    for row in range(3):
        order = found.scores[row].argsort()[::-1]
        assert found.prediction[row] == found.classes[order[0]]
        assert found.runner_up(row) == found.classes[order[1]]
    assert found.table(1)["contribution"].iloc[-1] == found.scores[1].max()


@pytest.mark.parametrize(
    "rest",
    [
        {"columns": tuple("abcdefghi")},
        {"kind": "image", "image_shape": (3, 3), "pictures": {"part 1": np.ones(9)}},
        {"kind": "text", "inputs": [["the", "word"], ["a"], []]},
    ],
)
def test_every_kind_of_row_is_drawn(rest, tmp_path):
    found = explanation(**rest)
    figure = found.plot(0, top=2)
    figure.savefig(tmp_path / "figure.png")
    bars = figure.axes[1]
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == found.table(0, top=2)["part"][:-1].tolist()
    np.testing.assert_allclose(
        [bar.get_width() for bar in bars.patches], found.table(0, top=2)["contribution"][:-1]
    )


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"scores": np.zeros((3, 2))}, "add up to"),
        ({"scores": np.full((3, 2), np.nan)}, "add up to"),
        ({"parts": ["one"]}, "do not fit"),
        ({"classes": ["a"]}, "do not fit"),
        ({"inputs": np.zeros((2, 9))}, "do not fit"),
    ],
)
def test_what_does_not_add_up_is_no_explanation(rest, message):
    with pytest.raises(DataError, match=message):
        explanation(**rest)


@pytest.mark.parametrize(
    ("row", "class_", "top", "message"),
    [(7, "a", 3, "no row 7"), (0, "z", 3, "no class 'z'"), (0, "a", 0, "at least one")],
)
def test_what_is_not_there_is_named(row, class_, top, message):
    with pytest.raises(DataError, match=message):
        explanation().table(row, class_, top=top)


def test_what_a_method_does_not_have_names_one_that_has():
    class Plain(ExplainableClassifier):
        def explain(self, X):
            return explanation()

    with pytest.raises(NotSupportedError, match="RBFPrototypeClassifier"):
        Plain().certify(np.zeros((1, 2)))
    with pytest.raises(NotSupportedError, match="RBFPrototypeClassifier"):
        Plain().intervene(np.zeros((1, 2)), {})
