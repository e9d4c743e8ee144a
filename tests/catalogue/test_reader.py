"""The reader of the catalogue: what it finds, what it refuses."""

import subprocess
import sys
from importlib.resources import files

import pytest

from paperback import catalogue
from paperback.catalogue import TASKS
from paperback.catalogue.reader import Method, parse
from paperback.errors import DataError, MissingExtraError, NotSupportedError, PaperbackError

TEXT = files("paperback.catalogue").joinpath("methods.toml").read_text(encoding="utf-8")


def test_methods_come_in_the_order_of_their_numbers():
    assert [method.number for method in catalogue.methods()] == list(range(1, 72))


def test_order_in_the_file_does_not_matter():
    head, *entries = TEXT.split("[[methods]]")
    shuffled = "[[methods]]".join([head, *reversed([f"{entry.rstrip()}\n\n" for entry in entries])])
    assert parse(shuffled) == catalogue.methods()


def test_find_returns_the_method_of_that_name():
    method = catalogue.find("monotone-dbm")
    assert (method.number, method.module) == (1, "paperback.density.monotone_dbm")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("monotone_dbm", "monotone-dbm"),
        ("dbm", "monotone-dbm"),
        ("MaskLLM", "maskllm"),
        ("mamba2", "mamba"),
        ("sparce-cbm", "sparse-cbm"),
        ("pointer network", "pointer-network"),
    ],
)
def test_unknown_name_suggests_the_one_that_was_meant(typed, meant):
    with pytest.raises(PaperbackError, match=rf"no method '{typed}'; did you mean .*\b{meant}\b"):
        catalogue.find(typed)


def test_name_like_nothing_points_to_the_list():
    with pytest.raises(PaperbackError, match="`paperback list` shows all"):
        catalogue.find("xyzzy")


def test_search_wants_every_word_in_any_order_and_case():
    one = catalogue.search("Transformer quantum")
    assert one == catalogue.search("QUANTUM  transformer")
    assert "povm-transformer" in {method.slug for method in one}
    assert set(one) == set(catalogue.search("transformer")) & set(catalogue.search("quantum"))


@pytest.mark.parametrize(
    ("words", "slug"),
    [
        ("gumbel", "maskllm"),
        ("vinyals", "pointer-network"),
        ("N2N Learning", "n2n"),
        ("bayesian optimization", "bnn-surrogate"),
    ],
)
def test_search_reads_keywords_authors_titles(words, slug):
    assert slug in {method.slug for method in catalogue.search(words)}


def test_search_by_task_splits_the_catalogue():
    by_task = [catalogue.search(task=task) for task in TASKS]
    assert all(by_task)
    assert sorted(method.number for group in by_task for method in group) == list(range(1, 72))


def test_search_without_a_hit_is_empty():
    assert catalogue.search("no-such-word") == ()


def test_unknown_task_is_refused():
    with pytest.raises(PaperbackError, match="did you mean density"):
        catalogue.search(task="densty")
    with pytest.raises(PaperbackError, match="the tasks are density, bayes"):
        catalogue.check_task("cooking")


def _replaced(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_replaced("number = 3\n", ""), r"entry \? \(povm-transformer\) of methods.toml lacks number"),
        (
            _replaced("number = 3\n", "number = 2\n"),
            "entry 2 stands twice .* world-model and povm-transformer",
        ),
        (
            _replaced("number = 71\n", "number = 72\n"),
            r"entry 72 \(sharp-darts\).* has a number outside 1..71",
        ),
        (_replaced('"world-model"', '"maskllm"'), r"entry 2 \(maskllm\).*does not agree"),
        (_replaced('task = "explain"', 'task = "explane"'), "unknown task 'explane'"),
        (
            _replaced("year = 2023", 'year = "2023"'),
            r"entry 1 \(monotone-dbm\).*year = '2023'; it must be int",
        ),
        (_replaced('needs = ["bayes"]', 'needs = "bayes"'), "needs = 'bayes'; it must be a list of strings"),
        (
            _replaced('needs = ["bayes"]', 'needs = ["cuda"]'),
            "unknown extra; they are bayes, explain, llm, optuna, ray",
        ),
        (_replaced('reference = "locuslab', 'code = "locuslab'), "unknown field code; the fields are number"),
        (_replaced('arxiv = "2404.17350"', 'arxiv = "arXiv:2404.17350"'), "arxiv = 'arXiv:2404.17350'"),
        (_replaced('venue = "CAI"', 'venue = "IEEE CAI"'), "venue 'IEEE CAI', which is not in"),
        (_replaced('"Z. Feng"', '"Zhili Feng"'), 'each as "A. Surname"'),
        (_replaced('["Z. Feng", "E. Winston", "J. Z. Kolter"]', "[]"), "must name its authors"),
        (_replaced("monotone_dbm:MonotoneDBM", "monotone_dbm.MonotoneDBM"), '"module:name"'),
        (
            _replaced('study = "paperback.density.studies.monotone_dbm:study"\n', ""),
            "only one of object and study",
        ),
        (_replaced("year = 2023", "year = true"), "year = True; it must be int"),
        (
            _replaced('"CAI" = ["inproceedings",', '"CAI" = ["poster",'),
            "venue CAI of methods.toml must be a list",
        ),
        (TEXT.rpartition("[[methods]]")[0], "lacks entry 71"),
        (TEXT + "\n[[methods]", "not valid TOML"),
    ],
)
def test_wrong_entry_is_named(text, message):
    with pytest.raises(DataError, match=message):
        parse(text)


def test_slug_given_twice_is_named():
    head, *entries = TEXT.split("[[methods]]")
    entries[1] = entries[0].replace("number = 1\n", "number = 2\n")
    with pytest.raises(DataError, match=r"slug monotone-dbm stands twice .* entries 1 and 2"):
        parse("[[methods]]".join([head, *entries]))


def test_method_without_arxiv_is_read():
    assert parse(_replaced('arxiv = "2404.17350"', 'arxiv = ""'))[1].arxiv == ""


def _method(**changes) -> Method:
    values = {
        "number": 1,
        "slug": "fake",
        "title": "A Fake",
        "authors": ("A. Nobody",),
        "year": 2020,
        "venue": "arXiv",
        "arxiv": "",
        "task": "density",
        "module": "paperback.density.fake",
        "summary": "Does nothing.",
        "keywords": ("fake",),
    }
    return Method(**(values | changes))


def test_load_imports_the_object_and_the_study():
    method = _method(object="fractions:Fraction", study="math:gcd")
    assert method.available
    assert method.load()(1, 2) == 0.5
    assert method.load_study()(4, 6) == 2


def test_method_that_is_not_there_says_so():
    with pytest.raises(NotSupportedError, match="fake is not built yet"):
        _method().load()
    with pytest.raises(NotSupportedError, match="no study to import"):
        _method().load_study()


def test_missing_extra_is_named_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "needs_something.py").write_text("import no_such_package.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    needy = _method(object="needs_something:thing", needs=("bayes",))
    with pytest.raises(
        MissingExtraError, match=r'package no_such_package, .* `pip install "paperback\[bayes\]"`'
    ):
        needy.load()
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        _method(object="needs_something:thing").load()


def test_reading_the_catalogue_imports_no_method_and_no_heavy_package():
    code = (
        "import sys; from paperback import catalogue; catalogue.methods(); catalogue.search('dbm');"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', 'rich'}),"
        "*[name for name in sys.modules if name.startswith('paperback.density')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
