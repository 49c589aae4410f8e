"""How a run may end before its end."""


class RunFailed(Exception):
    """A run that cannot go on; its ledger is closed as failed."""


class Interrupted(RunFailed):
    """A run that was asked to stop; it can go on from its last checkpoint."""


class InterruptedAtOnce(Interrupted):
    """A run that was asked to stop before its first step; what is being compiled goes on in threads
    that cannot be stopped, and need not be waited for."""


class Diverged(RunFailed):
    """A loss that the divergence guard takes for bad."""


class NonFiniteLoss(Diverged):
    """A loss or a gradient that is not a finite number."""
