"""The training loop of one run; ``moejax.training.train`` opens and closes what it stands on."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from moejax.cost.ledger import Ledger
from moejax.data import Rows, baselines, train_iterator, validation_batches
from moejax.models.decode import SamplingConfig
from moejax.models.generate import generate
from moejax.parallel import sharding, together
from moejax.parallel.rows import LocalRows
from moejax.training import data_account, prepare, run_dir, start
from moejax.training.beginning import Beginning, announcement, from_checkpoint, from_seed
from moejax.training.checkpoints import Checkpointer, CheckpointError
from moejax.training.failures import Interrupted, NonFiniteLoss, RunFailed
from moejax.training.guard import BadStep, Guard, Skipping
from moejax.training.local_copies import open_local, restore_newest
from moejax.training.metrics import MetricsError, MetricWriter
from moejax.training.programs import Programs, compile_programs, hyper
from moejax.training.progress import Progress
from moejax.training.rewind import give_up_after, rewind
from moejax.training.signals import StopRequest
from moejax.training.silent import Silent
from moejax.training.step import Batch, StepMetrics
from moejax.training.step_log import StepLog
from moejax.training.validation import ValidationStopped, bits_per_byte, validate_dataset

FIELDS = ("tokens", "targets", "segment_ids", "positions")


class Pending(NamedTuple):
    """A step that was dispatched and not read yet: its number, counted from 1, what it measures,
    its batch on the host, and that batch's position in the input pipeline."""

    step: int
    metrics: StepMetrics
    batch: dict[str, np.ndarray]
    position: int


