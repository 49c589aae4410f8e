"""What is logged of a step: the line of metrics and the figures on the terminal."""

from typing import Any

from moejax.cost.ledger import Ledger
from moejax.moe.diagnostics import router_health
from moejax.training import charge_exchange, data_account, prepare
from moejax.training.metrics import MetricWriter
from moejax.training.progress import Progress
from moejax.training.step import MTPMetrics, StepMetrics


class StepLog:
    """Logs steps of one process of a run.

    Attributes:
      rate: tokens per second of training, over the last logged interval.
      mfu: over the same interval.
    """

    def __init__(self, setup: prepare.Setup, ledger: Ledger):
        self._setup, self._ledger = setup, ledger
        self.rate = self.mfu = 0.0
        self._mark = (0.0, 0, 0.0)

    def due(self, step: int) -> bool:
        """Whether a step is logged: the first, the last and every ``train.log_every``-th."""
        train = self._setup.config.train
        return step % train.log_every == 0 or step in (1, train.steps)

    def begin(self) -> None:
        """Begins the first interval."""
        ledger = self._ledger
        self._mark = (ledger.seconds["train"], ledger.tokens, ledger.total_flops)

    def log(
        self,
        step: int,
        metrics: StepMetrics,
        tokens: int,
        rows: int,
        writer: MetricWriter,
        progress: Progress,
    ) -> None:
        """Writes a step that has been charged.

        Args:
          step: optimizer steps done.
          metrics: on the host, router statistics included.
          tokens: of the run up to here.
          rows: of training text that were drawn up to here.
          writer: takes the line.
          progress: takes the figures.
        """
        ledger, billing = self._ledger, self._setup.billing
        health = router_health(metrics.router_stats, metrics.router_state)
        charge_exchange.charge(self._setup, ledger, health, ledger.tokens - self._mark[1])
        self._measure()
        loss = float(metrics.loss)
        values = {
            "loss": loss,
            "aux_loss": float(metrics.aux_loss),
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": tokens,
            "tokens_per_second": self.rate,
            "mfu": self.mfu,
            "peak_flops": billing.peak_flops,
            "model_flops": ledger.total_flops,
            "seconds": ledger.total_hours * 3600,
            "dollars": ledger.total_dollars,
            **data_account.epoch_values(self._setup.dataset, rows),
        }
        if metrics.mtp is not None:
            values |= _mtp_values(metrics.mtp)
        values |= {name: float(value) for name, value in (metrics.told or {}).items()}
        values |= {f"router/{name}": value for name, value in health.items()}
        writer.write(step, values)
        train = self._setup.config.train
        planned = prepare.planned_tokens(self._setup) / train.steps
        left = (train.steps - step) * planned / max(self.rate, 1e-9)
        dollars_left = left / 3600 * billing.devices * billing.price.dollars_per_hour
        progress.update(
            step, loss=loss, tokens_per_second=self.rate, mfu=self.mfu,
            peak_flops=billing.peak_flops, dollars=ledger.total_dollars,
            dollars_to_come=dollars_left, seconds_left=left,
        )  # fmt: skip

    def _measure(self) -> None:
        """Rate and MFU since the last logged step."""
        ledger = self._ledger
        seconds, tokens, flops = ledger.seconds["train"], ledger.tokens, ledger.total_flops
        if tokens > self._mark[1] and seconds > self._mark[0]:
            passed = seconds - self._mark[0]
            self.rate = (tokens - self._mark[1]) / passed
            self.mfu = (flops - self._mark[2]) / passed / self._setup.billing.peak_flops
        self._mark = (seconds, tokens, flops)


def _mtp_values(mtp: MTPMetrics) -> dict[str, Any]:
    values = {"mtp/weight": float(mtp.weight)}
    for k, (loss, accepted) in enumerate(zip(mtp.loss, mtp.acceptance, strict=True)):
        values |= {f"mtp/loss_{k}": float(loss), f"mtp/acceptance_{k}": float(accepted)}
    return values
