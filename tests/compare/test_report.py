import re
from dataclasses import replace
from html.parser import HTMLParser

from paperback.compare.leaderboard import DataNote
from paperback.compare.report import render

PNG = b"\x89PNG rest"


class Page(HTMLParser):
    """The text, images and outside references of a page."""

    def __init__(self, html):
        super().__init__()
        self.images, self.references, self.text, self.open = [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        self.references += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(board, figure=PNG):
    html = render(board, figure)
    parsed = Page(html)
    assert parsed.open == []
    return html, parsed, " ".join(parsed.text.split())


def test_the_page_needs_nothing_beside_it(make_board, make_row):
    html, parsed, _ = page(make_board([make_row("a", 0.5, 0.6, 0.7)]))
    assert all(reference.startswith("data:image/png;base64,") for reference in parsed.references)
    assert "<script" not in html
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html


def test_the_page_tells_numbers_intervals_failures_and_how_to_load(make_board, make_row):
    board = make_board(
        [make_row("good-one", 0.5, 0.6, 0.7), make_row("lame", "it hung.", "it hung.", "it hung.")]
    )
    _, parsed, text = page(board)
    assert "0.6 0.5 to 0.7" in text
    assert "failed: it hung." in text
    assert "jobs/lame-*/log.txt" in text
    assert 'paperback.load("jobs/good-one-0/artefact/model")' in text
    assert "Intervals are the range over 3 seeds." in text
    assert "contenders against their cost" in parsed.images[0]["alt"]


def test_what_is_indistinct_is_explained_only_where_it_occurs(make_board, make_row):
    near = make_board([make_row("a", 0.1, 0.2, 0.3), make_row("b", 0.2, 0.3, 0.4)])
    far = make_board([make_row("a", 0.1, 0.2, 0.3), make_row("b", 0.7, 0.8, 0.9)])
    assert "2 ≈" in page(near)[2]
    assert "cannot tell the two apart" in page(near)[2]
    assert "≈" not in page(far)[2]


def test_names_from_outside_are_escaped(make_board, make_row):
    evil = "<script>alert(1)</script>"
    board = make_board([make_row("a", 0.5), replace(make_row("b", "broke"), label=evil, reason=evil)])
    html, _, _ = page(replace(board, data=DataNote(evil, evil, evil, evil)))
    assert evil not in html
    assert html.count("&lt;script&gt;") >= 5


def test_a_comparison_that_is_not_finished_says_so(make_board, make_row):
    board = make_board([make_row("a", 0.5)])
    assert "Every job has run." in page(board)[2]
    assert "not finished" in page(replace(board, complete=False))[2]


def test_without_points_and_artefacts_their_parts_are_absent(make_board, make_row):
    _, parsed, text = page(make_board([make_row("a", "it broke.")]), figure=None)
    assert parsed.images == []
    assert not re.search("Pareto|paperback.load", text)
