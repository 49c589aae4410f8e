"""A trained model back from its run directory, and text from it."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moejax.config import ConfigError, UserError, check
from moejax.data import tokenizers
from moejax.models.generate import Generated
from moejax.models.generate import generate as generate_text
from moejax.models.sampling_config import SamplingConfig, check_speculation
from moejax.parallel import MeshConfig, make_mesh
from moejax.training import run_dir
from moejax.training.checkpoints import Checkpointer
from moejax.training.optimizers import make_optimizer
from moejax.training.prepare import use_compilation_cache
from moejax.training.run_config import RunConfig
from moejax.training.state import make_init

# Rows of one batch.
MOST_TEXTS = 10_000


def load(workdir: str | pathlib.Path) -> tuple[RunConfig, dict[str, Any]]:
    """A run's config and the variables of its newest good checkpoint, on one device.

    Where the run dropped nothing, ``moe.dispatch`` becomes ``auto``, and ``moe.exchange`` with it:
    what it asked for may not run on this machine, and what does computes the same.

    Raises:
      UserError: no run, no checkpoint, or a damaged one.
    """
    path = pathlib.Path(workdir)
    config = exact_as_auto(run_dir.recorded(run_dir.read_record(path)))
    optimizer = make_optimizer(config.optim, config.train.steps)
    _, abstract = make_init(config.model, optimizer, make_mesh(MeshConfig()))
    with Checkpointer(path / run_dir.CHECKPOINTS, config.checkpoint) as checkpoints:
        if not checkpoints.steps():
            raise UserError(
                f"--workdir = {str(workdir)!r}: the run has no checkpoint yet; train on"
            )
        restored = checkpoints.restore(abstract)
    for text in restored.messages:
        print(text, file=sys.stderr)
    state = restored.state
    return config, {"params": state.params, "router_state": state.router_state}


def exact_as_auto(config: RunConfig) -> RunConfig:
    """The config with back ends that run here: what drops nothing computes the same by any."""
    moe = config.model.moe
    if moe is None:
        return config
    dispatch = moe.dispatch if moe.dispatch == "capacity" else "auto"
    moe = dataclasses.replace(moe, dispatch=dispatch, exchange="auto")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def generate(
    workdir: str,
    prompt: str,
    *,
    tokens: int,
    seed: int = 0,
    count: int = 1,
    stops: Sequence[str] = (),
    speculate: int = 0,
    show: Callable[[str], None] | None = None,
    **options: float,
) -> Generated:
    """Continues a text with a run's model; see ``moejax.models.generate``.

    Args:
      workdir: the run's folder.
      prompt: the text's beginning.
      tokens: tokens to add at most.
      seed: of the sampling.
      count: how many continuations.
      stops: texts that end one.
      speculate: tokens that the MTP module drafts at a time.
      show: is given the first text's pieces as they are made.
      options: other fields of ``SamplingConfig``.

    Raises:
      UserError: no run or checkpoint, or an option out of range.
    """
    check(tokens > 0, "--tokens", tokens, "must be above zero")
    check(0 < count <= MOST_TEXTS, "--count", count, f"must be from 1 to {MOST_TEXTS}")
    check(0 <= seed < 2**63, "--seed", seed, "must be from 0 to below 2**63")
    try:
        sampling = SamplingConfig(max_tokens=tokens, **options)
    except ConfigError as error:
        raise ConfigError(_flag(error.field), error.value, error.remedy) from None
    record = run_dir.read_record(pathlib.Path(workdir))
    use_compilation_cache(run_dir.recorded(record).data.cache_path / "xla")
    config, variables = load(workdir)
    try:
        check_speculation(config.model, speculate)
    except ConfigError as error:
        raise ConfigError(_flag(error.field), error.value, error.remedy) from None
    tokenizer = tokenizers.load_saved(pathlib.Path(workdir) / run_dir.TOKENIZER)
    with jax.set_mesh(make_mesh(MeshConfig())):
        return generate_text(
            config.model, variables, tokenizer, prompt, options=sampling, seed=seed, count=count,
            stops=stops, speculate=speculate, show=show,
        )  # fmt: skip


def _flag(field: str) -> str:
    """The flag of ``moejax generate`` that sets a field of sampling."""
    return "--" + field.removeprefix("sampling.").replace("_", "-")
