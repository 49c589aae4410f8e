"""The metrics file: strict JSON, nothing torn, nothing twice after a resume."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from moejax.config import UserError
from moejax.training import metrics
from moejax.training.metrics import MetricsError, MetricWriter, read_metrics


def strict(line):
    """Parses JSON that any reader would take: NaN and Infinity are refused."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def events(workdir):
    """All (step, tag, scalar value) in the TensorBoard files, histograms with their count."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # a record: length, its CRC, the event, its CRC
            length = int.from_bytes(data[:8], "little")
            assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                is_histogram = value.HasField("histo")
                number = value.histo.num if is_histogram else value.simple_value
                found.append((event.step, value.tag, number))
            data = data[16 + length :]
    return found


def test_lines_are_strict_json_with_plain_numbers(tmp_path):
    with MetricWriter(tmp_path / "run") as writer:
        assert not (tmp_path / "run").exists(), "nothing before the first write"
        writer.write(
            3,
            {
                "loss": np.float32(1.5),
                "lr": jnp.bfloat16(0.25),
                "tokens": np.int64(2**40),
                "bad": float("nan"),
                "worse": -np.inf,
                "load": jnp.array([[1, 2], [3, jnp.inf]]),
                "nested": [[1, 2], (3.5, None)],
                "dispatch": "blocks\n",
                "early": None,
            },
        )
        (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert strict(line) == {
        "step": 3,
        "loss": 1.5,
        "lr": 0.25,
        "tokens": 2**40,
        "bad": None,
        "worse": None,
        "load": [[1.0, 2.0], [3.0, None]],
        "nested": [[1, 2], [3.5, None]],
        "dispatch": "blocks\n",
        "early": None,
    }
    assert read_metrics(tmp_path / "run") == [strict(line)]


def test_every_line_is_in_the_file_at_once(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    for step in range(1, 4):
        writer.write(step, {"loss": 1 / step})
        assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, step + 1))
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_has_scalars_and_histograms(tmp_path):
    with MetricWriter(tmp_path) as writer:
        values = {
            "loss": 2.5,
            "bad": float("nan"),
            "load": [[1, 2], [3, None, "-", 4]],
            "name": "x",
            "no": [],
        }
        writer.write(7, values)
    assert sorted(events(tmp_path)) == [(7, "load", 4.0), (7, "loss", 2.5)]


def test_reopening_appends(tmp_path):
    for step in (1, 2):
        with MetricWriter(tmp_path) as writer:
            writer.write(step, {"loss": 1.0})
            writer.close()
            writer.write(step, {"val_loss": 2.0})
    assert [list(row) for row in read_metrics(tmp_path)] == [
        ["step", "loss"],
        ["step", "val_loss"],
    ] * 2


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 7):
            writer.write(step, {"loss": step / 10})
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + b'{"step": 7, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    with MetricWriter(tmp_path, resume_step=4) as writer:
        assert path.read_bytes().startswith(before), "nothing changes before the first write"
        writer.write(5, {"loss": 0.5})
        writer.close()
        writer.write(6, {"loss": 0.6})
    assert path.read_bytes() == before
    steps = [step for step, _, _ in events(tmp_path)]
    assert sorted(steps) == [1, 2, 3, 4, 5, 5, 6, 6], "TensorBoard itself hides the first 5 and 6"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_torn_line_is_dropped_without_a_resume_step_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(2, {})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_reading_what_is_not_there_or_damaged(tmp_path):
    assert read_metrics(tmp_path / "none") == []
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"")
    assert read_metrics(tmp_path) == []
    for bad in (b"\xff\xfe", b"{", b"3", b"{}", b'{"step": "x"}', b"[" * 100_000):
        path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
        with pytest.raises(UserError, match="damaged: line 2 is no metrics line") as caught:
            read_metrics(tmp_path)
        assert "\n" not in str(caught.value)


def test_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    class Full:
        """A file on a disk that has room for five more bytes."""

        def __init__(self, file):
            self._file, self.fileno = file, file.fileno

        def write(self, line):
            return self._file.write(line[:5])

        def close(self):
            self._file.close()

    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        file, writer._file = writer._file, Full(writer._file)
        with pytest.raises(MetricsError, match=r"metrics.jsonl cannot be written: .*disk full"):
            writer.write(2, {"loss": 2.0})
        writer._file = file
        writer.write(3, {"loss": 3.0})
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]


def test_tensorboard_on_a_full_disk_does_not_stop_training(tmp_path, monkeypatch):
    told = []
    with MetricWriter(tmp_path, on_error=told.append) as writer:
        writer.write(1, {"loss": 1.0})
        with monkeypatch.context() as m:
            m.setattr(RecordWriter, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
            for step in range(2, 30):
                writer.write(step, {"loss": 1.0})
        writer.write(30, {"loss": 30.0})
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, 31))
    assert len(told) == 28 and str(told[0]).endswith("tensorboard cannot be written: full")
    assert [step for step, _, _ in events(tmp_path)] == [1, 30]


def test_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        MetricWriter(tmp_path / "file" / "run").write(1, {})


def test_names_and_kinds_that_are_refused(tmp_path):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="'step'"):
            writer.write(1, {"step": 2})
        with pytest.raises((TypeError, ValueError)):
            writer.write(1, {"loss": object()})
    assert list(tmp_path.iterdir()) == [] and metrics.FILE == "metrics.jsonl"


def test_pytorch_is_not_imported():
    """tensorboardX would, where it is installed: two seconds of every start."""
    pytest.importorskip("torch", reason="PyTorch is not installed, so that nothing can import it")
    program = "import sys, moejax.training.train; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout == "False\n", said.stderr
