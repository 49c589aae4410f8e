"""The training loop of one run; ``moejax.training.train`` opens and closes what it stands on."""

import json
import math
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np

from moejax.cost.ledger import Ledger
from moejax.data import (
    Rows,
    TrainIterator,
    baselines,
    batch_fingerprint,
    train_iterator,
    validation_batches,
)
from moejax.models.sampling import generate
from moejax.parallel import sharding, together
from moejax.parallel.rows import LocalRows
from moejax.training import data_account, prepare, run_dir
from moejax.training.beginning import Beginning, announcement, from_checkpoint, from_seed
from moejax.training.checkpoints import Checkpointer, CheckpointError
from moejax.training.failures import Interrupted, NonFiniteLoss, RunFailed
from moejax.training.metrics import MetricWriter
from moejax.training.programs import Programs, compile_programs, hyper
from moejax.training.progress import Progress
from moejax.training.signals import StopRequest
from moejax.training.silent import Silent
from moejax.training.step import Batch, StepMetrics
from moejax.training.step_log import StepLog
from moejax.training.validation import bits_per_byte, validate_dataset

FIELDS = ("tokens", "targets", "segment_ids", "positions")


class Run:
    """One process's part of a run: what the loop holds, and what it does step by step."""

    def __init__(
        self,
        setup: prepare.Setup,
        directory: run_dir.RunDirectory,
        ledger: Ledger,
        stop: StopRequest,
        programs: Callable[[prepare.Setup], Programs] = compile_programs,
    ):
        """Takes what is open already; ``programs`` gives the compiled programs."""
        self.setup, self.directory, self.ledger, self.stop = setup, directory, ledger, stop
        self.config = setup.config
        self._make_programs = programs
        self._first = together.index() == 0  # process 0 alone writes and speaks
        self._vote = together.StopVote()
        self._train_rows, self._eval_rows = _rows_of(setup)
        self.step = self.tokens = 0
        self.val_step: int | None = None
        self.loss = self.val_loss = math.nan
        self.samples: list[str] = []
        self.baselines = baselines(setup.dataset)
        self.log = StepLog(setup, ledger)
        self.input = data_account.InputWait()
        self.source_losses: dict[str, float] = {}  # of a mixture, by the last validation
        self.batches: TrainIterator | None = None
        self._step_flops = 0.0  # of the last step that was read
        self.failed_saves: list[str] = []
        self.checkpoints = Checkpointer(
            directory.path / run_dir.CHECKPOINTS, self.config.checkpoint, self._save_failed
        )
        self.progress: Progress | None = None

    def start(self) -> None:
        """Says what is to come, compiles, and restores or initialises the state."""
        for text in announcement(self.setup, self.directory):
            self._say(text)
        with self.ledger.phase("compile"):
            self.programs, self._hyper = self._make_programs(self.setup), hyper(self.setup)
        for text in self.programs.notes:
            self._say(text)
        self._begin()

    def _say(self, text: str) -> None:
        """A line for the user, above the bar where there is one."""
        if not self._first:
            return
        if self.progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.progress.message(text)

    def _begin(self) -> None:
        """The first state, from the last checkpoint if there is one, and the batches after it."""
        if self.directory.resumed and together.decide(self.checkpoints.steps):
            restored = self.checkpoints.restore(self.programs.abstract)
            for text in restored.messages:
                self._say(text)
            self._say(f"resuming at step {restored.step} of {self.config.train.steps}")
            self._go_from(from_checkpoint(restored))
        else:
            if self.directory.resumed:
                self._say("resuming: the run has no checkpoint yet, so from step 0")
            self._go_from(from_seed(self.programs, self.config.seed))
        self.progress = Progress(self.config.train.steps, self.step) if self._first else Silent()

    def _go_from(self, found: Beginning) -> None:
        """Takes a state to train on from, and opens the batches and the metrics after it."""
        train, data = self.config.train, self.config.data
        self.state, self.step, self.tokens = found.state, found.step, found.tokens
        self.loss, self.val_loss, self.val_step = found.loss, found.val_loss, found.val_step
        self.ledger.begin_from(self.step, self.tokens)
        first = self._first
        self.writer = (
            MetricWriter(self.directory.path, resume_step=self.step) if first else Silent()
        )
        self.batches = train_iterator(
            self.setup.dataset.train, batch_size=train.batch_size, seed=self.config.seed,
            start=found.position, take=self._train_rows.numbers, prefetch=data.prefetch,
        )  # fmt: skip

    def train(self) -> str:
        """Steps until the end, a budget or a signal; returns the ledger's status.

        Step n + 1 is dispatched before the metrics of step n are read.
        """
        steps = self.config.train.steps
        pending: tuple[int, StepMetrics, dict] | None = None
        status = "completed"
        self.log.begin()
        while self.step < steps:
            reason = self._vote.ask(self._stop_reason(in_flight=pending is not None))
            if reason is not None:
                status, why = reason
                self._say(f"{why}: stopping after step {self.step}")
                break
            with self.ledger.phase("data_wait"):
                host_batch = next(self.batches)
            with self.ledger.phase("train"):
                batch = _place(host_batch, self._train_rows)
                with jax.transfer_guard("disallow"):
                    self.state, metrics = self.programs.train_step(self.state, batch, self._hyper)
                self.step += 1
                before, pending = pending, (self.step, metrics, host_batch)
                self._read(before)
                if self._due(self.step):
                    self._read(pending)
                    pending = None
            self.input.step(self.ledger.seconds)
            if self._due(self.step) and self.step < steps:
                self._validate_and_save()
        with self.ledger.phase("train"):
            self._read(pending)
        return status

    def _due(self, step: int) -> bool:
        """Whether a validation or a checkpoint follows the step, which has to be done first."""
        train = self.config.train
        validate = train.eval_every > 0 and step % train.eval_every == 0
        return validate or self.config.checkpoint.due(step, train.steps)

    def _stop_reason(self, in_flight: bool) -> tuple[str, str] | None:
        """What this process has against another step: a status, and why in words."""
        if self.stop.name is not None:
            return "interrupted", self.stop.name
        ledger, train = self.ledger, self.config.train
        # The step in flight is expected to cost what its config says, or the last one if more.
        planned = train.batch_size * train.seq_len * self.setup.billing.flops_per_token
        ahead = max(planned, self._step_flops) * in_flight
        spent = self.config.budget.exceeded(
            ledger.total_dollars, ledger.total_flops + ahead, ledger.total_hours
        )
        return None if spent is None else ("budget", spent)

    def _read(self, done: tuple[int, StepMetrics, dict] | None) -> None:
        """Fetches a step's metrics, charges them and logs them where that is due."""
        if done is None:
            return
        step, metrics, batch = done
        log = self.log.due(step)
        small = metrics.replace(router_stats={}, router_state={})
        fetched = jax.device_get(metrics if log else small)
        tokens = int(fetched.targets)
        self.tokens += tokens
        flops = self.setup.billing.model_flops(tokens, float(fetched.assignments))
        self._step_flops = flops
        self.ledger.add(tokens=tokens, model_flops=flops, steps=1)
        self.loss = float(fetched.loss)
        if not (math.isfinite(self.loss) and math.isfinite(fetched.gradient_norm)):
            self._diverged(step, fetched, batch)
        self.progress.tick(step)
        if log:
            rows = self.rows_read(step)
            self.log.log(step, fetched, self.tokens, rows, self.writer, self.progress)

    def _diverged(self, step: int, metrics: StepMetrics, batch: dict[str, np.ndarray]) -> None:
        """Leaves what is needed to look into a loss that is not finite, and stops the run."""
        self.checkpoints.finalize()
        last_good = self.checkpoints.latest_step()
        record = {
            "step": step,
            "loss": repr(float(metrics.loss)),
            "gradient_norm": repr(float(metrics.gradient_norm)),
            "batch_fingerprint": batch_fingerprint(batch),
            "last_good_checkpoint": last_good,
        }
        if self._first:
            text = json.dumps(record, indent=1) + "\n"
            (self.directory.path / "divergence.json").write_text(text)
            np.savez_compressed(self.directory.path / "divergence_batch.npz", **batch)
        good = "there is no checkpoint" if last_good is None else f"checkpoint {last_good} is good"
        raise NonFiniteLoss(
            f"step {step}: loss {record['loss']}, gradient norm {record['gradient_norm']}; {good}; "
            "divergence.json and divergence_batch.npz hold the batch"
        )

    def _validate_and_save(self) -> None:
        train, step = self.config.train, self.step
        if train.eval_every > 0 and step % train.eval_every == 0:
            self._validate(train.eval_batches)
        if self.config.checkpoint.due(step, train.steps):
            self._save()

    def _validate(self, max_batches: int) -> None:
        """Loss on held-out text, in nats per target and bits per byte.

        Where ``max_batches`` leaves rows out, the bytes per target are still those of them all.
        """
        dataset, train = self.setup.dataset, self.config.train

        def batches(rows: Rows) -> Iterator[Batch]:
            size, own = train.batch_size // train.micro_batches, self._eval_rows
            found = validation_batches(
                rows, batch_size=size, max_batches=max_batches or None, take=own.numbers
            )
            return (_place(batch, own) for batch in found)

        with self.ledger.phase("eval"):
            found = validate_dataset(self.programs.eval_step, self.state, dataset, batches)
        self.val_loss, self.val_step = found.loss, self.step
        self.source_losses = found.sources
        values = {"val_loss": self.val_loss, "val_bits_per_byte": self.bits_per_byte}
        values |= {f"val/router/{name}": value for name, value in found.health.items()}
        values |= data_account.held_out_values(dataset, found.sources)
        self.writer.write(self.step, {**values, "dollars": self.ledger.total_dollars})
        self._say(
            f"validation after step {self.step}: {self.val_loss:.4f} nats/token, "
            f"{self.bits_per_byte:.4f} bits/byte (gzip -9 {self.baselines['gzip']:.4f}, "
            f"unigram {self.baselines['unigram']:.4f})"
            + data_account.held_out_line(dataset, found.sources)
        )

    @property
    def bits_per_byte(self) -> float:
        """The last validation loss over the bytes that a held-out target stands for."""
        return bits_per_byte(self.val_loss, self.setup.dataset)

    def rows_read(self, step: int) -> int:
        """Training rows drawn until a step, those of batches that were passed over included."""
        passed_over = self.batches.position - self.step if self.batches else 0
        return (step + passed_over) * self.config.train.batch_size

    def _save(self) -> None:
        # Only a loss of this very state may make it the best one.
        val_loss = self.val_loss if self.val_step == self.step else None
        with self.ledger.phase("checkpoint"):
            self.checkpoints.save(self.step, self.state, self._here().extra(), val_loss=val_loss)

    def _here(self) -> Beginning:
        """Where the run is, for another process to go on from."""
        return Beginning(
            self.state, self.step, self.tokens, self.batches.position, self.loss, self.val_loss,
            self.val_step,
        )  # fmt: skip

    def _save_failed(self, error: CheckpointError) -> None:
        """Training goes on without a checkpoint that could not be written, and says so."""
        self.failed_saves.append(str(error))
        self._say(f"warning: {error}")

    def finish(self, status: str) -> None:
        """The last validation, checkpoint and sample."""
        if waited := self.input.line(self.ledger.seconds):
            self._say(waited)
        if status == "completed":
            self._validate(0)
        self._save()
        with self.ledger.phase("checkpoint"):
            self.checkpoints.finalize()
        if self.step not in together.decide(self.checkpoints.steps):
            raise RunFailed(f"the last checkpoint was not saved: {self.failed_saves[-1]}")
        train = self.config.train
        if status == "completed" and train.sample_tokens:
            variables = {"params": self.state.params, "router_state": self.state.router_state}
            with self.ledger.phase("eval"):
                self.samples = generate(
                    self.config.model, variables, self.setup.dataset.tokenizer,
                    train.sample_prompt, tokens=train.sample_tokens, seed=self.config.seed,
                    temperature=0.8,
                )  # fmt: skip

    def close(self) -> None:
        """Ends threads and closes files, whatever happened before."""
        for part in ("progress", "writer", "batches", "checkpoints"):
            if getattr(self, part, None) is not None:
                getattr(self, part).close()


def _rows_of(setup: prepare.Setup) -> tuple[LocalRows, LocalRows]:
    """This process's rows of a training batch, and of a held-out one, as large as a micro-batch."""
    train, where = setup.config.train, sharding(setup.mesh, None, "batch", "length")
    parts, rows, seq_len = train.micro_batches, train.batch_size, train.seq_len
    return LocalRows(where, parts, rows, seq_len), LocalRows(where, 1, rows // parts, seq_len)


def _place(batch: dict[str, np.ndarray], rows: LocalRows) -> Batch:
    """A process's rows on the mesh, as micro-batches."""
    return Batch(*(rows.place(batch[name]) for name in FIELDS))


__all__ = ["Interrupted", "NonFiniteLoss", "Run", "RunFailed"]