class Run:
    """One process's part of a run: what the loop holds, and what it does step by step."""

    def __init__(
        self,
        setup: prepare.Setup,
        directory: run_dir.RunDirectory,
        ledger: Ledger,
        stop: StopRequest,
        programs: Callable[[prepare.Setup], Programs] = compile_programs,
        resume_from: int | None = None,
    ):
        """Takes what is open already.

        Args:
          setup: the run.
          directory: its folder.
          ledger: is charged.
          stop: is looked at between steps.
          programs: gives the compiled programs.
          resume_from: the step of the checkpoint to go on from; None for the newest.
        """
        self.setup, self.directory, self.ledger, self.stop = setup, directory, ledger, stop
        self.config = setup.config
        self._make_programs, self._resume_from = programs, resume_from
        self.first = together.index() == 0  # process 0 alone writes and speaks
        self._vote = together.StopVote()
        self._train_rows, self._eval_rows = _rows_of(setup)
        self.step = self.tokens = 0
        self.val_step: int | None = None
        self.loss = self.val_loss = math.nan
        self.samples: list[str] = []
        self.baselines = baselines(setup.dataset)
        self.log = StepLog(setup, ledger)
        self.guard = Guard(self.config.guard)
        self.pending: Pending | None = None
        self.input = data_account.InputWait()
        self.source_losses: dict[str, float] = {}  # of a mixture, by the last validation
        self.batches: Skipping | None = None
        self._step_flops = 0.0  # of the last step that was read
        self.failed_saves: list[str] = []
        self.failed_metrics = 0
        folder, checkpoint = directory.path / run_dir.CHECKPOINTS, self.config.checkpoint
        self.checkpoints = Checkpointer(folder, checkpoint, self._save_failed)
        self.local = open_local(checkpoint, directory, self._copy_failed)
        self.places = [self.checkpoints] + ([self.local] if self.local else [])
        self.progress: Progress | None = None

    def start(self) -> None:
        """Says what is to come, compiles, and restores or initialises the state."""
        for text in announcement(self.setup, self.directory):
            self.say(text)
        with self.ledger.phase("compile"):
            self.programs, self._hyper = self._make_programs(self.setup), hyper(self.setup)
        for text in self.programs.notes:
            self.say(text)
        self._begin()

    def say(self, text: str) -> None:
        """A line for the user, above the bar where there is one."""
        if not self.first:
            return
        if self.progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.progress.message(text)

    def _begin(self) -> None:
        """The first state, from the last checkpoint if there is one, and the batches after it."""
        directory, steps, found = self.directory, self.config.train.steps, None
        if self._resume_from is not None:
            restored = self.checkpoints.restore(self.programs.abstract, self._resume_from)
            give_up_after(self, restored.step)
            found = from_checkpoint(restored)
        elif directory.resumed:
            restored = restore_newest(self.places, self.programs.abstract, self.say)
            found = None if restored is None else from_checkpoint(restored)
        elif self.local is not None:
            self.local.delete()  # of a run that was here before
        if found is not None:
            self.say(f"resuming at step {found.step} of {steps}")
        elif directory.resumed:
            self.say("resuming: the run has no checkpoint yet, so from step 0")
        second = start.second_variables(self.setup, directory.record, self.say)
        self._second = () if second is None else (second,)
        self.go_from(found or self.from_nothing())
        self.progress = Progress(steps, self.step) if self.first else Silent()

    def from_nothing(self) -> Beginning:
        """The state of step 0: of the seed, or of the run that this one starts from."""
        found = from_seed(self.programs, self.config.seed)
        return start.from_run(found, self.setup, self.directory.record, self.say)

    def go_from(self, found: Beginning) -> None:
        """Takes a state to train on from, and opens the batches and the metrics after it."""
        train, data = self.config.train, self.config.data
        self.state, self.step, self.tokens = found.state, found.step, found.tokens
        self.loss, self.val_loss, self.val_step = found.loss, found.val_loss, found.val_step
        self.guard.load(found.guard)
        self.ledger.begin_from(self.step, self.tokens)
        where, failed = self.directory.path, self._metrics_failed
        self.writer = (
            MetricWriter(where, resume_step=self.step, on_error=failed) if self.first else Silent()
        )
        batches = train_iterator(
            self.setup.dataset.train, batch_size=train.batch_size, seed=self.config.seed,
            start=found.position, take=self._train_rows.numbers, prefetch=data.prefetch,
        )  # fmt: skip
        self.batches = Skipping(batches, self.guard.skipped)

    def train(self) -> str:
        """Steps until the end, a budget or a signal; returns the ledger's status."""
        self.log.begin()
        while True:
            try:
                return self._train_on()
            except BadStep as bad:
                rewind(self, bad)

    def _train_on(self) -> str:
        """As ``train``, up to a bad step.

        Step n + 1 is dispatched before the metrics of step n are read.
        """
        steps = self.config.train.steps
        status = "completed"
        while self.step < steps:
            reason = self._vote.ask(self._stop_reason(in_flight=self.pending is not None))
            if reason is not None:
                status, why = reason
                self.say(f"{why}: stopping after step {self.step}")
                break
            with self.ledger.phase("data_wait"):
                host_batch = next(self.batches)
            with self.ledger.phase("train"):
                batch = _place(host_batch, self._train_rows)
                with jax.transfer_guard("disallow"):
                    self.state, metrics = self.programs.train_step(
                        self.state, batch, self._hyper, *self._second
                    )
                self.step += 1
                before = self.pending
                self.pending = Pending(self.step, metrics, host_batch, self.batches.position - 1)
                self._read(before)
                if self._due(self.step):
                    self._read_pending()
            self.input.step(self.ledger.seconds)
            if self._due(self.step) and self.step < steps:
                self._validate_and_save()
        with self.ledger.phase("train"):
            self._read_pending()
        return status

    def _read_pending(self) -> None:
        pending, self.pending = self.pending, None
        self._read(pending)

    def _due(self, step: int) -> bool:
        """Whether a validation or a checkpoint follows the step, which has to be done first."""
        train = self.config.train
        validate = train.eval_every > 0 and step % train.eval_every == 0
        copied = self.local is not None and self.local.due(step)
        return validate or copied or self.config.checkpoint.due(step, train.steps)

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

    def charge(self, done: Pending) -> StepMetrics:
        """Waits for a step, fetches its metrics and charges it."""
        metrics = done.metrics
        if not self.log.due(done.step):
            metrics = metrics.replace(router_stats={}, router_state={})
        fetched = jax.device_get(metrics)
        tokens = int(fetched.tokens)
        self.tokens += tokens
        flops = self.setup.billing.model_flops(tokens, float(fetched.assignments))
        self._step_flops = flops
        self.ledger.add(tokens=tokens, model_flops=flops, steps=1)
        return fetched

    def _read(self, done: Pending | None) -> None:
        """Charges a step, judges its loss and logs it where that is due."""
        if done is None:
            return
        fetched = self.charge(done)
        self.loss = float(fetched.loss)
        why = self.guard.judge(self.loss, float(fetched.gradient_norm))
        if why is not None:
            norm = float(fetched.gradient_norm)
            raise BadStep(done.step, why, self.loss, norm, done.position, done.batch)
        self.progress.tick(done.step)
        if self.log.due(done.step):
            rows = self.rows_read(done.step)
            self.log.log(done.step, fetched, self.tokens, rows, self.writer, self.progress)

    def _validate_and_save(self) -> None:
        train, step = self.config.train, self.step
        if train.eval_every > 0 and step % train.eval_every == 0:
            self._validate(train.eval_batches)
        if self.config.checkpoint.due(step, train.steps):
            self._save()
        elif self.local is not None and self.local.due(step):
            with self.ledger.phase("checkpoint"):
                self.local.copy(step, self.state, self._here().extra())

    def _validate(self, max_batches: int) -> bool:
        """Loss on held-out text, in nats per target and bits per byte.

        Where ``max_batches`` leaves rows out, the bytes per target are still those of them all.

        Returns:
          Whether it came to its end; a signal stops it.
        """
        dataset, train = self.setup.dataset, self.config.train

        def batches(rows: Rows) -> Iterator[Batch]:
            size, own = train.batch_size // train.micro_batches, self._eval_rows
            found = validation_batches(
                rows, batch_size=size, max_batches=max_batches or None, take=own.numbers
            )
            return self._until_asked(_place(batch, own) for batch in found)

        with self.ledger.phase("eval"):
            try:
                found = validate_dataset(self.programs.eval_step, self.state, dataset, batches)
            except ValidationStopped:
                self.say(f"{self.stop.name}: the validation after step {self.step} is left out")
                return False
        self.val_loss, self.val_step = found.loss, self.step
        self.source_losses = found.sources
        values = {"val_loss": self.val_loss, "val_bits_per_byte": self.bits_per_byte}
        values |= {f"val/router/{name}": value for name, value in found.health.items()}
        values |= data_account.held_out_values(dataset, found.sources)
        self.writer.write(self.step, {**values, "dollars": self.ledger.total_dollars})
        self.say(
            f"validation after step {self.step}: {self.val_loss:.4f} nats/token, "
            f"{self.bits_per_byte:.4f} bits/byte (gzip -9 {self.baselines['gzip']:.4f}, "
            f"unigram {self.baselines['unigram']:.4f})"
            + data_account.held_out_line(dataset, found.sources)
        )
        return True

    def _until_asked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches until a signal comes: held-out text may take longer than the grace period."""
        for batch in batches:
            if self.stop.name is not None and together.count() == 1:
                raise ValidationStopped
            yield batch

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
        # What is held out of preferences says nothing of their loss.
        judged = self.val_step == self.step and self.config.preferences is None
        val_loss = self.val_loss if judged else None
        with self.ledger.phase("checkpoint"):
            self.checkpoints.save(self.step, self.state, self._here().extra(), val_loss=val_loss)

    def _here(self) -> Beginning:
        """Where the run is, for another process to go on from."""
        return Beginning(
            self.state, self.step, self.tokens, self.batches.position, self.loss, self.val_loss,
            self.val_step, self.guard.state(),
        )  # fmt: skip

    def _save_failed(self, error: CheckpointError) -> None:
        """Training goes on without a checkpoint that could not be written, and says so."""
        self.failed_saves.append(str(error))
        self.say(f"warning: {error}")

    def _copy_failed(self, error: CheckpointError) -> None:
        """Training goes on without a local copy that could not be written, and says so."""
        self.say(f"warning: local copy in {self.local.directory}: {error}")

    def _metrics_failed(self, error: MetricsError) -> None:
        """Training goes on without a line that could not be written, and says so the first time."""
        if not self.failed_metrics:
            self.say(f"warning: {error}; training goes on, and lines are lost until there is room")
        self.failed_metrics += 1

    def finish(self, status: str) -> str:
        """The last validation, checkpoint and sample; returns the ledger's status.

        Raises:
          NonFiniteLoss: of the held-out text.
          RunFailed: the last checkpoint could not be saved.
        """
        if waited := self.input.line(self.ledger.seconds):
            self.say(waited)
        if status == "completed" and not self._validate(0):
            status = "interrupted"
        if status == "completed" and not math.isfinite(self.val_loss):
            raise NonFiniteLoss(
                f"the last validation's loss is {self.val_loss}; the parameters of step "
                f"{self.step} are not saved"
            )
        self._save()
        with self.ledger.phase("checkpoint"):
            self.checkpoints.finalize()
        if self.step not in together.decide(self.checkpoints.steps):
            why = (self.failed_saves or ["its folder is gone"])[-1]
            raise RunFailed(f"the last checkpoint was not saved: {why}")
        if status == "completed" and self.local is not None:
            self.local.delete()
        train = self.config.train
        if status == "completed" and train.sample_tokens:
            variables = {"params": self.state.params, "router_state": self.state.router_state}
            with self.ledger.phase("eval"):
                self.samples = generate(
                    self.config.model, variables, self.setup.dataset.tokenizer,
                    train.sample_prompt, seed=self.config.seed,
                    options=SamplingConfig(max_tokens=train.sample_tokens, temperature=0.8),
                ).texts  # fmt: skip
        return status

    def close(self) -> None:
        """Ends threads and closes files, whatever happened before."""
        for part in ("progress", "writer", "batches", "local", "checkpoints"):
            if getattr(self, part, None) is not None:
                getattr(self, part).close()


def _rows_of(setup: prepare.Setup) -> tuple[LocalRows, LocalRows]:
    """This process's rows of a training batch, and of a held-out one, as large as a micro-batch."""
    train, where = setup.config.train, sharding(setup.mesh, None, "batch", "length")
    parts, rows, seq_len = train.micro_batches, train.batch_size, train.seq_len
    return LocalRows(where, parts, rows, seq_len), LocalRows(where, 1, rows // parts, seq_len)


def _place(batch: dict[str, np.ndarray], rows: LocalRows) -> Batch:
    """A process's rows on the mesh, as micro-batches; with weights where the text has some."""
    names = [*FIELDS, "weights"] if "weights" in batch else FIELDS
    return Batch(*(rows.place(batch[name]) for name in names))


__all__ = ["Interrupted", "NonFiniteLoss", "Run", "RunFailed"]
