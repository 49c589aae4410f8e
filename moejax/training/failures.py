"""How a run may end before its end."""


class RunFailed(Exception):
    """A run that cannot go on; its ledger is closed as failed."""


class Interrupted(RunFailed):
    """A run that was asked to stop; it can go on from its last checkpoint."""


class NonFiniteLoss(RunFailed):
    """A loss or a gradient that is not a finite number."""
