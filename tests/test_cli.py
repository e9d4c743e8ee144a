"""The command line: what it prints, what it passes on, how it fails, and that listing stays light."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import paperback
import paperback.compare
import paperback.study
from paperback import catalogue
from paperback.cli import app
from paperback.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the harness: every call is recorded as (name, positional, keyword arguments)."""
    recorded = []

    def stand_in(name, result=None):
        def function(*positional, **named):
            recorded.append((name, positional, named))
            return result

        return function

    monkeypatch.setattr(paperback.study, "run_study", stand_in("run_study"))
    monkeypatch.setattr(paperback.study, "verify", stand_in("verify", result=1))
    monkeypatch.setattr(paperback.compare, "compare", stand_in("compare"))
    return recorded


def test_version_is_that_of_the_project():
    assert invoke("--version").stdout.strip() == paperback.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project.get("version", paperback.__version__) == paperback.__version__


def test_list_shows_every_method_once_under_its_task():
    lines = invoke("list").stdout.splitlines()
    listed, task = {}, ""
    for line in lines:
        if heading := re.match(r"([a-z]+)  [A-Z]", line):
            task = heading[1]
        elif row := re.match(r" ?(\d+)  ([\w-]+) +(\d{4})  (.+\.) +(works|not yet|\d+ of \d+ held)", line):
            listed[row[2]] = (int(row[1]), int(row[3]), row[4], task)
    assert listed == {m.slug: (m.number, m.year, m.summary, m.task) for m in catalogue.methods()}
    assert re.match(r"71 of 71 methods listed, \d+ built\.", next(line for line in lines if "listed" in line))


def test_list_by_task_and_words():
    result = invoke("list", "--task", "embed", "--search", "topic")
    assert result.exit_code == 0
    assert "lbl2vec" in result.stdout
    assert "nv-embed" not in result.stdout


def test_list_as_json_holds_all_fields():
    entries = json.loads(invoke("list", "--json", "--task", "density").stdout)
    assert [entry["slug"] for entry in entries] == [
        method.slug for method in catalogue.search(task="density")
    ]
    first = entries[0]
    assert first["authors"] == ["Z. Feng", "E. Winston", "J. Z. Kolter"]
    assert first["available"] is True
    assert entries[1]["available"] is False


def test_list_fits_a_terminal_of_100_columns(monkeypatch):
    from rich.console import Console

    narrow = Console(width=100)
    monkeypatch.setattr("paperback.cli._console", lambda: narrow)
    with narrow.capture() as captured:
        invoke("list")
    assert max(map(len, captured.get().splitlines())) <= 100


def test_search_without_a_hit_is_an_error_for_people_and_an_empty_list_for_programs():
    result = invoke("list", "--search", "no-such-word")
    assert result.exit_code == 2
    assert "no method has the words 'no-such-word'" in result.stderr
    assert json.loads(invoke("list", "--json", "--search", "no-such-word").stdout) == []


def test_show_tells_where_it_is_and_how_to_run_it():
    text = invoke("show", "monotone-dbm").stdout
    for part in (
        "Monotone deep Boltzmann machines",
        "J. Z. Kolter",
        "https://arxiv.org/abs/2307.04990",
        "from paperback.density.monotone_dbm import MonotoneDBM",
        "paperback run monotone-dbm",
        os.path.join("density", "monotone_dbm"),
    ):
        assert part in text


def test_show_of_a_method_that_is_not_there_offers_no_run():
    text = invoke("show", "nv-embed").stdout
    assert "not built" in text
    assert "paperback run" not in text
    assert 'pip install "paperback[llm]"' in text


def test_show_as_json_names_the_files():
    entry = json.loads(invoke("show", "--json", "monotone-dbm").stdout)
    assert entry["number"] == 1
    assert all(Path(path).exists() for path in entry["code"].values())
    assert "recorded" in entry


def test_recorded_claims_are_shown(monkeypatch):
    from paperback.study.claim import make_claim
    from paperback.study.finding import Environment, Finding

    claims = (
        make_claim(
            "classifies [better]", paper="91 %", measured=[0.9, 0.92], baseline=[0.8, 0.81], at_least=0.03
        ),
        make_claim("one fixed point", paper="", measured=0.5, at_most=0.1),
    )
    environment = Environment(versions={}, commit="abc1234", platform="Linux", cpus=2, memory_bytes=1)
    finding = Finding(
        slug="monotone-dbm",
        question="",
        status="complete",
        failure=None,
        budget="standard",
        seeds=(0, 1),
        data=None,
        command="",
        started="2026-01-02T03:04:05+00:00",
        seconds=61.0,
        peak_memory_bytes=1,
        environment=environment,
        claims=claims,
    )
    monkeypatch.setattr("paperback.cli._recorded", lambda method: finding if method.number == 1 else None)
    shown = invoke("show", "monotone-dbm").stdout
    assert re.search(r"Recorded on 2026-01-02: 2 seeds, 1 min 01 s, commit abc1234", shown)
    assert re.search(r"held +classifies \[better\]", shown)
    assert re.search(r"0\.91\S* against 0\.8\d*; bar: difference at least 0\.03; paper: 91 %", shown)
    assert re.search(r"did not hold +one fixed point", shown)
    assert re.search(r"monotone-dbm .* 1 of 2 held", invoke("list").stdout)
    assert json.loads(invoke("list", "--json").stdout)[0]["verdicts"] == {"held": 1, "did not hold": 1}
    assert json.loads(invoke("show", "--json", "monotone-dbm").stdout)["recorded"]["seeds"] == [0, 1]


