"""``moejax report`` on made folders: what it says, what it refuses, and that its HTML is sound."""

import json
import pathlib
import re
import shutil

import pytest
from made_folders import (
    VARIANTS,
    metrics,
    write_ablation,
    write_evaluation,
    write_inspection,
    write_run,
)
from report_pages import MARKUP, Outline, outline, refused, report
from runs import train, write_config

from moejax.analysis.report import card
from moejax.analysis.report.gather import gather
from moejax.analysis.report.run_page import visible
from moejax.analysis.report.set_page import groups_of
from moejax.training import run_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("one") / "first", lines=metrics(60))
    write_inspection(folder)
    write_evaluation(folder)
    return folder


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    folder = write_ablation(tmp_path_factory.mktemp("ablations") / "balance", steps=40)
    write_inspection(folder / "runs" / "bias-s0-10240")
    return folder


@pytest.fixture(scope="module")
def pages(run, ablation, tmp_path_factory):
    """A report of each kind, by kind: its file."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(4):
        router = {} if number < 2 else {"bias_step": 0.02}
        write_run(folder / "several" / f"run{number}", lines=metrics(30), seed=number % 2, **router)
    made = {"run": [run], "ablation": [ablation], "set": [folder / "several"]}
    return {
        kind: pathlib.Path(report(*places, f"--output={folder / kind}.html")["output"])
        for kind, places in made.items()
    }


KINDS = ("run", "set", "ablation")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_sound(pages, kind):
    text = pages[kind].read_text()
    found = Outline(text)
    assert found.headings.count(1) == 1 and found.headings[0] == 1
    steps = [b - a for a, b in zip(found.headings, found.headings[1:], strict=False)]
    assert max(steps) <= 1
    assert len(set(found.ids)) == len(found.ids)
    assert found.targets and set(found.targets) <= set(found.ids)
    for tag, values in found.elements:
        if tag == "svg":
            assert values["role"] == "img" and len(values["aria-label"]) > 10
        if tag == "th":
            assert values["scope"] in ("row", "col")
        if tag == "div" and values.get("class") == "scroll":
            assert values["tabindex"] == "0" and values["aria-label"]
    names = [tag for tag, _ in found.elements]
    assert "script" not in names and names.count("svg") >= 5
    # Nothing is loaded from elsewhere: every address is within the file.
    for _, values in found.elements:
        for key in ("src", "href"):
            assert values.get(key, "#").startswith(("#", "data:"))
    assert "@import" not in text and "url(" not in style(text)
    policies = [v["content"] for tag, v in found.elements if tag == "meta" and "http-equiv" in v]
    assert len(policies) == 1 and "default-src 'none'" in policies[0]
    assert "script" not in policies[0] and "http" not in policies[0]


def style(text: str) -> str:
    return re.search("<style>(.*?)</style>", text, re.S)[1]


def test_a_run_says_what_it_is(pages, run):
    found = outline(pages["run"])
    for part in (
        "The bill", "headline *", "all in", "Learning", "Loss over dollars", "MaxVio by layer",
        "Selection bias, layer 1", "Load over time, layer 3", "Co-activation, layer 2",
        "Domains, layer 1", "library", "Router saturation", "Specialisation by token id",
        "Loss without the best experts", "Model card", "deepseek_v3", "CC0", "123,456", "f" * 64,
        "0123456789abcdef", "jax 0.10.2", "again.py", "def f(x):", "␣return",
        "the router keeps no selection bias", "they rank CPU kernels", f"moejax report {run}",
    ):  # fmt: skip
        assert part in found.text, part


def test_a_run_can_be_run_again_from_its_page(run, tmp_path):
    subject = gather([str(run)])
    path = tmp_path / "again.py"
    path.write_text(card.again(run / "config.json"))
    assert run_config.load(str(path), []) == subject.runs[0].config


def test_a_set_has_groups_with_intervals(pages):
    found = outline(pages["set"])
    assert "4 runs of 2 configs, 2 seeds" in found.text
    for part in ("as run0", "router.bias_step 0.02", "95 % interval", "moejax ablate",
                 "Held-out loss over FLOPs", "MaxVio over tokens"):  # fmt: skip
        assert part in found.text, part


def test_groups_differ_in_more_than_the_seed(tmp_path):
    for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"bias_step": 0.5}}.items():
        write_run(tmp_path / name, lines=metrics(4), **changes)
    groups = groups_of(gather([str(tmp_path)]).runs)
    assert {name: [run.name for run in runs] for name, runs in groups.items()} == {
        "as a": ["a", "b"], "router.bias_step 0.5": ["c"],
    }  # fmt: skip


def test_an_ablation_says_what_it_found(pages):
    found = outline(pages["ablation"])
    for part in (
        "A bias balances without costing loss.", "arXiv 2408.15664", "agrees in direction",
        "Against aux", "better by", "router.bias_step = 0.01", "Multiplier in FLOPs",
        "Reaches aux's loss", "rank CPU kernels", "pooled",
        "of it tuning", "of it failed cells", "step 40: loss nan", "1 cell failed (none-s2-10240)",
        "aux (0.001) lies at the edge", "at the edge", "Held-out loss over dollars",
        "moejax ablate --workdir=balance", "Balance at the end", "are not in the folder",
    ):  # fmt: skip
        assert part in found.text, part
    badges = [values["class"] for tag, values in found.elements
              if tag == "span" and (values.get("class") or "").startswith("badge")]  # fmt: skip
    assert "badge good" in badges and "badge unsure" in badges


def test_an_ablation_kept_without_its_runs(ablation, tmp_path):
    from moejax.analysis.ablation import analyse

    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(ablation / "ablation.json", kept)
    (kept / "analysis.json").write_text(json.dumps(analyse(ablation)))
    result = report(kept)
    assert result["kind"] == "ablation" and result["runs"] == 0
    assert any("there is no bill" in line.lower() for line in result["warnings"])
    text = outline(result["output"]).text
    assert "better by" in text and "none-s2-10240" in text and "No cell failed" not in text
    assert any("1 cell failed" in line for line in result["warnings"])


def test_markup_is_text_everywhere(tmp_path):
    names = {key: f"{MARKUP} {key}" for key in VARIANTS}
    folder = write_ablation(tmp_path / "odd", steps=16, names=names, error=MARKUP, claim=MARKUP)
    run = write_run(tmp_path / f"run {MARKUP.replace('/', '')}", lines=metrics(6), sample=MARKUP,
                    data={"licence": MARKUP, MARKUP: MARKUP, "warning": MARKUP})  # fmt: skip
    write_inspection(run, token=MARKUP, domain=MARKUP)
    write_evaluation(run, MARKUP)
    for place in (folder, run):
        text = pathlib.Path(report(place)["output"]).read_text()
        found = Outline(text)
        assert {"script", "img"}.isdisjoint(tag for tag, _ in found.elements)
        assert not any(key.startswith("on") for _, values in found.elements for key in values)
        assert "alert('x')" in found.text and "<script>" in found.text


def test_control_characters_and_tokens_are_shown(run):
    assert visible(" a\n") == "␣a⏎" and visible("   ") == "␣␣␣" and visible("\t") == "⇥"
    assert visible(" " * 8) == "␣8" and visible("") == ""


def test_figures_as_files(tmp_path):
    rows = [json.loads(line) for line in metrics(20).splitlines()]
    bare = [{k: v for k, v in row.items() if not k.startswith("router/")} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in bare).encode()
    run = write_run(tmp_path / "run", lines=lines)
    output = tmp_path / "page.html"
    result = report(run, f"--output={output}", "--figures=svg,png")
    files = [pathlib.Path(path) for path in result["figures"]]
    names = ("tokens", "model_flops", "seconds", "dollars")
    assert [path.name for path in files] == [
        f"loss-{name}.{kind}" for name in names for kind in ("svg", "png")
    ]
    assert {path.parent for path in files} == {tmp_path / "page_figures"}
    before = [path.read_bytes() for path in files]
    assert all(b"</svg>" in data or data.startswith(b"\x89PNG") for data in before)
    assert [int.from_bytes(data[16:20]) for data in before[1::2]] == [832] * 4  # pixels across
    report(run, f"--output={output}", "--figures=svg,png")
    assert [path.read_bytes() for path in files] == before


def test_nothing_is_inspected_where_it_need_not_be(run, tmp_path, monkeypatch):
    from moejax.analysis import inspect as module

    calls = []
    monkeypatch.setattr(module, "inspect", lambda *a, **k: calls.append(a))
    bare = write_run(tmp_path / "bare", lines=metrics(4))
    report(run)
    report(bare)  # no checkpoint
    (bare / "checkpoints" / "4").mkdir(parents=True)
    report(bare, "--no-inspect")
    assert calls == []
    report(bare)
    assert [call[0] for call in calls] == [str(bare)]


def test_an_inspection_that_cannot_be_made_is_said(tmp_path, capsys):
    bare = write_run(tmp_path / "bare", lines=metrics(4))
    (bare / "checkpoints" / "4").mkdir(parents=True)  # nothing in it
    result = report(bare)
    assert any("were not looked at on held-out text" in line for line in result["warnings"])


def test_warnings_of_runs(tmp_path):
    run = write_run(tmp_path / "leaky", lines=metrics(4), status="failed")
    summary = json.loads((run / "summary.json").read_text())
    summary["leaks"] = ["router x lets later tokens change earlier ones"]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "divergence.json").write_text('{"step": 3}')
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"router/dropped_share": 0.12, "router/dead_experts": 5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "\n".join(report(run)["warnings"])
    for part in ("not complete: failed", "bad at step 3: it was not finite", "Leak: router x",
                 "12.0% of the",
                 "5 of 24 experts were dead", "CPU kernels"):  # fmt: skip
        assert part in said, part


def test_a_run_that_was_killed_has_a_page(tmp_path):
    run = write_run(tmp_path / "killed", lines=b"")
    (run / "summary.json").unlink()
    result = report(run)
    assert any("not complete" in line for line in result["warnings"])
    assert "Loss over" not in outline(result["output"]).text


def test_the_report_lies_where_it_is_wanted(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy")
    assert report(copy)["output"] == str(copy / "report.html")
    assert report(copy)["output"] == str(copy / "report.html")  # made anew over its own
    other = shutil.copytree(run, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert report("copy", "other")["output"] == "report.html"
    assert (tmp_path / "report.html").exists() and other.exists()


@pytest.mark.slow
def test_a_trained_run_is_inspected_and_shown(tmp_path):
    assert train(write_config(tmp_path), tmp_path / "run", "checkpoint.keep_newest=9") == 0
    result = report(tmp_path / "run")
    found = outline(result["output"])
    assert (tmp_path / "run" / "inspect" / "inspect.json").exists()
    for part in ("Routers on held-out text", "Selection bias, layer 1", "MaxVio of held-out text",
                 "Load over time, layer 1", "Router saturation", "Co-activation, layer 1",
                 "Specialisation by token id", "$0.0", "moejax inspect --workdir"):  # fmt: skip
        assert part in found.text, part


# Bad input: one line, status 2, nothing written.


@pytest.fixture
def copy(run, tmp_path):
    return pathlib.Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_missing_run(copy, tmp_path, capsys):
    line = refused(capsys, copy, tmp_path / "none", root=tmp_path)
    assert "none: no such directory" in line


def test_an_empty_directory(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, tmp_path / "empty", root=tmp_path)
    assert "holds no run" in line and "config.json" in line


def test_damaged_files(copy, tmp_path, capsys):
    lines = (copy / "metrics.jsonl").read_bytes().split(b"\n")
    spoilt = {
        "metrics.jsonl": b"\n".join([*lines[:5], b"not json", *lines[5:]]),
        "summary.json": b"[1]",
        "config.json": b"{",
        "inspect/inspect.json": b"{]",
    }
    halves = {"summary.json": b"{}", "inspect/inspect.json": b'{"step": 1}'}
    for name, content in [*spoilt.items(), *halves.items()]:
        good = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        line = refused(capsys, copy, root=tmp_path)
        assert name in line and "restore" in line
        assert name != "metrics.jsonl" or "line 6" in line
        (copy / name).write_bytes(good)


def test_a_run_of_another_config_version(copy, tmp_path, capsys):
    record = json.loads((copy / "config.json").read_text())
    record["config"]["train"]["cosmic_rays"] = 1
    record["code"]["moejax"] = "9.9"
    (copy / "config.json").write_text(json.dumps(record))
    line = refused(capsys, copy, root=tmp_path)
    assert "config.json" in line and "moejax 9.9" in line and "train.cosmic_rays" in line


def test_outputs_that_cannot_be(copy, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("my only copy")
    places = {
        tmp_path / "mine.html": "is no report",
        tmp_path: "is a folder",
        tmp_path / "none" / "report.html": "is no folder",
        pathlib.Path("/proc/report.html"): "cannot be written",
    }
    for place, reason in places.items():
        line = refused(capsys, copy, f"--output={place}", root=tmp_path)
        assert f"--output = '{place}'" in line and reason in line
    assert (tmp_path / "mine.html").read_text() == "my only copy"


@pytest.mark.parametrize("kinds", ["gif", "", "png,none"])
def test_kinds_of_figures_that_are_not(copy, tmp_path, kinds, capsys):
    assert "--figures" in refused(capsys, copy, f"--figures={kinds}", root=tmp_path)


def test_ablations_that_cannot_be_read(ablation, copy, tmp_path, capsys):
    other = shutil.copytree(ablation, tmp_path / "ablation")
    assert "give it alone" in refused(capsys, copy, other, root=tmp_path)
    with open(other / "results.jsonl", "a") as file:
        file.write("damaged\n")
    assert "results.jsonl" in refused(capsys, other, root=tmp_path)
    (other / "results.jsonl").write_text("")
    assert "no cell" in refused(capsys, other, root=tmp_path)
    (other / "results.jsonl").unlink()
    (other / "analysis.json").write_text('{"name": "half"}')
    assert "analysis.json: lacks metric" in refused(capsys, other, root=tmp_path)
