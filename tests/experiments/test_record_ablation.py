"""The script that keeps what an ablation found."""

import importlib.util
import json
import pathlib

import pytest
from made_folders import write_ablation

from moejax.analysis.ablation import analyse

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "launch" / "record_ablation.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("record_ablation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_record_is_kept_and_so_are_words_written_by_hand(script, tmp_path, capsys):
    folder = write_ablation(tmp_path / "made", steps=40)
    file = folder / "ablation.json"
    about = json.loads(file.read_text()) | {
        "python": "3.11.7", "packages": {"jax": "0.10.2", "flax": "1", "optax": "2"},
        "machine": "Linux", "code": {"revision": "0123456789abcdef"},
    }  # fmt: skip
    file.write_text(json.dumps(about))
    kept = script.record(folder, "2026-11-27", tmp_path / "results")
    assert kept == tmp_path / "results" / "made"
    page = (kept / "README.md").read_text()
    for words in ("moejax ablate --workdir=made", "0123456789ab;", "jax 0.10.2", "seeds 0, 1, 2"):
        assert words in page, words
    assert json.loads((kept / "analysis.json").read_text()) == analyse(kept)
    assert (kept / "differences.svg").is_file()
    (kept / "README.md").write_text(page + "\nBias wins.\n")
    script.record(folder, "2026-11-28", tmp_path / "results")
    again = (kept / "README.md").read_text()
    assert again.endswith("Bias wins.\n") and "2026-11-28" in again
    assert again.count(script.HEADING) == 1
