"""What files, texts and names from elsewhere cannot do: run code, take memory, leave their folder,
become markup or orders to a terminal, or reach a network."""

import ast
import json
import os
import pathlib
import pickle
import resource
import shutil
import socket
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import made_folders
import numpy as np
import pytest
import report_pages
import tiny
from ablations import write_ablation
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import train, write_config

import moejax
from moejax import cli
from moejax.ablation.grid import Cell
from moejax.analysis.report import html
from moejax.config import UserError
from moejax.cost.price_book import read_book
from moejax.data import DataConfig, pretokenize, tokenizers
from moejax.data.dataset import open_dataset
from moejax.interop import hf
from moejax.interop.safetensors_io import read_header
from moejax.training import manifest, run_dir
from moejax.training.checkpoints import Checkpointer, CheckpointError

PACKAGE = pathlib.Path(moejax.__file__).parent


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: pathlib.Path):
        self.mark = mark

    def __reduce__(self):
        return (pathlib.Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path):
    """A file that hostile content would make; it must not be there at the end."""
    file = tmp_path / "it-ran"
    yield file
    assert not file.exists(), "foreign code ran"


@pytest.fixture
def bomb(mark):
    """A pickle that makes the file, proved by hand."""
    data = pickle.dumps(Bomb(mark))
    pickle.loads(data)
    assert mark.exists()
    mark.unlink()
    return data


def refused(capsys, *arguments) -> str:
    """The one line that a command refuses with."""
    capsys.readouterr()
    status = cli.main(list(map(str, arguments)))
    said = capsys.readouterr()
    assert status == 2, (status, said)
    assert said.out == "" and "Traceback" not in said.err
    last = said.err.splitlines()[-1]
    assert last.startswith(f"moejax {arguments[0]}: ") and last.isprintable()
    return last


# No code but the user's own


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
                     "torch"}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load",
                   "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "pickle.loads",
                   "runpy.run_path", "runpy.run_module"}  # fmt: skip
