"""Nothing is run but the user's own config file, whatever a file from elsewhere holds or names."""

import ast
import json
import pathlib
import sys

import made_folders
import numpy as np
import pytest
from hostile import BOOKS, refused
from runs import write_config

import moejax
from moejax import cli
from moejax.config import UserError
from moejax.cost.price_book import read_book
from moejax.data import DataConfig, pretokenize, tokenizers
from moejax.interop import hf
from moejax.training import run_dir

PACKAGE = pathlib.Path(moejax.__file__).parent


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
                     "torch"}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load",
                   "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "pickle.loads",
                   "runpy.run_path", "runpy.run_module"}  # fmt: skip
# PyTorch's own speed is measured beside ours, in a process of its own; no file is loaded with it.
PEERS = ("bench/peer_transformers.py", "bench/peer_generate.py")
MAY_MEASURE = dict.fromkeys(PEERS, "imports torch")
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
        name = file.relative_to(PACKAGE).as_posix()
        allowed = "importlib" if name in MAY_IMPORT else MAY_MEASURE.get(name)
        found = [line for line in found if not (allowed and allowed in line)]
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


# A terminal


def test_orders_to_a_terminal_are_made_visible(tmp_path, capsys, monkeypatch):
    from moejax.models.generate import Generated
    from moejax.training import restore

    made = Generated(["a\x1b[2J\x07\x9b31mb\nc\té\r"], 7, 1.0)
    monkeypatch.setattr(restore, "generate", lambda *_, **__: made)
    assert cli.main(["generate", f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == "a\\x1b[2J\\x07\\x9b31mb\nc\té\\r\n"
    assert cli.main(["generate", f"--workdir={tmp_path}", "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("a\x1b[2J")  # exact, and escaped
    line = refused(capsys, "train", "--config=/no/\x1b[31m.py", f"--workdir={tmp_path / 'run'}")
    assert "\\x1b[31m" in line
