"""One tiny run for what looks into a trained model."""

import pytest
from runs import train, write_config


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A dense layer and two MoE layers, six steps, three checkpoints; a corpus of two folders."""
    folder = tmp_path_factory.mktemp("analysis")
    config = write_config(folder)
    for i, file in enumerate(sorted((folder / "corpus").iterdir())):
        part = folder / "corpus" / ("odd" if i % 2 else "even")
        part.mkdir(exist_ok=True)
        file.rename(part / file.name)
    settings = ("model.num_layers=3", "checkpoint.keep_newest=9", "data.validation_fraction=0.3")
    assert train(config, folder / "run", *settings) == 0
    return folder / "run"