# Where code is loaded by name or path: a config file of the user's, and a router of the user's.
MAY_IMPORT = {"config.py", "moe/routers/registry.py"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute or a name; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def unsafe(tree: ast.AST) -> list[str]:
    """What in a module could run foreign code, by line."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in FORBIDDEN_MODULES:
                found.append(f"{node.lineno}: imports {name}")
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
        shell, pickles = keywords.get("shell"), keywords.get("allow_pickle")
        if name in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {name}")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            found.append(f"{node.lineno}: shell")
        if pickles is not None and not (
            isinstance(pickles, ast.Constant) and pickles.value is False
        ):
            found.append(f"{node.lineno}: allow_pickle")
        if name == "yaml.load":
            loader = keywords.get("Loader")
            if loader is None or dotted(loader) not in ("yaml.SafeLoader", "_Loader"):
                found.append(f"{node.lineno}: yaml.load without a safe loader")
        if name.startswith("importlib.") and name.rpartition(".")[2] in (
            "import_module", "spec_from_file_location", "module_from_spec"
        ):  # fmt: skip
            found.append(f"{node.lineno}: {name}")
    return found


def test_no_module_can_run_what_it_reads():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 200
    for file in files:
        found = unsafe(ast.parse(file.read_text()))
        if file.relative_to(PACKAGE).as_posix() in MAY_IMPORT:
            found = [line for line in found if "importlib" not in line]
        assert not found, (file, found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from torch import load", "eval('1')", "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=x)", "yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)",
        "subprocess.run(c, shell=True)", "importlib.import_module(n)", "os.system(c)",
    ],
)  # fmt: skip
def test_the_scan_sees_each_kind(text):
    assert unsafe(ast.parse(text))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint as Hugging Face has them."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    config = tiny.dense_config()
    hf.save(folder, config, tiny.variables(config), family="llama")
    return folder


@pytest.fixture
def copied(model, tmp_path):
    return pathlib.Path(shutil.copytree(model, tmp_path / "hf"))


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.safetensors", "model.pt", "model.safetensors.index.json",
     "config.json", "tokenizer.json", "tensors.json"],
)  # fmt: skip
def test_a_pickle_in_a_models_folder_is_refused(name, copied, bomb, tmp_path, capsys):
    if name.startswith(("pytorch", "model.pt")):
        (copied / "model.safetensors").unlink()
    (copied / name).write_bytes(bomb)
    line = refused(capsys, "import", f"--hf={copied}", f"--workdir={tmp_path / 'run'}")
    assert name in line
    assert not (tmp_path / "run").exists()


def test_code_that_comes_with_a_model_is_not_run(copied, mark, tmp_path, monkeypatch):
    """``auto_map`` names code that Transformers would run; here it is text that travels along."""
    values = json.loads((copied / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "modeling_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    values["trust_remote_code"] = True
    (copied / "config.json").write_text(json.dumps(values))
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("modeling_evil.py", "config.py", "configuration_llama.py", "json.py"):
        (copied / name).write_text(code)
    monkeypatch.chdir(copied)
    config, _ = hf.load(copied)
    assert config.d_model == 16 and "modeling_evil" not in sys.modules


def test_pickles_among_shards_are_refused(tmp_path, bomb):
    config = DataConfig(source="text", path=str(write_config(tmp_path).parent / "corpus"))
    shards = tmp_path / "shards"
    pretokenize.tokenize_corpus(config, shards)
    whole = {path.name: path.read_bytes() for path in shards.iterdir()}
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    objects = (tmp_path / "objects.npy").read_bytes()
    # One number is announced, or very many: never taken before the file is known to hold them.
    long = whole["train_lengths.npy"].replace(b"(", b"(9" * 1, 1)
    for name in ("train_lengths.npy", "validation_counts.npy", "tokenizer_description.json"):
        for content in (bomb, objects, long):
            (shards / name).write_bytes(content)
            content_of = json.loads(whole["manifest.json"])
            content_of["sha256"][name] = pretokenize.sha256_of(shards / name)
            (shards / "manifest.json").write_text(json.dumps(content_of))
            with pytest.raises(UserError) as caught:
                pretokenize.open_shards(shards, 16)
            assert str(shards) in str(caught.value)
            (shards / name).write_bytes(whole[name])
    for name in ("train-00000.array_record", "manifest.json"):
        (shards / "manifest.json").write_bytes(whole["manifest.json"])
        (shards / name).write_bytes(bomb)
        with pytest.raises(UserError, match=name):
            pretokenize.open_shards(shards, 16)
        (shards / name).write_bytes(whole[name])


HOSTILE_SHARDS = {
    "a shard above": lambda m: m["splits"]["train"]["files"][0].update(name="../secret"),
    "an absolute shard": lambda m: m["splits"]["train"]["files"][0].update(name="/etc/passwd"),
    "a file above": lambda m: m["sha256"].update({"../secret": "0" * 64}),
    "objects for tokens": lambda m: m.update(dtype="O"),
    "fields for tokens": lambda m: m.update(dtype="(1000000000,)i8"),
    "records of nothing": lambda m: m.update(record_tokens=0),
    "records without end": lambda m: m.update(record_tokens="1" * 100),
}


@pytest.mark.parametrize("name", HOSTILE_SHARDS)
def test_a_hostile_manifest_of_shards_is_one_line(name, tmp_path):
    config = DataConfig(source="text", path=str(write_config(tmp_path).parent / "corpus"))
    shards = tmp_path / "shards"
    pretokenize.tokenize_corpus(config, shards)
    (tmp_path / "secret").write_bytes((shards / "train-00000.array_record").read_bytes())
    content = json.loads((shards / "manifest.json").read_text())
    HOSTILE_SHARDS[name](content)
    (shards / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"outside of it|is damaged"):
        pretokenize.open_shards(shards, 16)


def test_a_tokenizer_that_is_a_pickle_is_refused(tmp_path, bomb):
    (tmp_path / "tokenizer.json").write_bytes(bomb)
    with pytest.raises(UserError, match=r"not a tokenizer.json"):
        tokenizers.load_json(tmp_path / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_description.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / "tokenizer_description.json").write_text('{"kind": "json", "separator": 0}')
        (folder / name).write_bytes(bomb)
        with pytest.raises(UserError, match="no readable tokenizer"):
            tokenizers.load_saved(folder)


BOOKS = {
    "an object": ("h20: !!python/object/apply:pathlib.Path.touch [MARK]", "is not YAML that can"),
    "a name": ("h20: !!python/name:os.system", "is not YAML that can be used"),
    "many laughs": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi",
                                                                       strict=True)
        ), "no such chip",
    ),
    "laughs for a chip": (
        "h20: &a [x,x,x,x]\nh100_sxm: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n", "must be a block",
    ),
    "depth": ("[" * 50_000, "nested too deeply"),
    "length": ("#" * 2**21, "above 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOOKS)
def test_a_hostile_price_book_is_one_line(name, tmp_path, mark):
    text, reason = BOOKS[name]
    (tmp_path / "book.yaml").write_text(text.replace("MARK", str(mark)))
    with pytest.raises(UserError, match=reason) as caught:
        read_book(tmp_path / "book.yaml")
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


# A run's folder from elsewhere


def write_run(folder: pathlib.Path, **blocks) -> pathlib.Path:
    """A folder with a run's record, whose config has further blocks."""
    made_folders.write_run(folder)
    record = json.loads((folder / "config.json").read_text())
    for block, values in blocks.items():
        record["config"].setdefault(block, {}).update(values)
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("command", ["report", "generate", "inspect", "evaluate", "export"])
def test_a_router_beside_a_run_is_not_imported(command, tmp_path, mark, monkeypatch, capsys):
    """A user's own config may name a module in the working directory; a run's record may not."""
    folder = write_run(tmp_path / "run", router={"name": "evil_router.Router"})
    (folder / "evil_router.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()")
    monkeypatch.chdir(folder)
    where = [str(folder)] if command == "report" else [f"--workdir={folder}"]
    where += [f"--hf={tmp_path / 'out'}"] if command == "export" else []
    assert "evil_router" in refused(capsys, command, *where)


def test_a_runs_record_names_no_cache_and_no_download(tmp_path):
    """Compiled programs are machine code: those in a folder that came with a run are not loaded."""
    data = {"cache_dir": str(tmp_path / "evil"), "download": True}
    record = run_dir.read_record(write_run(tmp_path / "run", data=data))
    found = run_dir.recorded(record).data
    assert found.cache_dir == "" and not found.download and found.path == "corpus"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"nul", b'{"config": 3}'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_record_is_one_line(name, content, tmp_path, capsys):
    folder = made_folders.write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    assert str(folder) in refused(capsys, "report", folder) or name == "summary.json"


# Sizes


def header_file(path: pathlib.Path, header: bytes, length: int | None = None, data: bytes = b""):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


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


def abstract(shape, dtype=jnp.float32):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of one array: of 8 numbers (step 1), and of 4,096 by 8,192 zeros (step 2)."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(8.0)}, {"next_index": 3})
        checkpoints.save(2, {"w": jnp.zeros((4096, 8192))}, {"next_index": 4})
    return folder


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("shape, dtype", [((4,), "float32"), ((16,), "float32"), ((8,), "int32"),
                                          ((8, 1), "float32")])  # fmt: skip
def test_shapes_that_contradict_a_sealed_manifest(step, shape, dtype, saved, tmp_path):
    """The manifest says what is wanted, the arrays are others: refused, and never padded or cut."""
    folder = pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    leaves = [["w", dtype, "x".join(map(str, shape))]]
    reseal(folder / str(step), step, leaves=leaves)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Checkpointer(folder) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(abstract(shape, dtype), step)
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


# Paths


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "..", ".", "a/b", ""])
def test_an_index_names_files_in_its_folder_only(shard, copied):
    shutil.copy(copied / "model.safetensors", copied.parent / "other.safetensors")
    names = list(read_header(copied / "model.safetensors"))
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, shard)})
    )
    with pytest.raises(UserError, match=r"index\.json|shard named by"):
        hf.load(copied)


