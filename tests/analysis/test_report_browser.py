"""A report as a reader sees it: Chromium, both themes, wide, narrow and on paper."""

import io
import json
import pathlib
import re
import time

import browser
import pytest
from made_folders import metrics, write_ablation, write_evaluation, write_inspection, write_run
from matplotlib import image

from moejax.analysis.report import command

pytestmark = pytest.mark.slow
WIDTHS = (1280, 375)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("browser")
    run = write_run(folder / "run", lines=metrics(80), sample="x = " + "y" * 400)
    write_inspection(run)
    write_evaluation(run, "a_name_that_is_never_broken" * 3)
    long = {"none": "a variant with a name of many words, and_one_that_is_never_broken" * 2}
    ablation = write_ablation(folder / "ablation", steps=40, names=long)
    write_inspection(ablation / "runs" / "bias-s0-10240")
    made = {"run": [str(run)], "ablation": [str(ablation)], "set": [str(ablation / "runs")]}
    return {
        kind: pathlib.Path(command.report(places, output=str(folder / f"{kind}.html"))["output"])
        for kind, places in made.items()
    }


@pytest.fixture(scope="module")
def chromium():
    browser.needed()
    with browser.browser() as found:
        yield found


BOXES = """[...document.querySelectorAll('figure svg')].map(s => {
  const r = s.getBoundingClientRect(); return [r.width, r.height, r.left, r.right];
})"""
OVER = """[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.scroll, pre, svg')) return false;
  const r = e.getBoundingClientRect();
  return r.width > 0 && (r.right > innerWidth + 1 || r.left < -1);
}).map(e => e.outerHTML.slice(0, 120))"""
COLOURS = """[getComputedStyle(document.body).backgroundColor,
  getComputedStyle(document.body).color,
  getComputedStyle(document.querySelector('svg text')).fill,
  getComputedStyle(document.querySelector('svg .curve')).stroke]"""


@pytest.mark.parametrize("kind", ["run", "set", "ablation"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_its_figures_are_drawn(chromium, pages, kind, width, tmp_path):
    with chromium.open(pages[kind], width) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVER) == []
        boxes = page.evaluate(BOXES)
        drawn = len(re.findall("<svg ", pages[kind].read_text()))
        assert len(boxes) == drawn >= 5
        assert all(w > 200 and h > 50 and right <= width for w, h, _, right in boxes)
        columns = 1 if width < 600 else 2
        assert max(w for w, *_ in boxes) < width / columns
        # Wide tables scroll within themselves; a narrow window has some.
        scrolled = page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth)"
            ".length"
        )
        assert width > 600 or scrolled > 0
        # What is written within a figure can be read in a narrow window, too.
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text:not(.small)')].map(t => "
            "parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))"
        )
        assert smallest >= 9
        shot = image.imread(io.BytesIO(page.screenshot(tmp_path / "page.png")))
        assert shot.shape[1] == width and shot.shape[0] > 2000
        assert len({tuple(p) for p in shot[::7, ::7].reshape(-1, shot.shape[2]).tolist()}) > 50
        assert page.requests == [pages[kind].as_uri()] and page.complaints == []


def test_themes(chromium, pages, tmp_path):
    with chromium.open(pages["run"]) as page:
        light = page.evaluate(COLOURS)
        bright = image.imread(io.BytesIO(page.screenshot(tmp_path / "light.png", whole=False)))
        page.theme(True)
        dark = page.evaluate(COLOURS)
        dim = image.imread(io.BytesIO(page.screenshot(tmp_path / "dark.png", whole=False)))
        assert all(a != b for a, b in zip(light, dark, strict=True))
        assert bright[..., :3].mean() > 0.85 and dim[..., :3].mean() < 0.25
        # The checkbox turns either over, without a script.
        page.evaluate("document.getElementById('theme').click()")
        assert page.evaluate(COLOURS) == light
        page.theme(False)
        assert page.evaluate(COLOURS) == dark


def test_paper(chromium, pages, tmp_path):
    with chromium.open(pages["ablation"], dark=True) as page:
        data = page.pdf(tmp_path / "page.pdf")
        assert data.startswith(b"%PDF-") and len(re.findall(rb"/Type /Page\b", data)) > 3
        page.call("Emulation.setEmulatedMedia", media="print",
                  features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
        ground, text, *_ = page.evaluate(COLOURS)
        assert ground == "rgb(255, 255, 255)" and text == "rgb(27, 31, 36)"
        hidden = "getComputedStyle(document.querySelector('.toggle')).display"
        assert page.evaluate(hidden) == "none"
        # What is folded away on a screen is there on paper.
        shown = page.evaluate(
            "[...document.querySelectorAll('details:not([open]) table')]"
            ".map(table => table.checkVisibility())"
        )
        assert shown and all(shown)


def test_no_script_runs_whatever_the_page_holds(chromium, pages, tmp_path):
    """The page's policy holds even if markup should come through one day."""
    spoilt = tmp_path / "spoilt.html"
    hole = "<script>document.title='broken'</script><img src='https://example.org/x.png'></main>"
    spoilt.write_text(pages["run"].read_text().replace("</main>", hole))
    with chromium.open(spoilt) as page:
        assert page.evaluate("document.title") != "broken"
        assert len(page.requests) == 1 or page.blocked == ["csp"]
        assert any("Content Security Policy" in text for text in page.complaints)


@pytest.fixture(scope="module")
def hundred(tmp_path_factory) -> tuple[dict, float]:
    """The report of 100 runs of 10,000 logged steps, and the seconds of this process it took."""
    folder = tmp_path_factory.mktemp("hundred") / "runs"
    lines = metrics(10_000)
    first = write_run(folder / "run0", steps=10_000, lines=lines)
    for i in range(1, 100):
        run = write_run(folder / f"run{i}", steps=10_000, seed=i % 5, lines=b"{}\n",
                        bias_step=(1 + i // 5) / 1000)  # fmt: skip
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").hardlink_to(first / "metrics.jsonl")
    begun, used = time.monotonic(), time.process_time()
    result = command.report([str(folder)])
    wall, used = time.monotonic() - begun, time.process_time() - used
    print(json.dumps({"wall": wall, "processor": used, "bytes": result["bytes"]}))
    return result, used


def test_a_hundred_long_runs(hundred):
    """Under 30 s, of the processor since other tests may run beside this one, and under 20 MB."""
    result, used = hundred
    assert result["runs"] == 100 and used < 30
    assert result["bytes"] < 20e6 and pathlib.Path(result["output"]).stat().st_size < 20e6


def test_a_hundred_long_runs_are_shown(chromium, hundred):
    result, _ = hundred
    with chromium.open(pathlib.Path(result["output"]), 375) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert len(page.evaluate(BOXES)) >= 5
