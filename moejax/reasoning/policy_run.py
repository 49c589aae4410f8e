"""The loop of one run of reinforcement learning: roll out, judge, update; evaluate and save."""

import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.cost.ledger import Ledger
from moejax.moe.diagnostics import router_health
from moejax.parallel import sharding
from moejax.reasoning.policy_evaluation import ask_held_out
from moejax.reasoning.policy_setup import PolicySetup, plan_lines
from moejax.reasoning.policy_step import make_policy_step, make_scorer, parts_of, rows_of
from moejax.reasoning.rollouts import Asker, PolicyRows, Roller, Rollout, seeds_of
from moejax.training import run_dir
from moejax.training.beginning import Beginning, from_checkpoint
from moejax.training.checkpoints import Checkpointer, CheckpointError
from moejax.training.failures import NonFiniteLoss, RunFailed
from moejax.training.manifest import write_whole
from moejax.training.metrics import MetricsError, MetricWriter
from moejax.training.progress import Progress
from moejax.training.signals import StopRequest
from moejax.training.start import from_run
from moejax.training.state import TrainState, make_init

EVALUATIONS, REFERENCE = "evaluations.json", "reference"
ORDER = 7  # of the seeds of minibatches, beside those of rollouts


class PolicyRun:
    """What the loop holds.

    Args:
      setup: the run.
      directory: its folder.
      ledger: is charged.
      stop: is looked at between steps.
    """

    def __init__(
        self, setup: PolicySetup, directory: run_dir.RunDirectory, ledger: Ledger, stop: StopRequest
    ):
        self.setup, self.directory, self.ledger, self.stop = setup, directory, ledger, stop
        self.config = config = setup.config
        self.step = self.tokens = 0
        self.loss = math.nan
        self.rates: dict[str, float] = {}  # of the last rollout
        self.failed_saves: list[str] = []
        self.evaluations: dict[str, Any] = {}
        run = config.run
        self.checkpoints = Checkpointer(
            directory.path / run_dir.CHECKPOINTS, run.checkpoint, self._save_failed
        )
        self.references = Checkpointer(directory.path / REFERENCE, run.checkpoint)
        self.writer: MetricWriter | None = None
        self.progress: Progress | None = None
        options = config.sampling
        self.asker = Asker(
            run.model, setup.asked.tokenizer, setup.template, config.prompt_tokens,
            dataclasses.replace(options, temperature=setup.rl.temperature),
            lambda: ledger.phase("compile"),
        )  # fmt: skip
        self.roller = Roller(
            self.asker, setup.tasks, setup.scorer, setup.rl, run.train.batch_size, run.seed,
            ledger.phase, self._place,
        )  # fmt: skip

    def _place(self, rows: Any) -> jax.Array:
        return jax.device_put(rows, sharding(self.setup.mesh, *("batch", None)[: np.ndim(rows)]))

    def say(self, text: str) -> None:
        """A line for the user, above the bar where there is one."""
        if self.progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.progress.message(text)

    def start(self) -> None:
        """Says what is to come; makes the programs, and the state that the run goes on from."""
        setup, run = self.setup, self.config.run
        for line in plan_lines(setup):
            self.say(line)
        _, self.abstract = make_init(run.model, setup.optimizer, setup.mesh)
        vocab_size = setup.asked.tokenizer.vocab_size
        step = make_policy_step(
            run.model, setup.rl, setup.optimizer, setup.schedule,
            max_tokens=self.config.sampling.max_tokens, vocab_size=vocab_size,
        )  # fmt: skip
        keep = setup.rl.routing_replay == "old_policy"
        self._programs = {
            "update": jax.jit(step, donate_argnums=0),
            "old": jax.jit(make_scorer(run.model, setup.rl, vocab_size, keep)),
            "reference": jax.jit(make_scorer(run.model, setup.rl, vocab_size)),
        }
        with self.ledger.phase("startup"):
            found = self._begin()
            self.state, self.step = found.state, found.step
            self.reference = self._reference()
        self.tokens, self.loss = found.tokens, found.loss
        self.ledger.begin_from(self.step, self.tokens)
        self._load_evaluations()
        self.writer = MetricWriter(
            self.directory.path, resume_step=self.step, on_error=self._metrics_failed
        )
        self.progress = Progress(run.train.steps, self.step)
        if "0" not in self.evaluations and self.step == 0:
            self._evaluate()

    def _call(self, name: str, *args: Any) -> Any:
        """Runs a program, compiled at its first call; that is another phase of the bill."""
        program = self._programs[name]
        if not isinstance(program, jax.stages.Compiled):
            with self.ledger.phase("compile"):
                program = self._programs[name] = program.lower(*args).compile()
        return program(*args)

    def _begin(self) -> Beginning:
        """The newest checkpoint's state; or, of a new run, the one that it starts from."""
        if self.directory.resumed and self.checkpoints.steps():
            restored = self.checkpoints.restore(self.abstract)
            for text in restored.messages:
                self.say(text)
            self.say(f"resuming at step {restored.step} of {self.config.run.train.steps}")
            return from_checkpoint(restored)
        return Beginning(self._start_state())

    def _start_state(self) -> TrainState:
        """The other run's weights, with an optimizer of this run's own."""
        empty = Beginning(TrainState(jnp.zeros((), jnp.int32), None, None, None))
        found = from_run(empty, self.setup.start, self.directory.record, self.say).state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        init = jax.jit(self.setup.optimizer.init, out_shardings=shardings.opt_state)
        found = found.replace(opt_state=init(found.params))
        return jax.tree.map(jax.device_put, found, shardings)

    # The reference

    def _refreshed(self, step: int) -> int:
        """The step whose policy is the reference at a step; 0 is the run's start."""
        every = self.setup.rl.reference_every
        return step // every * every if every else 0

    def _reference(self) -> Any:
        """The parameters and router state of the reference; None without a KL term."""
        if not self.setup.rl.kl_weight:
            return None
        step = self._refreshed(self.step)
        if step == 0:
            state = self.state if self.step == 0 else self._start_state()
        elif step == self.step:
            state = self.state
        else:
            state = self.references.restore(self.abstract, step).state
        # A copy: an update overwrites the state.
        return jax.tree.map(lambda leaf: leaf.copy(), (state.params, state.router_state))

    def _refresh_reference(self) -> None:
        every = self.setup.rl.reference_every
        if self.reference is None or not every or self.step % every:
            return
        self.reference = self._reference()
        if self.step not in self.references.steps():  # of a run that was killed after it
            with self.ledger.phase("checkpoint"):
                self.references.save(self.step, self.state, {}, wait=True)

    # Steps

    def train(self) -> str:
        """Steps until the end, a budget or a signal; returns the ledger's status."""
        run = self.config.run
        while self.step < run.train.steps:
            stopped = self._stopped()
            if stopped is not None:
                self.say(f"{stopped[1]}: stopping after step {self.step}")
                return stopped[0]
            began = {**self.ledger.seconds, "reward": self.roller.reward_seconds}
            rollout = self.roller.roll(self._variables(), self.step)
            self._charge_rollout(rollout.tokens)
            with self.ledger.phase("train"):
                metrics = self._train_on(rollout)
            self.step += 1
            self._refresh_reference()
            self._log(rollout, metrics, began)
            every = self.config.evaluation.every
            if every and self.step % every == 0 and self.step < run.train.steps:
                self._evaluate()
            if run.checkpoint.due(self.step, run.train.steps):
                self._save()
        return "completed"

    def _variables(self) -> dict[str, Any]:
        return {"params": self.state.params, "router_state": self.state.router_state}

    def _stopped(self) -> tuple[str, str] | None:
        if self.stop.name is not None:
            return "interrupted", self.stop.name
        ledger = self.ledger
        flops = ledger.total_flops + ledger.rollout_flops
        spent = self.config.run.budget.exceeded(ledger.total_dollars, flops, ledger.total_hours)
        return None if spent is None else ("budget", spent)

    def _charge_rollout(self, tokens: int) -> None:
        self.ledger.add_rollout(tokens, tokens * self.setup.forward_flops)

    def _train_on(self, rollout: Rollout) -> list[Any]:
        """The optimizer steps of a rollout; returns what they measured, on the host.

        Raises:
          NonFiniteLoss: a loss or a gradient is no finite number.
        """
        setup, train = self.setup, self.config.run.train
        rows, flops, tokens = self._scored(rollout.rows)
        count, found = train.batch_size // setup.rl.minibatches, []
        for epoch in range(setup.rl.epochs):
            order = self._order(epoch)
            for start in range(0, train.batch_size, count):
                picked = rows_of(rows, order[start : start + count])
                parts = parts_of(picked, train.micro_batches)
                self.state, metrics = self._call("update", self.state, parts)
                found.append(metrics)
        found = jax.device_get(found)
        for metrics in found:
            ran = int(metrics.tokens)
            tokens += ran
            flops += setup.billing.model_flops(ran, float(metrics.assignments))
            loss, norm = float(metrics.values["loss"]), float(metrics.gradient_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteLoss(
                    f"step {self.step + 1}: loss {loss!r}, gradient norm {norm!r}; the last "
                    "checkpoint stands"
                )
        self.loss = float(np.mean([metrics.values["loss"] for metrics in found]))
        self.tokens += tokens
        self.ledger.add(tokens=tokens, model_flops=flops, steps=1)
        return found

    def _order(self, epoch: int) -> np.ndarray:
        """The order of responses in an epoch; as they are, where there is one step."""
        size = self.config.run.train.batch_size
        if self.setup.optimizer_steps == 1:
            return np.arange(size)
        seed = seeds_of(self.config.run.seed, self.step, epoch, ORDER, count=1)
        return np.random.default_rng(seed).permutation(size)

    def _scored(self, rows: PolicyRows) -> tuple[PolicyRows, float, int]:
        """Rows on the devices, with the log-probabilities that the update needs beside its own;
        the FLOPs of the passes that gave them."""
        setup, rl = self.setup, self.setup.rl
        experts = rows.experts
        rows = jax.tree.map(self._place, rows.replace(experts=None)).replace(experts=experts)
        tokens, passes = int(np.sum(np.asarray(rows.lengths) - 1)), 0
        if setup.optimizer_steps > 1 or rl.routing_replay == "old_policy":
            state = self.state.params, self.state.router_state
            old, chosen = self._call("old", *state, rows)
            rows, passes = rows.replace(old=old), passes + 1
            if chosen is not None:
                rows = rows.replace(experts=chosen)
        if self.reference is not None:
            asked = rows.replace(experts=None, old=None)
            reference, _ = self._call("reference", *self.reference, asked)
            rows, passes = rows.replace(reference=reference), passes + 1
        return rows, passes * tokens * setup.forward_flops, 0

    # What is written

    def _log(self, rollout: Rollout, found: list[Any], began: dict[str, float]) -> None:
        train, ledger = self.config.run.train, self.ledger
        self.rates = rollout.metrics
        self.progress.tick(self.step)
        if self.step % train.log_every and self.step not in (1, train.steps):
            return
        now = {**ledger.seconds, "reward": self.roller.reward_seconds}
        passed = {name: value - began[name] for name, value in now.items()}
        whole = (passed["rollout"] + passed["train"]) or 1.0
        passed["rollout"] -= passed["reward"]
        values = {
            name: float(np.mean([metrics.values[name] for metrics in found]))
            for name in found[0].values
        }
        last = found[-1]
        values |= {
            **rollout.metrics,
            "aux_loss": float(last.aux_loss),
            "gradient_norm": float(np.mean([metrics.gradient_norm for metrics in found])),
            "learning_rate": float(last.learning_rate),
            "tokens": self.tokens,
            "seconds": ledger.total_hours * 3600,
            "dollars": ledger.total_dollars,
            "model_flops": ledger.total_flops,
            **{f"share/{name}": passed[name] / whole for name in ("rollout", "reward", "train")},
        }
        health = router_health(last.router_stats, self._host_state())
        values |= {f"router/{name}": value for name, value in health.items()}
        self.writer.write(self.step, values)
        self.say(
            f"step {self.step}/{train.steps}  reward {values['reward/mean']:.3f}  accuracy "
            f"{values['reward/accuracy']:.3f}  {values['response/tokens']:.1f} tokens an answer  "
            f"rollout {100 * values['share/rollout']:.0f} % of the time  "
            f"${ledger.total_dollars:.4f}"
        )

    def _host_state(self) -> Any:
        return jax.device_get(self.state.router_state)

    def _evaluate(self) -> None:
        """Asks the held-out problems."""
        setup, config = self.setup, self.config.evaluation
        with self.ledger.phase("eval"):
            began = time.monotonic()
            found = ask_held_out(
                self.asker, self._variables(), setup.tasks, config,
                self.config.run.train.batch_size, self._place,
            )  # fmt: skip
            seconds = time.monotonic() - began
        self._charge_rollout(found.tokens)
        told = {"step": self.step, **found.to_dict(), "dollars": self.ledger.total_dollars}
        self.evaluations[str(self.step)] = told
        write_whole(
            self.directory.path / EVALUATIONS, json.dumps(self.evaluations, indent=1) + "\n"
        )
        first = found.measures.pass_at[1]
        self.writer.write(self.step, {
            "eval/pass_at_1": first.mean, "eval/majority": found.measures.majority.mean,
            "eval/formed": found.formed, "eval/response_tokens": found.tokens_mean,
        })  # fmt: skip
        low, high = first.interval
        self.say(
            f"held-out after step {self.step}: pass@1 {first.mean:.3f} ({low:.3f} to {high:.3f}), "
            f"majority@{config.samples} {found.measures.majority.mean:.3f}, in form "
            f"{found.formed:.3f}, {found.tokens_mean:.1f} tokens an answer; {seconds:.1f} s"
        )

    def _load_evaluations(self) -> None:
        file = pathlib.Path(self.directory.path / EVALUATIONS)
        if self.directory.resumed and file.is_file():
            found = json.loads(file.read_text())
            self.evaluations = {k: v for k, v in found.items() if int(k) <= self.step}

    def _save(self) -> None:
        here = Beginning(self.state, self.step, self.tokens, self.step, self.loss)
        with self.ledger.phase("checkpoint"):
            self.checkpoints.save(self.step, self.state, here.extra())

    def _save_failed(self, error: CheckpointError) -> None:
        """Training goes on without a checkpoint that could not be written, and says so."""
        self.failed_saves.append(str(error))
        self.say(f"warning: {error}")

    def _metrics_failed(self, error: MetricsError) -> None:
        self.say(f"warning: {error}")

    def finish(self, status: str) -> str:
        """The last evaluation and checkpoint.

        Raises:
          RunFailed: the last checkpoint could not be saved.
        """
        if status == "completed" and str(self.step) not in self.evaluations:
            self._evaluate()
        self._save()
        with self.ledger.phase("checkpoint"):
            self.checkpoints.finalize()
        if self.step not in self.checkpoints.steps():
            why = (self.failed_saves or ["its folder is gone"])[-1]
            raise RunFailed(f"the last checkpoint was not saved: {why}")
        return status

    def close(self) -> None:
        """Ends threads and closes files, whatever happened before."""
        for part in (self.progress, self.writer, self.checkpoints, self.references):
            if part is not None:
                part.close()