def test_cite_prints_the_entry():
    assert invoke("cite", "mamba").stdout == catalogue.find("mamba").bibtex() + "\n"


@pytest.mark.parametrize("command", ["show", "cite"])
def test_unknown_method_is_one_sentence_and_exit_code_2(command):
    result = invoke(command, "monotone_dbm")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "paperback: there is no method 'monotone_dbm'; did you mean monotone-dbm?\n"


def test_run_passes_its_options_on(calls, tmp_path):
    result = invoke(
        "run", "monotone-dbm", "--budget", "smoke", "--seeds", "3", "--data", "a.csv", "--target", "price",
        "--out", str(tmp_path), "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0
    assert calls == [
        (
            "run_study",
            ("monotone-dbm",),
            {
                "budget": "smoke",
                "seeds": 3,
                "data": Path("a.csv"),
                "target": "price",
                "out": tmp_path,
                "progress": False,
            },
        )
    ]


def test_run_leaves_the_seeds_to_the_study_unless_told(calls):
    invoke("run", "monotone-dbm")
    ((_, _, named),) = calls
    assert (named["budget"], named["seeds"], named["progress"]) == ("quick", None, True)


def test_verify_exits_with_its_verdict(calls):
    assert invoke("verify", "monotone-dbm", "--record").exit_code == 1
    invoke("verify")
    assert [(positional, named["budget"], named["record"]) for _, positional, named in calls] == [
        ((["monotone-dbm"],), "standard", True),
        ((None,), "standard", False),
    ]


def test_compare_passes_its_options_on(calls):
    result = invoke(
        "compare", "density", "--methods", "monotone-dbm, rbm", "--seeds", "2", "--engine", "ray:auto",
        "--jobs", "4", "--time-limit", "60", "--memory-limit", "1.5", "--model", "m:f", "--estimate",
    )  # fmt: skip
    assert result.exit_code == 0
    ((_, positional, named),) = calls
    assert positional == ("density",)
    assert named["methods"] == ["monotone-dbm", "rbm"]
    assert (named["seeds"], named["engine"], named["jobs"]) == (2, "ray:auto", 4)
    assert (named["time_limit"], named["memory_limit"]) == (60.0, 1.5)
    assert (named["model"], named["estimate"], named["progress"]) == ("m:f", True, True)


def test_compare_refuses_an_unknown_task_before_anything_starts(calls):
    result = invoke("compare", "densty")
    assert result.exit_code == 2
    assert "did you mean density?" in result.stderr
    assert calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "monotone-dbm", "--seeds", "2"),
        ("verify", "monotone-dbm", "--record"),
        ("compare", "density", "--methods", "rbm", "--time-limit", "5"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_calls_fit_the_functions_that_they_call(calls, arguments, monkeypatch):
    invoke(*arguments)
    ((name, positional, named),) = calls
    monkeypatch.undo()
    function = getattr(paperback.compare if name == "compare" else paperback.study, name)
    inspect.signature(function).bind(*positional, **named)


def test_errors_of_the_user_end_without_a_traceback(calls, monkeypatch):
    def refuse(*positional, **named):
        raise DataError("prices.csv has no column 'prize'; did you mean 'price'?")

    monkeypatch.setattr(paperback.study, "run_study", refuse)
    result = invoke("run", "monotone-dbm")
    assert result.exit_code == 2
    assert result.stderr == "paperback: prices.csv has no column 'prize'; did you mean 'price'?\n"


def test_errors_of_ours_are_not_hidden(calls, monkeypatch):
    def fail(*positional, **named):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(paperback.study, "run_study", fail)
    assert isinstance(invoke("run", "monotone-dbm").exception, ZeroDivisionError)


def test_ctrl_c_is_one_line_and_exit_code_130():
    script = """
        import time
        import paperback.study
        from paperback.cli import app
        def run_study(*positional, **named):
            print("started", flush=True)
            time.sleep(60)
        paperback.study.run_study = run_study
        app(["run", "monotone-dbm"])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "paperback: interrupted.\n")


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["show", "monotone-dbm"], ["cite", "mamba"], ["--help"]]
)
def test_reading_commands_import_nothing_heavy(arguments):
    script = f"""
        import atexit, sys
        heavy = {{"torch", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "transformers"}}
        loaded = lambda: sorted(heavy & {{name.partition(".")[0] for name in sys.modules}})
        atexit.register(lambda: print("heavy:", *loaded()))
        from paperback.cli import app
        app({arguments!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].strip() == "heavy:"


def test_load_is_found_at_the_top_of_the_package():
    from paperback.saving import load

    assert paperback.load is load
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        paperback.laod  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    script = "import sys, paperback; print(*({'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
