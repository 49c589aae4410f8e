"""Headers and metadata with hostile sizes are refused, without the memory that they ask for."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hostile import BOOKS, header_file
from hypothesis import given, settings
from hypothesis import strategies as st

import moejax
from moejax.config import UserError
from moejax.interop.safetensors_io import read_header
from moejax.training import manifest
from moejax.training.checkpoints import Checkpointer, CheckpointError

PACKAGE = pathlib.Path(moejax.__file__).parent


def entry(shape, offsets, dtype="F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


HEADERS = {
    "length of 2**63": (b"{}", 2**63, b""),
    "length of 2**64 - 1": (b"{}", 2**64 - 1, b""),
    "length of a terabyte": (b"{}", 2**40, b""),
    "length beyond the file": (b"{}", 99, b""),
    "offsets beyond the file": (f'{{"a": {entry([4], [0, 16])}}}'.encode(), None, b"x" * 8),
    "offsets of 2**62": (f'{{"a": {entry([2**60], [0, 2**62])}}}'.encode(), None, b""),
    "offsets that overlap": (
        f'{{"a": {entry([4], [0, 16])}, "b": {entry([4], [8, 24])}}}'.encode(), None, b"x" * 24),
    "offsets backwards": (f'{{"a": {entry([4], [16, 0])}}}'.encode(), None, b"x" * 16),
    "offsets below zero": (f'{{"a": {entry([4], [-16, 0])}}}'.encode(), None, b"x" * 16),
    "a hole": (f'{{"a": {entry([2], [8, 16])}}}'.encode(), None, b"x" * 16),
    "a shape below zero": (f'{{"a": {entry([-2, -2], [0, 16])}}}'.encode(), None, b"x" * 16),
    "a shape that overflows": (
        f'{{"a": {entry([2**33, 2**33, 2**33], [0, 16])}}}'.encode(), None, b"x" * 16),
    "a shape that wraps to its size": (
        f'{{"a": {entry([2**62 + 1, 4], [0, 16])}}}'.encode(), None, b"x" * 16),
    "another shape": (f'{{"a": {entry([5], [0, 16])}}}'.encode(), None, b"x" * 16),
    "a fraction": (f'{{"a": {entry([4.5], [0, 16])}}}'.encode(), None, b"x" * 16),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', None, b"x" * 4),
    "deep nesting": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None, b""),
    "deep lists": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, b""),
    "no JSON": (b"\x80\x04pickle", None, b""),
    "no object": (b"[1, 2]", None, b""),
    "bytes after the end": (f'{{"a": {entry([1], [0, 4])}}}'.encode(), None, b"x" * 400),
    "an unknown type": (f'{{"a": {entry([1], [0, 8], "OBJ")}}}'.encode(), None, b"x" * 8),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused_without_memory(name, tmp_path):
    header, length, data = HEADERS[name]
    header_file(tmp_path / "model.safetensors", header, length, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read_header(tmp_path / "model.safetensors")
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024  # KiB


def test_a_name_that_occurs_twice_is_read_once_or_refused(tmp_path):
    """Whichever of the two is taken, it was checked: nothing outside of the file is read."""
    twice = f'{{"a": {entry([1], [0, 4])}, "a": {entry([2**40], [0, 2**42])}}}'.encode()
    header_file(tmp_path / "model.safetensors", twice, None, b"x" * 4)
    with pytest.raises(UserError):
        read_header(tmp_path / "model.safetensors")
    twice = f'{{"a": {entry([2**40], [0, 2**42])}, "a": {entry([1], [0, 4])}}}'.encode()
    header_file(tmp_path / "model.safetensors", twice, None, b"x" * 4)
    try:
        found = read_header(tmp_path / "model.safetensors")
    except UserError:
        return
    assert found["a"].shape == (1,) and found["a"].read().nbytes == 4


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_header_is_read_or_refused(tmp_path_factory, header, length):
    file = tmp_path_factory.mktemp("header") / "model.safetensors"
    header_file(file, header, length)
    try:
        read_header(file)
    except UserError as error:
        assert str(error).isprintable()


def reseal(folder: pathlib.Path, step: int, **content) -> None:
    """What an attacker does who knows the format: the manifest of changed files, made anew."""
    old = manifest.read(folder, step)
    (folder / manifest.NAME).unlink()
    kept = {name: old[name] for name in ("step", "val_loss", "leaves")}
    manifest.seal(folder, kept | content)


def abstract(shape):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of one array: of 8 numbers (step 1), and of 4,096 by 8,192 zeros (step 2)."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(8.0)}, {"next_index": 3})
        checkpoints.save(2, {"w": jnp.zeros((4096, 8192))}, {"next_index": 4})
    return folder


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("shape", [(4,), (16,), (8, 1), (2**20,)])
def test_shapes_that_contradict_a_sealed_manifest(step, shape, saved, tmp_path):
    """The manifest says what is wanted, the arrays are others: refused, and never padded or cut."""
    folder = pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    leaves = [["w", "float32", "x".join(map(str, shape))]]
    reseal(folder / str(step), step, leaves=leaves)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Checkpointer(folder) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(abstract(shape), step)
    assert f"step {step}" in str(caught.value) and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def _edit_metadata(folder, change):
    for file in (folder / "state").rglob("*"):
        if file.is_file() and file.suffix == "" and file.name.startswith("_"):
            change(file)


METADATA = {
    "shapes of 2**40": lambda file: file.write_text(file.read_text().replace("8", str(2**40))),
    "no JSON": lambda file: file.write_bytes(b"\x80\x04pickle"),
    "deep nesting": lambda file: file.write_bytes(b'{"a":' * 50_000),
    "nothing": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("name", METADATA)
def test_hostile_metadata_under_a_sealed_manifest(name, saved, tmp_path):
    """Right or refused in one line; the memory that the config's shapes need, and no more."""
    folder = pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    _edit_metadata(folder / "1", METADATA[name])
    reseal(folder / "1", 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Checkpointer(folder) as checkpoints:
        try:
            got = checkpoints.restore(abstract((8,)), 1).state["w"]
        except CheckpointError as error:
            assert "step 1" in str(error) and "\n" not in str(error)
        else:
            np.testing.assert_array_equal(got, np.arange(8.0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_a_pickle_for_an_array_is_refused(saved, tmp_path, bomb):
    for pattern in ("state/**/d/*", "state/_*", "extra.json"):
        folder = pathlib.Path(shutil.copytree(saved, tmp_path / f"c{len(os.listdir(tmp_path))}"))
        files = [file for file in (folder / "1").glob(pattern) if file.is_file()]
        assert files, pattern
        for file in files:
            file.write_bytes(bomb)
        with Checkpointer(folder) as checkpoints:
            with pytest.raises(CheckpointError, match="refused"):
                checkpoints.verify(1)
            reseal(folder / "1", 1)
            with pytest.raises(CheckpointError, match="step 1") as caught:
                checkpoints.restore(abstract((8,)), 1)
            assert "\n" not in str(caught.value)


def test_memory_is_bounded_where_a_process_has_little(tmp_path):
    """Header lengths and prices' aliases under a limit on the memory of a process of their own."""
    header_file(tmp_path / "model.safetensors", b"{}", 2**62)
    (tmp_path / "book.yaml").write_text(BOOKS["many laughs"][0])
    code = f"""
import resource
from moejax.interop.safetensors_io import read_header
from moejax.cost.price_book import read_book
from moejax.config import UserError
import pathlib
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20,) * 2)
for read, name in ((read_header, 'model.safetensors'), (read_book, 'book.yaml')):
    try:
        read(pathlib.Path({str(tmp_path)!r}) / name)
    except UserError as error:
        print('refused', name)
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.stdout.split() == ["refused", "model.safetensors", "refused", "book.yaml"], done
