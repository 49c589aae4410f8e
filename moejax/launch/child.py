"""What a process that ``moejax launch`` starts does first: it makes sure to end with its parent."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "MOEJAX_LAUNCHER"  # environment: the launcher's process id
PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Has this process killed once its parent has gone, however that ended."""
    with contextlib.suppress(OSError, AttributeError):  # Linux does it even for a stopped process
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> int:
    """Runs a moejax command line, the arguments of this process."""
    end_with_parent(int(os.environ[PARENT]))
    from moejax import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
