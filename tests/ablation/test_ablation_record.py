"""An ablation's files: other versions, and damage."""

import json

import pytest

from moejax.ablation import record
from moejax.ablation.record import Folder
from moejax.config import UserError


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("ablation.json", {"format": 2}, "has format 2, not 1"),
        ("ablation.json", {"spec": None}, "lacks spec"),
        ("plan.json", {"tuning": None}, "lacks tuning"),
    ],
)
def test_a_folder_of_another_version_is_one_line(tmp_path, name, change, words):
    values = {field: {} for field in record.NEEDED[name]} | {"format": record.FORMAT}
    (tmp_path / name).write_text(json.dumps(values))
    assert Folder(tmp_path).read(name) == values
    values |= change
    kept = {field: value for field, value in values.items() if value is not None}
    (tmp_path / name).write_text(json.dumps(kept))
    with pytest.raises(UserError, match=words):
        Folder(tmp_path).read(name)


def test_a_damaged_line_of_the_results_is_named(tmp_path):
    folder = Folder(tmp_path)
    folder.append({"id": "a", "status": "completed"})
    folder.append({"id": "b", "status": "failed"})
    assert [row["id"] for row in folder.results()] == ["a", "b"]
    path = tmp_path / "results.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 is damaged"):
        folder.results()
