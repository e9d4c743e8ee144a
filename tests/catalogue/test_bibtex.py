"""BibTeX entries: their form, and that every paper of the catalogue gets a sound one."""

import re

import pytest

from paperback import catalogue
from paperback.catalogue.bibtex import entry

ALL = pytest.mark.parametrize("method", catalogue.methods(), ids=lambda method: method.slug)


def test_entry_of_a_journal_paper():
    assert catalogue.find("monotone-dbm").bibtex() == (
        "@article{feng2023monotone,\n"
        "  title = {{Monotone deep Boltzmann machines}},\n"
        "  author = {Feng, Z. and Winston, E. and Kolter, J. Z.},\n"
        "  journal = {Transactions on Machine Learning Research},\n"
        "  year = {2023},\n"
        "  eprint = {2307.04990},\n"
        "  archivePrefix = {arXiv},\n"
        "  url = {https://arxiv.org/abs/2307.04990},\n"
        "}"
    )


@pytest.mark.parametrize(
    ("slug", "kind", "venue_field"),
    [
        ("maskllm", "inproceedings", "booktitle"),
        ("criticality", "book", "publisher"),
        ("povm-transformer", "article", "journal"),
    ],
)
def test_kind_of_entry_follows_the_venue(slug, kind, venue_field):
    text = catalogue.find(slug).bibtex()
    assert text.startswith(f"@{kind}{{")
    assert re.search(rf"^  {venue_field} = {{[^{{}}]+}},$", text, re.MULTILINE)


def test_preprint_has_no_venue():
    text = catalogue.find("survey").bibtex()
    assert text.startswith("@misc{wang2024model,")
    assert not re.search("journal|booktitle|publisher", text)


def test_family_name_of_several_words_stays_whole():
    assert "Liu, A. and Mandt, S. and Van den Broeck, G." in catalogue.find("probabilistic-circuit").bibtex()


def test_key_is_plain_ascii_also_for_accented_names():
    assert catalogue.find("prior-fitted").bibtex().startswith("@inproceedings{muller2022transformers,")


def test_letters_that_latex_cannot_set_become_commands():
    assert r"{{$\gamma$-MoD: Exploring" in catalogue.find("gamma-mod").bibtex()


def test_entry_without_arxiv_leaves_its_fields_out():
    from dataclasses import replace

    text = entry(replace(catalogue.find("monotone-dbm"), arxiv=""))
    assert "eprint" not in text
    assert "url" not in text


@ALL
def test_entry_is_well_formed(method):
    text = method.bibtex()
    assert re.fullmatch(r"@\w+\{[a-z]+\d{4}[a-z0-9]+,\n(  \w+ = \{.+\},\n)+\}", text)
    assert text.count("{") == text.count("}")
    assert not re.search(r"(?<!\\)[&%#_]", text.replace(method.arxiv, ""))
    assert text.count(" and ") == len(method.authors) - 1 + method.title.count(
        " and "
    ) + method.venue_name.count(" and ")


def test_keys_are_unique():
    keys = [method.bibtex().split(",", 1)[0] for method in catalogue.methods()]
    assert len(set(keys)) == len(keys)
