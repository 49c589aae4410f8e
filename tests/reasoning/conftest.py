"""A tiny model that stages of reasoning start from."""

import pytest
from runs import train, write_config


@pytest.fixture(scope="session")
def tiny_start(tmp_path_factory):
    """The folder of a run of two steps on text."""
    folder = tmp_path_factory.mktemp("start")
    workdir = folder / "run"
    assert train(write_config(folder), workdir, "train.steps=2") == 0
    return workdir
