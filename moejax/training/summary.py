"""What ``summary.json`` holds of a run."""

import math
from typing import TYPE_CHECKING, Any

from moejax.parallel import together
from moejax.training import data_account, prepare

if TYPE_CHECKING:
    from moejax.training.loop import Run


def summarize(run: "Run", status: str) -> dict[str, Any]:
    """The outcome of a run, JSON-ready, whatever it came to."""
    ledger, setup = run.ledger, run.setup
    billing, choice, dataset = setup.billing, setup.choice, setup.dataset
    finite = lambda value: value if math.isfinite(value) else None
    train_seconds = ledger.seconds["train"]
    return {
        "status": status,
        "processes": together.count(),
        "step": run.step,
        "tokens": run.tokens,
        "loss": finite(run.loss),
        "val_loss": finite(run.val_loss),
        "val_bits_per_byte": finite(run.bits_per_byte),
        "val_step": run.val_step,
        "baselines": run.baselines,
        "bytes_per_token": dataset.validation_bytes / dataset.validation_tokens,
        "tokens_per_second": ledger.tokens / train_seconds if train_seconds else 0.0,
        "compile_seconds": ledger.seconds["compile"],
        "seconds": ledger.seconds,
        "data_wait_share": run.input.share(ledger.seconds),
        **data_account.summary(dataset, run.rows_read(run.step), run.source_losses),
        "mfu": ledger.mfu,
        "peak_flops": billing.peak_flops,
        "peak_source": billing.peak_source,
        "dispatch": choice and choice.dispatch,
        "dispatch_reason": choice and choice.dispatch_reason,
        "dispatch_products": setup.products,
        "exchange": choice and choice.exchange,
        "exchange_reason": choice and choice.exchange_reason,
        "leaks": prepare.leaks(run.config.model.moe, choice),
        "dollars": ledger.total_dollars,
        "model_flops": ledger.total_flops,
        "failed_saves": run.failed_saves,
        "failed_metrics": run.failed_metrics,
        "rewinds": len(run.guard.rewound),
        "rewound": run.guard.rewound,
        "skipped_batches": len(run.guard.skipped),
        "samples": run.samples,
        "fingerprint": run.directory.record["fingerprint"],
        "data_fingerprint": dataset.fingerprint,
    }
