"""The training loop of one run; ``moejax.training.train`` opens and closes what it stands on."""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.cost.ledger import Ledger
from moejax.cost.plan_text import format_plan
from moejax.data import baselines, batch_fingerprint, train_iterator, validation_batches
from moejax.models.sampling import generate
from moejax.moe.diagnostics import router_health
from moejax.parallel import sharding
from moejax.training import charge_exchange, prepare, run_dir
from moejax.training.checkpoints import Checkpointer, CheckpointError
from moejax.training.metrics import MetricWriter
from moejax.training.programs import Programs, compile_programs, hyper
from moejax.training.progress import Progress
from moejax.training.signals import StopRequest
from moejax.training.state import TrainState
from moejax.training.step import Batch, StepMetrics
from moejax.training.validation import validate

FIELDS = ("tokens", "targets", "segment_ids", "positions")


class RunFailed(Exception):
    """A run that cannot go on; its ledger is closed as failed."""


class Interrupted(RunFailed):
    """A run that was asked to stop; it can go on from its last checkpoint."""


class NonFiniteLoss(RunFailed):
    """A loss or a gradient that is not a finite number."""


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
        self._rows = sharding(setup.mesh, None, "batch", "length")
        self.step = self.tokens = 0
        self.val_step: int | None = None
        self.loss = self.val_loss = math.nan
        self.samples: list[str] = []
        self._baselines = baselines(setup.dataset)
        self.rate = 0.0  # tokens per second of training, over the last logged interval
        self.mfu = 0.0
        self._step_flops = 0.0  # of the last step that was read
        self._mark = (0.0, 0, 0.0)
        self._failed_saves: list[str] = []
        self.checkpoints = Checkpointer(
            directory.path / run_dir.CHECKPOINTS, self.config.checkpoint, self._save_failed
        )
        self.progress: Progress | None = None

    def start(self) -> None:
        """Says what is to come, compiles, and restores or initialises the state."""
        self._announce()
        with self.ledger.phase("compile"):
            self.programs, self._hyper = self._make_programs(self.setup), hyper(self.setup)
        for text in self.programs.notes:
            self._say(text)
        self._begin()

    def _announce(self) -> None:
        lines = [format_plan(prepare.plan_run(self.setup)), prepare.epochs_line(self.setup)]
        setup = self.setup
        lines += prepare.precision_lines(setup.config.model)
        lines += prepare.back_end_lines(setup.config.model.moe, setup.choice, setup.products)
        provenance = self.setup.dataset.provenance
        if "warning" in provenance:
            lines.append(f"warning: {provenance['warning']}")
        lines += self.directory.changes
        for text in lines:
            self._say(text)

    def _say(self, text: str) -> None:
        """A line for the user, above the bar where there is one."""
        if self.progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.progress.message(text)

    def _begin(self) -> None:
        """The first state, from the last checkpoint if there is one, and the batches after it."""
        train, data, position = self.config.train, self.config.data, 0
        if self.directory.resumed and self.checkpoints.steps():
            restored = self.checkpoints.restore(self.programs.abstract)
            self.state, self.step = restored.state, restored.step
            self.val_loss = restored.extra["val_loss"] or math.nan
            self.loss, self.tokens = restored.extra["loss"], restored.extra["tokens"]
            position = restored.extra["data_position"]
            self.val_step = restored.extra["val_step"]
            for text in restored.messages:
                self._say(text)
            self._say(f"resuming at step {self.step} of {train.steps}")
        else:
            if self.directory.resumed:
                self._say("resuming: the run has no checkpoint yet, so from step 0")
            self.state: TrainState = self.programs.init(jax.random.key(self.config.seed))
        self.ledger.begin_from(self.step, self.tokens)
        self.progress = Progress(train.steps, self.step)
        self.writer = MetricWriter(self.directory.path, resume_step=self.step)
        self.batches = train_iterator(
            self.setup.dataset.train, batch_size=train.batch_size, seed=self.config.seed,
            start=position, process_index=jax.process_index(),
            process_count=jax.process_count(), prefetch=data.prefetch,
        )  # fmt: skip

    def train(self) -> str:
        """Steps until the end, a budget or a signal; returns the ledger's status.

        Step n + 1 is dispatched before the metrics of step n are read.
        """
        steps = self.config.train.steps
        pending: tuple[int, StepMetrics, dict] | None = None
        status = "completed"
        self._mark = (self.ledger.seconds["train"], 0, self.ledger.total_flops)
        while self.step < steps:
            reason = self._stop_reason(in_flight=pending is not None)
            if reason is not None:
                status, text = reason
                self._say(text)
                break
            with self.ledger.phase("data_wait"):
                host_batch = next(self.batches)
            with self.ledger.phase("train"):
                batch = self._place(host_batch, self.config.train.micro_batches)
                with jax.transfer_guard("disallow"):
                    self.state, metrics = self.programs.train_step(self.state, batch, self._hyper)
                self.step += 1
                before, pending = pending, (self.step, metrics, host_batch)
                self._read(before)
                if self._due(self.step):
                    self._read(pending)
                    pending = None
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
        if self.stop.name is not None:
            return "interrupted", f"{self.stop.name}: stopping after step {self.step}"
        ledger, train = self.ledger, self.config.train
        # The step in flight is expected to cost what its config says, or the last one if more.
        planned = train.batch_size * train.seq_len * self.setup.billing.flops_per_token
        ahead = max(planned, self._step_flops) * in_flight
        spent = self.config.budget.exceeded(
            ledger.total_dollars, ledger.total_flops + ahead, ledger.total_hours
        )
        return None if spent is None else ("budget", f"{spent}: stopping after step {self.step}")

    def _place(self, batch: dict[str, np.ndarray], parts: int) -> Batch:
        """A process's rows on the mesh, as micro-batches."""
        split = lambda rows: rows.reshape(parts, -1, rows.shape[-1])
        place = lambda rows: jax.make_array_from_process_local_data(self._rows, split(rows))
        return Batch(*(place(batch[name]) for name in FIELDS))

    def _read(self, done: tuple[int, StepMetrics, dict] | None) -> None:
        """Fetches a step's metrics, charges them and logs them where that is due."""
        if done is None:
            return
        step, metrics, batch = done
        train, billing = self.config.train, self.setup.billing
        log = step % train.log_every == 0 or step == train.steps or step == 1
        small = metrics.replace(router_stats={}, router_state={})
        fetched = jax.device_get(metrics if log else small)
        tokens = int(fetched.targets)
        self.tokens += tokens
        flops = billing.model_flops(tokens, float(fetched.assignments))
        self._step_flops = flops
        self.ledger.add(tokens=tokens, model_flops=flops, steps=1)
        self.loss = float(fetched.loss)
        if not (math.isfinite(self.loss) and math.isfinite(fetched.gradient_norm)):
            self._diverged(step, fetched, batch)
        self.progress.tick(step)
        if log:
            self._log(step, fetched)

    def _log(self, step: int, metrics: StepMetrics) -> None:
        ledger, billing = self.ledger, self.setup.billing
        health = router_health(metrics.router_stats, metrics.router_state)
        charge_exchange.charge(self.setup, ledger, health, ledger.tokens - self._mark[1])
        seconds, tokens, flops = ledger.seconds["train"], ledger.tokens, ledger.total_flops
        if tokens > self._mark[1] and seconds > self._mark[0]:
            passed = seconds - self._mark[0]
            self.rate = (tokens - self._mark[1]) / passed
            self.mfu = (flops - self._mark[2]) / passed / billing.peak_flops
        self._mark = (seconds, tokens, flops)
        values = {
            "loss": self.loss,
            "aux_loss": float(metrics.aux_loss),
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": self.tokens,
            "tokens_per_second": self.rate,
            "mfu": self.mfu,
            "peak_flops": billing.peak_flops,
            "model_flops": ledger.total_flops,
            "seconds": ledger.total_hours * 3600,
            "dollars": ledger.total_dollars,
        }
        if metrics.mtp is not None:
            values["mtp/weight"] = float(metrics.mtp.weight)
            for k, (loss, accepted) in enumerate(
                zip(metrics.mtp.loss, metrics.mtp.acceptance, strict=True)
            ):
                values |= {f"mtp/loss_{k}": float(loss), f"mtp/acceptance_{k}": float(accepted)}
        values |= {f"router/{name}": value for name, value in health.items()}
        self.writer.write(step, values)
        train = self.config.train
        planned = prepare.planned_tokens(self.setup) / train.steps
        left = (train.steps - step) * planned / max(self.rate, 1e-9)
        dollars_left = left / 3600 * billing.devices * billing.price.dollars_per_hour
        self.progress.update(
            step, loss=self.loss, tokens_per_second=self.rate, mfu=self.mfu,
            peak_flops=billing.peak_flops, dollars=ledger.total_dollars,
            dollars_to_come=dollars_left, seconds_left=left,
        )  # fmt: skip

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
        (self.directory.path / "divergence.json").write_text(json.dumps(record, indent=1) + "\n")
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
        with self.ledger.phase("eval"):
            batches = validation_batches(
                dataset.validation,
                batch_size=train.batch_size // train.micro_batches,
                max_batches=max_batches or None,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            placed = (self._place(batch, 1) for batch in batches)
            found = validate(self.programs.eval_step, self.state, placed)
        self.val_loss, self.val_step = found.loss, self.step
        values = {"val_loss": self.val_loss, "val_bits_per_byte": self.bits_per_byte}
        values |= {f"val/router/{name}": value for name, value in found.health.items()}
        self.writer.write(self.step, {**values, "dollars": self.ledger.total_dollars})
        self._say(
            f"validation after step {self.step}: {self.val_loss:.4f} nats/token, "
            f"{self.bits_per_byte:.4f} bits/byte (gzip -9 {self._baselines['gzip']:.4f}, "
            f"unigram {self._baselines['unigram']:.4f})"
        )

    @property
    def bits_per_byte(self) -> float:
        """The last validation loss over the bytes that a held-out target stands for."""
        dataset = self.setup.dataset
        return self.val_loss / math.log(2) * dataset.validation_tokens / dataset.validation_bytes

    def _save(self) -> None:
        # Only a loss of this very state may make it the best one.
        val_loss = self.val_loss if self.val_step == self.step else None
        extra = {
            "data_position": self.batches.position,
            "loss": self.loss,
            "val_loss": self.val_loss if math.isfinite(self.val_loss) else None,
            "val_step": self.val_step,
            "tokens": self.tokens,
        }
        with self.ledger.phase("checkpoint"):
            self.checkpoints.save(self.step, self.state, extra, val_loss=val_loss)

    def _save_failed(self, error: CheckpointError) -> None:
        """Training goes on without a checkpoint that could not be written, and says so."""
        self._failed_saves.append(str(error))
        self._say(f"warning: {error}")

    def finish(self, status: str) -> None:
        """The last validation, checkpoint and sample."""
        if status == "completed":
            self._validate(0)
        self._save()
        with self.ledger.phase("checkpoint"):
            self.checkpoints.finalize()
        if self.step not in self.checkpoints.steps():
            raise RunFailed(f"the last checkpoint was not saved: {self._failed_saves[-1]}")
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

    def summary(self, status: str) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        ledger, billing, choice = self.ledger, self.setup.billing, self.setup.choice
        dataset = self.setup.dataset
        finite = lambda value: value if math.isfinite(value) else None
        train_seconds = ledger.seconds["train"]
        return {
            "status": status,
            "step": self.step,
            "tokens": self.tokens,
            "loss": finite(self.loss),
            "val_loss": finite(self.val_loss),
            "val_bits_per_byte": finite(self.bits_per_byte),
            "val_step": self.val_step,
            "baselines": self._baselines,
            "bytes_per_token": dataset.validation_bytes / dataset.validation_tokens,
            "tokens_per_second": ledger.tokens / train_seconds if train_seconds else 0.0,
            "compile_seconds": ledger.seconds["compile"],
            "seconds": ledger.seconds,
            "mfu": ledger.mfu,
            "peak_flops": billing.peak_flops,
            "peak_source": billing.peak_source,
            "dispatch": choice and choice.dispatch,
            "dispatch_reason": choice and choice.dispatch_reason,
            "dispatch_products": self.setup.products,
            "exchange": choice and choice.exchange,
            "exchange_reason": choice and choice.exchange_reason,
            "leaks": prepare.leaks(self.config.model.moe, choice),
            "dollars": ledger.total_dollars,
            "model_flops": ledger.total_flops,
            "failed_saves": self._failed_saves,
            "samples": self.samples,
            "fingerprint": self.directory.record["fingerprint"],
            "data_fingerprint": dataset.fingerprint,
        }