def test_a_step_that_is_a_link_is_no_checkpoint(saved, tmp_path):
    """Its files would be deleted with the run's old checkpoints, wherever they lie."""
    outside = pathlib.Path(shutil.copytree(saved, tmp_path / "outside"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "1").symlink_to(outside / "1")
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == []
        for step in (3, 4, 5):
            checkpoints.save(step, {"w": jnp.arange(8.0)}, {})
    assert manifest.read(outside / "1", 1) and (outside / "1" / "state").is_dir()


@pytest.mark.parametrize(
    "name", ["summary.json", "ledger.jsonl", "metrics.jsonl", "config.json.tmp"]
)
def test_a_run_is_not_written_through_links(name, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("my only copy")
    run = made_folders.write_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    config = write_config(tmp_path / "config")
    assert name in refused(capsys, "train", f"--config={config}", f"--workdir={run}")
    assert secret.read_text() == "my only copy"


def test_a_whole_file_replaces_a_link(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("my only copy")
    for name in ("report.html", "report.html.tmp"):
        (tmp_path / name).symlink_to(secret)
    manifest.write_whole(tmp_path / "report.html", "text")
    assert secret.read_text() == "my only copy"
    assert (tmp_path / "report.html").read_text() == "text"
    assert not (tmp_path / "report.html").is_symlink()


@pytest.mark.parametrize("name", ["../../out", "/etc/x", "..", "", "a/b", 3])
@pytest.mark.parametrize("field", ["id", "trunk"])
def test_a_cell_of_an_ablation_is_a_folder_in_it(field, name):
    good = Cell("a-seed0", "a", 0, 1.0, "final", None, 1, 1.0, 1.0, {}).to_dict()
    assert Cell.from_dict(good).id == "a-seed0"
    with pytest.raises(UserError, match="no cell"):
        Cell.from_dict(good | {field: name})
    with pytest.raises(UserError, match="no cell"):
        Cell.from_dict(good | {"more": 1})


# Markup


MARKUPS = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "javascript:alert(1)",
    "</style><script>x</script>", "' onmouseover='x", "<svg/onload=x>", "&lt;b&gt;", "<!--", "]]>",
    "</title><base href=//evil.example>", "https://evil.example/x", "\x1b[31m\x00\x9b\ud800\u202e",
)  # fmt: skip


class Shape(report_pages.Outline):
    """The elements of a page with the names of their attributes, and where it leads."""

    def __init__(self, page: str):
        super().__init__(page)
        self.shape = [(tag, tuple(values)) for tag, values in self.elements]
        self.links = [
            values[name] for _, values in self.elements
            for name in ("href", "src", "action", "data", "xlink:href", "srcset") if name in values
        ]  # fmt: skip


def pages(folder: pathlib.Path, word: str) -> list[str]:
    """Reports of a run and of an ablation, with a word in every text that they show."""
    names = {key: f"{word} {key}" for key in made_folders.VARIANTS}
    ablation = made_folders.write_ablation(
        folder / "ablation", steps=16, names=names, error=word, claim=word
    )
    run = made_folders.write_run(folder / "run", lines=made_folders.metrics(6), sample=word,
                                 data={"licence": word, word: word, "warning": word})  # fmt: skip
    record = json.loads((run / "config.json").read_text())
    record["config"] |= {"stage": word}
    record["config"]["train"] |= {"sample_prompt": word}
    record["config"]["data"] |= {"path": word, "tokenizer": word}
    record |= {"machine": word, "python": word, "packages": {word: word}}
    record["code"] = {"moejax": word, "revision": word}
    (run / "config.json").write_text(json.dumps(record))
    ledger = (run / "ledger.jsonl").read_text().replace('"cpu"', '"cpu"')
    rows = [json.loads(line) for line in ledger.splitlines()]
    for row in rows:
        if "price" in row:
            row["price"] |= {"source": word, "book": word}
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made_folders.write_inspection(run, token=word, domain=word)
    made_folders.write_evaluation(run, word)
    return [pathlib.Path(report_pages.report(f)["output"]).read_text() for f in (ablation, run)]


def test_no_text_becomes_an_element_an_attribute_or_a_link(tmp_path):
    plain = [Shape(page) for page in pages(tmp_path / "plain", "word")]
    for number, markup in enumerate(MARKUPS):
        found = [Shape(page) for page in pages(tmp_path / str(number), markup)]
        for seen, wanted in zip(found, plain, strict=True):
            # A word in a chart may be drawn or left out by its length; nothing else may differ.
            assert set(seen.shape) <= set(wanted.shape), set(seen.shape) - set(wanted.shape)
            kinds = {tag for tag, _ in seen.shape}
            assert kinds.isdisjoint({"script", "iframe", "object", "embed", "base", "form", "img"})
            assert not any(name.startswith("on") for _, names in seen.shape for name in names)
            good = ("#", "data:,", "data:image/png;base64,", "http://", "https://")
            assert all(link.startswith(good) for link in seen.links)
            assert not any("evil" in link or "alert" in link for link in seen.links)


@given(st.text())
def test_escaped_text_is_text(text):
    """An element with any text in it and in an attribute is that element and that text."""
    words = []

    class Reader(report_pages.html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert (tag, [name for name, _ in attributes]) == ("p", ["title"])

        def handle_data(self, data):
            words.append(data)

    Reader().feed(html.tag("p", text, title=text))
    assert len("".join(words)) <= len(text) + 1


def test_a_figure_is_a_file_without_the_words_markup(tmp_path):
    names = {key: f"<script>x</script> {key}" for key in made_folders.VARIANTS}
    folder = made_folders.write_ablation(tmp_path / "odd", steps=16, names=names)
    figures = report_pages.report(folder, "--figures=svg")["figures"]
    assert figures
    for file in figures:
        assert "<script" not in pathlib.Path(file).read_text()
        assert pathlib.Path(file).parent.parent == folder


# A terminal


def test_orders_to_a_terminal_are_made_visible(tmp_path, capsys, monkeypatch):
    from moejax.training import restore

    monkeypatch.setattr(restore, "generate", lambda *_, **__: "a\x1b[2J\x07\x9b31mb\nc\té\r")
    assert cli.main(["generate", f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == "a\\x1b[2J\\x07\\x9b31mb\nc\té\\r\n"
    assert cli.main(["generate", f"--workdir={tmp_path}", "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("a\x1b[2J")  # exact, and escaped
    line = refused(capsys, "train", "--config=/no/\x1b[31m.py", f"--workdir={tmp_path / 'run'}")
    assert "\\x1b[31m" in line


# A network


@pytest.fixture
def offline(monkeypatch):
    """Every way out raises, and is noted."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("there is no network here")

    real = socket.socket.connect

    def connect(self, address):
        local = self.family == socket.AF_UNIX or (
            isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1", "localhost")
        )
        return real(self, address) if local else refuse(address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", lambda self, address: refuse(address))
    monkeypatch.setattr(socket.socket, "sendto", lambda self, *arguments: refuse(*arguments))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    yield tried
    assert not tried, tried


def test_the_guard_sees_a_network_that_is_used(offline):
    import urllib.request

    with pytest.raises(OSError):
        urllib.request.urlopen("http://example.com", timeout=1)
    assert offline
    offline.clear()


def test_no_command_uses_a_network(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    config, run = write_config(tmp_path), tmp_path / "run"
    assert cli.main(["plan", f"--config={config}"]) == 0
    assert cli.main(["plan", "--model=deepseek_v3", "--tokens=1e12"]) == 0
    assert train(config, run, "train.steps=2", "train.sample_tokens=2") == 0
    assert cli.main(["ledger", str(run)]) == 0
    assert cli.main(["report", str(run), "--no-inspect"]) == 0
    assert cli.main(["generate", f"--workdir={run}", "--tokens=2"]) == 0
    assert cli.main(["tokenize", f"--config={config}", f"--out={tmp_path / 'shards'}"]) == 0
    ablation = write_ablation(tmp_path / "ablation")
    assert cli.main(["ablate", f"--config={ablation}", f"--workdir={tmp_path / 'grid'}",
                     "--dry-run"]) == 0  # fmt: skip
    capsys.readouterr()


@pytest.mark.slow
def test_a_benchmark_uses_no_network(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--suite=moe", "--shapes=T64-D16-F16-E4-K2", "--format=json"]) == 0


@pytest.mark.parametrize("name", ["c4", "wiki40b/en", "no_such_dataset", "huggingface:imdb"])
def test_a_dataset_that_is_not_there_is_not_fetched(name, offline, tmp_path):
    config = DataConfig(source="tfds", name=name, path=str(tmp_path / "tfds"))
    with pytest.raises(UserError, match=r"data\.name"):
        open_dataset(config, seq_len=16, vocab_size=260)


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
