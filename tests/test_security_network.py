"""No command reaches for a network that the user has not named."""

import socket

import pytest
from ablations import write_ablation
from runs import train, write_config

from moejax import cli
from moejax.config import UserError
from moejax.data import DataConfig
from moejax.data.dataset import open_dataset


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
