from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_studies import complete, fake_method

from paperback.study import Run, report
from paperback.study.claim import make_claim
from paperback.study.finding import Failure, Finding


@pytest.fixture(scope="module")
def finding(tmp_path_factory: pytest.TempPathFactory) -> Finding:
    run = Run(
        "fake-complete",
        budget="standard",
        seeds=(0, 1, 2),
        out=tmp_path_factory.mktemp("run"),
        progress=False,
        question="Is <it> so?\n\nAnd why?",
        command="paperback run fake-complete --data 'a b.csv'",
    )
    with pytest.warns(RuntimeWarning):
        complete(run)
    return run.finding("complete")


def page(finding: Finding) -> str:
    assert finding.folder is not None
    return report.render(finding, fake_method("complete"), finding.folder)


class Outline(HTMLParser):
    """The open elements must be closed in order; collects images, links and text."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.urls: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.urls += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


def test_the_page_is_well_formed_and_needs_nothing_beside_it(finding: Finding) -> None:
    parsed = outline(page(finding))
    assert [url for url in parsed.urls if not url.startswith(("data:", "https://arxiv.org/"))] == []
    assert [image["alt"] for image in parsed.images] == ["Two falling lines; Anderson reaches 1e-6 first."]


def test_a_stranger_finds_everything_in_words(finding: Finding) -> None:
    text = re.sub(r"\s+", " ", "".join(outline(page(finding)).text))
    for words in (
        "Fixed Points of Imaginary Machines",
        "Completes images from the pixels that are known",
        "Is <it> so?",
        "2 held",
        "2 did not hold",
        "1 undecided",
        "Measured 0.796, baseline 0.713: the difference is 0.083 (0.080 to 0.086, range over 3 seeds)",
        "it had to be at least 0.04. The whole interval reaches the bar.",
        "undecided at this scale",
        "not a number",
        "The RBM wins on completion",
        "paperback run fake-complete --data 'a b.csv'",
        "Figure 1. Residual against iteration.",
        "Table 1. Accuracy from 40 % of the pixels",
        "8 parameters",
        'paperback.load("model")',
        "@misc{",
        "torch 2",
    ):
        assert words in text, words


def test_what_a_user_wrote_cannot_become_markup(finding: Finding) -> None:
    claim = make_claim("<script>alert(1)</script>", paper="<b>", measured=1.0, at_least=0.0, unit='"><img>')
    html = page(replace(finding, claims=(claim,), notes=("<i>note</i>",)))
    assert "<script" not in html
    assert "<i>note" not in html
    assert len(outline(html).images) == len(finding.figures)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "failed", "failure": Failure("ValueError", "too small")}, "This run failed"),
        ({"status": "interrupted", "claims": ()}, "No claim was reached."),
        ({"claims": ()}, "No claim was made."),
        ({"budget": "quick", "seeds": (0,)}, "This was a quick run with 1 seed."),
        ({"data": "my.csv"}, "other data than the claims are about"),
        ({"figures": (), "tables": (), "models": (), "notes": (), "question": ""}, "What was found"),
    ],
)
def test_every_kind_of_run_has_its_words(finding: Finding, change: dict[str, object], words: str) -> None:
    html = page(replace(finding, **change))  # type: ignore[arg-type]
    outline(html)
    assert words in html


def test_the_log_is_shown_from_its_end(finding: Finding, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    html = report.render(replace(finding, figures=()), fake_method("complete"), tmp_path)
    assert "line 999" in html
    assert "line 500\n" not in html


@pytest.mark.parametrize(
    ("numbers", "order"),
    [
        ({"measured": 1.0, "at_least": 0.0, "interval": (0.5, 2.0)}, ["bar", "low", "value", "high"]),
        ({"measured": 1.0, "at_most": 0.7, "interval": (0.5, 2.0)}, ["low", "bar", "value", "high"]),
        ({"measured": -1.0, "at_least": 0.0}, ["value", "bar"]),
    ],
)
def test_the_strip_keeps_the_order_and_its_edges(numbers: dict[str, object], order: list[str]) -> None:
    strip = report.strip(make_claim("c", paper="", **numbers))  # type: ignore[arg-type]
    assert strip is not None
    places = [getattr(strip, name) for name in order]
    assert places == sorted(places)
    assert 0 < places[0] <= places[-1] < 100
    start, width = strip.right_side
    assert (
        (start == strip.bar and start + width == 100)
        if "at_least" in numbers
        else (start, width) == (0, strip.bar)
    )


def test_there_is_no_strip_where_a_number_is_not_finite() -> None:
    assert report.strip(make_claim("c", paper="", measured=float("nan"), at_least=0.0)) is None
    on_the_bar = report.strip(make_claim("c", paper="", measured=0.0, at_least=0.0))
    assert on_the_bar is not None
    assert on_the_bar.value == on_the_bar.bar == 50
