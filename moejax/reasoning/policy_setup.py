"""Everything that a run of reinforcement learning needs before its first step."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import optax

from moejax.config import UserError, check, to_dict
from moejax.cost import counts, text
from moejax.cost.plan_text import format_plan
from moejax.data import tokenizers
from moejax.data.tokenizers import Tokenizer
from moejax.models.replay import check_replay
from moejax.moe.choose import Choice
from moejax.parallel import check_fits, make_mesh
from moejax.reasoning import templates
from moejax.reasoning.policy_config import PolicyConfig
from moejax.reasoning.rewards import Scorer
from moejax.reasoning.rl_config import RLConfig
from moejax.reasoning.tasks import TaskSet
from moejax.reasoning.templates import Template
from moejax.training import prepare, run_dir
from moejax.training.optimizers import learning_rate, make_optimizer
from moejax.training.prepare import Billing
from moejax.training.run_config import RunConfig
from moejax.training.schedules import LearningRate


@dataclasses.dataclass(frozen=True)
class Asked:
    """What stands for a corpus in a run's record: the tasks, and the tokenizer they are read by.

    Attributes:
      tokenizer: of the run that this one starts from.
      fingerprint: equal for the same tasks, template and tokenizer.
      provenance: JSON-ready account.
    """

    tokenizer: Tokenizer
    fingerprint: str
    provenance: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PolicySetup:
    """A validated run.

    Attributes:
      config: with what ``auto`` came to.
      rl: the algorithm, resolved.
      mesh: where it runs.
      choice: how experts are computed; None for a dense model.
      asked: the tasks, for the record.
      tasks, template, scorer: questions, their form, and the judge.
      optimizer, schedule: over all optimizer steps.
      billing: what it is charged by.
      forward_flops: of a token, without a backward pass.
    """

    config: PolicyConfig
    rl: RLConfig
    mesh: jax.sharding.Mesh
    choice: Choice | None
    asked: Asked
    tasks: TaskSet
    template: Template
    scorer: Scorer
    optimizer: optax.GradientTransformation
    schedule: LearningRate
    billing: Billing
    forward_flops: float

    @property
    def start(self) -> "StartView":
        """What ``moejax.training.start`` needs of a run."""
        return StartView(self.config.run, self.asked, self.mesh)

    @property
    def optimizer_steps(self) -> int:
        """Of a rollout."""
        return self.rl.epochs * self.rl.minibatches


@dataclasses.dataclass(frozen=True)
class StartView:
    """The part of a run's set-up that says what it starts from, and where."""

    config: RunConfig
    dataset: Asked
    mesh: jax.sharding.Mesh


def prepare_policy(config: PolicyConfig) -> PolicySetup:
    """Checks a config against devices, the run that it starts from, tasks and vocabulary.

    Nothing is written.

    Raises:
      UserError: something does not fit, in one line.
    """
    check(
        jax.process_count() == 1, "processes", jax.process_count(),
        "reinforcement runs in one process, of as many devices as it has; start one",
    )  # fmt: skip
    run, rl = config.run, config.rl.resolved()
    prepare.use_compilation_cache(run.data.cache_path / "xla")
    mesh = make_mesh(run.mesh)
    train = run.train
    rows = train.batch_size // rl.minibatches // train.micro_batches
    check_fits(tuple(mesh.shape.values()), run.model, rows, train.seq_len)
    check(mesh.shape["context"] == 1, "mesh.context", mesh.shape["context"],
          "cuts rows that are sampled token by token; set 1")  # fmt: skip
    choice = prepare.choose_back_ends(run.model, mesh)
    if rl.routing_replay != "none":
        check_replay(run.model, "rl.routing_replay", rl.routing_replay)
    run = prepare.with_dtype(run)
    config = dataclasses.replace(config, run=run)
    tokenizer = tokenizer_of(run.start.run)
    tasks, template = TaskSet(config.task), templates.find(config.prompt.template)
    templates.check_vocabulary(template, tokenizer, tasks.characters, run.model.vocab_size)
    scorer = Scorer(config.reward, template, tasks.verify)
    steps = train.steps * rl.epochs * rl.minibatches
    _check_problems(config, tasks)
    per_token = counts.count(run.model, train.seq_len).flops_per_token
    return PolicySetup(
        config, rl, mesh, choice, _asked(config, tokenizer), tasks, template, scorer,
        make_optimizer(run.optim, steps), learning_rate(run.optim, steps),
        prepare.make_billing(run, mesh), per_token.forward,
    )  # fmt: skip


def plan_policy(setup: PolicySetup) -> dict[str, Any]:
    """The bill of the updates before the run, by ``moejax.cost.plan.make_plan``.

    All answers are taken to be as long as they may be. Tokens are those of optimizer steps; the
    passes that give old and reference log-probabilities are counted beside them. Rollouts, whose
    time no utilisation of training tells, are in ``rollout_tokens`` and ``rollout_flops`` alone.
    """
    run, rl, billing = setup.config.run, setup.rl, setup.billing
    once = run.train.steps * run.train.batch_size * run.train.seq_len
    old = setup.optimizer_steps > 1 or rl.routing_replay == "old_policy"
    layout = prepare.layout_of(run.mesh, setup.mesh.size)
    part = run.train.batch_size // rl.minibatches // run.train.micro_batches
    placement = dataclasses.replace(
        prepare.placement_of(run, layout), rows=max(1, part // layout.rows)
    )
    plan = prepare.plan_of(
        run, billing, placement, tokens=once * rl.epochs,
        more_flops=setup.forward_flops / rl.epochs if old else 0.0,
        second=run.model if rl.kl_weight else None,
    )  # fmt: skip
    return plan | {"rollout_tokens": once, "rollout_flops": once * setup.forward_flops}


def plan_lines(setup: PolicySetup) -> list[str]:
    """The plan in lines, and what is not in it."""
    plan = plan_policy(setup)
    tokens, flops = text.si(plan["rollout_tokens"]), text.si(plan["rollout_flops"], "FLOP")
    return [
        format_plan(plan),
        f"rollouts    up to {tokens} tokens, {flops} forward, whose time is not in the plan",
    ]


def tokenizer_of(workdir: str) -> Tokenizer:
    """The tokenizer of the run that another one starts from.

    Raises:
      ConfigError: no run is there.
    """
    folder = pathlib.Path(workdir)
    there = (folder / run_dir.CONFIG).is_file()
    check(
        there, "start.run", workdir, f"no run is there (no {run_dir.CONFIG}); give a run's folder"
    )
    return tokenizers.load_saved(folder / run_dir.TOKENIZER)


def _check_problems(config: PolicyConfig, tasks: TaskSet) -> None:
    """Whether there are questions to train on, and enough different ones that are held out."""
    tasks.problem(config.run.seed, 0, "rl")
    evaluation = config.evaluation
    try:
        tasks.distinct(evaluation.problems, evaluation.split, evaluation.seed)
    except UserError as error:
        shown = evaluation.problems
        raise UserError(f"config: evaluation.problems = {shown}: {error}") from None


def _asked(config: PolicyConfig, tokenizer: Tokenizer) -> Asked:
    task = to_dict(config.task)
    told = json.dumps([task, config.prompt.template, tokenizer.fingerprint], sort_keys=True)
    found = hashlib.sha256(told.encode()).hexdigest()
    return Asked(tokenizer, found, {"source": "tasks", "task": task})
