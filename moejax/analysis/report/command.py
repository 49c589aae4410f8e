"""``moejax report``: flags, checks, and the files that it writes."""

import datetime
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import moejax
from moejax.analysis.report import ablation_page, files, run_page, set_page
from moejax.analysis.report.gather import Subject, gather
from moejax.analysis.report.page import MARK, page
from moejax.analysis.report.warnings import warnings
from moejax.config import UserError
from moejax.training.manifest import write_whole

RESULT = "report.html"
_PAGES = {"run": run_page, "set": set_page, "ablation": ablation_page}
_KICKERS = {
    "run": "Training run", "set": "Set of training runs", "ablation": "Ablation",
}  # fmt: skip

Say = Callable[[str], None]


def report(
    directories: Sequence[str],
    *,
    output: str | None = None,
    figures: str = "none",
    inspect: bool = True,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Writes one HTML file on a run, a set of runs or an ablation; it loads nothing from elsewhere.

    Args:
      directories: a run's folder, an ablation's, a folder of runs, or several runs or such.
      output: the file; None is ``report.html`` in the folder, or here where there are several.
      figures: ``png``, ``svg``, both with a comma, or ``none``: figures as files, too, in a folder
        beside the report that is called after it.
      inspect: let ``moejax inspect`` look at a single run that has a checkpoint and was not looked
        at yet. Of several runs what was measured is shown, and nothing is measured here.
      say: takes lines about what goes on.

    Returns:
      ``output``, ``bytes``, ``kind``, ``runs``, ``figures`` (files) and ``warnings``.

    Raises:
      UserError: folders that hold no run, damaged files, runs of another config version, an output
        that cannot be written. Nothing is written then.
    """
    kinds = _kinds(figures)
    subject = gather(directories)
    target = check_output(_target(output, subject))
    folder = target.with_name(f"{target.stem}_figures")
    if inspect and subject.kind == "run":
        subject = _inspected(subject, directories, say)
    content, charts = build(subject)
    shown = f"--output = {str(target)!r}"
    try:
        write_whole(target, content)
        drawn = files.draw(charts, folder, kinds) if kinds else []
    except OSError as error:
        raise UserError(
            f"{shown}: cannot be written ({error.strerror}); choose another place"
        ) from None
    return {
        "output": str(target),
        "bytes": len(content.encode()),
        "kind": subject.kind,
        "runs": len(subject.runs),
        "figures": [str(path) for path in drawn],
        "warnings": warnings(subject),
    }


def build(subject: Subject) -> tuple[str, list]:
    """The HTML of a report, and its figures."""
    chosen = _PAGES[subject.kind]
    sections, charts = chosen.sections(subject)
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"Made by moejax {moejax.__version__} on {made}. This file is complete in itself."
    content = page(
        subject.title, _KICKERS[subject.kind], chosen.opening(subject), warnings(subject),
        sections, footer,
    )  # fmt: skip
    return content, charts


def format_report(result: dict[str, Any]) -> str:
    """What was written, as text for people."""
    figures = f", {len(result['figures'])} figures as files" if result["figures"] else ""
    number = f"{result['runs']} run{'' if result['runs'] == 1 else 's'}"
    return "\n".join([
        *(f"warning: {line}" for line in result["warnings"]),
        f"{result['output']}   {number}, {result['bytes'] / 1e6:.2f} MB{figures}",
    ])  # fmt: skip


def _kinds(figures: str) -> list[str]:
    wanted = [kind for kind in figures.split(",") if kind]
    if wanted == ["none"]:
        return []
    if not wanted or not set(wanted) <= set(files.KINDS):
        raise UserError(f"--figures = {figures!r}: give png, svg, png,svg or none")
    return list(dict.fromkeys(wanted))


def _target(output: str | None, subject: Subject) -> pathlib.Path:
    if output is not None:
        return pathlib.Path(output)
    return subject.paths[0] / RESULT if len(subject.paths) == 1 else pathlib.Path(RESULT)


def check_output(path: pathlib.Path) -> pathlib.Path:
    """The file, if it can be written: a new one, or a report that is made anew.

    Raises:
      UserError: a folder, another's file, or a place that cannot be written. Nothing is written.
    """
    shown = f"--output = {str(path)!r}"
    if path.is_dir():
        raise UserError(f"{shown}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{shown}: {str(path.parent)!r} is no folder; make it, or choose another")
    try:
        if path.exists() and MARK.encode() not in path.read_bytes()[:4096]:
            raise UserError(f"{shown}: exists and is no report; choose another name")
        # Permissions do not tell of every file system, so it is tried.
        os.rmdir(tempfile.mkdtemp(dir=path.parent))
    except OSError as error:
        raise UserError(
            f"{shown}: cannot be written ({error.strerror}); choose another place"
        ) from None
    return path


def _inspected(subject: Subject, directories: Sequence[str], say: Say) -> Subject:
    """The subject with its run's routers measured, where that can be done and was not."""
    from moejax.analysis.inspect import inspect

    run = subject.runs[0]
    routed = run.config.model.layers("moe")
    if run.inspection is not None or not routed or not run.has_checkpoint:
        return subject
    say(f"inspecting  {run.path}")
    try:
        inspect(str(run.path), say=say)
    except UserError as error:
        say(f"left out: {error}")
        subject.notes.append(f"the routers were not looked at on held-out text: {error}")
        return subject
    return gather(directories)
