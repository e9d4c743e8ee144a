"""Recorded results: ``results/<slug>.json`` in the repository is the finding of the standard run.

Its figures are kept in ``results/figures/<slug>/``. Reading imports no torch. Writing takes nothing but a
complete standard run on the shipped data.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

from paperback.errors import ArtefactError, PaperbackError
from paperback.study.encoding import write_atomically
from paperback.study.finding import FIGURES, Finding


def checkout() -> Path | None:
    """The root of the checkout that this package runs from; None if it is installed elsewhere."""
    root = Path(__file__).resolve().parents[3]
    return root if _is_ours(root) else None


def results_folder() -> Path | None:
    """``results/`` of the checkout that this package runs from, or else of that around the working directory.

    Returns:
        The folder, which need not exist yet; None outside a checkout.
    """
    here = Path.cwd()
    root = checkout() or next((folder for folder in (here, *here.parents) if _is_ours(folder)), None)
    return root / "results" if root is not None else None


def read(slug: str) -> Finding | None:
    """The recorded finding of a method, or None if there is none.

    Raises:
        ArtefactError: if the file is damaged or of another method.
    """
    results = results_folder()
    path = results / f"{slug}.json" if results is not None else None
    if path is None or not path.exists():
        return None
    try:
        finding = Finding.from_json(path.read_text(encoding="utf-8"), source=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}).") from error
    if finding.slug != slug:
        raise ArtefactError(f"{path} holds the finding of {finding.slug}; it was renamed or copied by hand.")
    return replace(finding, folder=path.parent)


def check_recordable(finding: Finding) -> None:
    """Raise unless a finding may become the record of its method.

    Raises:
        PaperbackError: if it is not a complete standard run on the shipped data with at least one claim.
    """
    reasons = (
        (finding.status != "complete", f"the run {finding.outcome}"),
        (finding.budget != "standard", f"its budget is {finding.budget}"),
        (finding.data is not None, f"it ran on {finding.data} instead of the data that ships"),
        (not finding.claims, "it made no claim"),
    )
    for applies, reason in reasons:
        if applies:
            raise PaperbackError(
                f"{finding.slug} cannot be recorded: {reason}; record a complete standard run."
            )


def write(slug: str, finding: Finding) -> Path:
    """Make a finding the record of its method, with its figures in ``results/figures/<slug>/``.

    Args:
        slug: of the method.
        finding: as `run_study` returned it, with its folder.

    Returns:
        The file written.

    Raises:
        PaperbackError: if the finding may not be recorded, is of another method, or there is no checkout to
            record it in.
    """
    check_recordable(finding)
    if finding.slug != slug:
        raise PaperbackError(f"this is the finding of {finding.slug}; it cannot be recorded for {slug}.")
    results = results_folder()
    if results is None:
        raise PaperbackError("results are recorded in a checkout of paperback; run this inside one.")
    results.mkdir(exist_ok=True)
    _keep_figures(finding, results / FIGURES / slug)
    path = results / f"{slug}.json"
    write_atomically(path, finding.to_json())
    return path


def _keep_figures(finding: Finding, target: Path) -> None:
    """Copy the figures into a folder of their own, then put it in place of the old one."""
    if finding.folder is None:
        raise PaperbackError(
            f"the finding of {finding.slug} has no folder with figures; pass what run_study returned."
        )
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for figure in finding.figures:
        shutil.copyfile(finding.folder / FIGURES / f"{figure.name}.png", fresh / f"{figure.name}.png")
    if target.exists():
        shutil.rmtree(target)
    os.replace(fresh, target)


def _is_ours(root: Path) -> bool:
    """Whether a folder is a checkout of paperback, by the name in its pyproject.toml."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False
    return bool(project.get("name") == "paperback" and (root / "src" / "paperback").is_dir())
