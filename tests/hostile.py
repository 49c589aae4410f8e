"""Hostile files, and the line that refuses them: what the tests of security share."""

import pathlib
import pickle
import shutil
import struct

import pytest


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
    from moejax import cli

    capsys.readouterr()
    status = cli.main(list(map(str, arguments)))
    said = capsys.readouterr()
    assert status == 2, (status, said)
    assert said.out == "" and "Traceback" not in said.err
    last = said.err.splitlines()[-1]
    assert last.startswith(f"moejax {arguments[0]}: ") and last.isprintable()
    return last


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory):
    """A checkpoint as Hugging Face has them."""
    import tiny

    from moejax.interop import hf

    folder = tmp_path_factory.mktemp("hf") / "model"
    config = tiny.dense_config()
    hf.save(folder, config, tiny.variables(config), family="llama")
    return folder


@pytest.fixture
def copied(whole_model, tmp_path):
    return pathlib.Path(shutil.copytree(whole_model, tmp_path / "hf"))


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


def header_file(path: pathlib.Path, header: bytes, length: int | None = None, data: bytes = b""):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
