"""A peer in a process of its own, which does one step whenever it is told to, and idles else."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from moejax.bench.timing import Window
from moejax.config import UserError

SCRIPT = pathlib.Path(__file__).with_name("peer_transformers.py")

# A thread that waits must not spin: the other side measures meanwhile.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class PeerFailed(Exception):
    """The peer's process said what went wrong, or ended without an answer."""


class PeerProcess:
    """The parent's side of the protocol in ``peer_transformers``; a context manager.

    Attributes:
      description: what the peer said of itself when it was ready.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        command: Sequence[str] = (),
        timeout: float = 900.0,
    ):
        """Starts the process and waits until it is ready.

        Args:
          settings: first line to the peer.
          command: the program; empty for Transformers'.
          timeout: seconds for one answer.

        Raises:
          UserError: PyTorch or Transformers is missing there.
          PeerFailed: it could not be built.
        """
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._timeout = timeout
        # -P keeps this folder's modules from hiding others of their names.
        command = command or (sys.executable, "-P", str(SCRIPT))
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
        try:
            self.description = self._ask(settings)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def window(self, passes: str) -> Window:
        """A window of steps, by the peer's own clock."""
        return lambda calls: sum(self._ask(passes)["ms"] for _ in range(calls)) / 1e3

    def close(self) -> None:
        """Ends the process, kindly at first."""
        process = self._process
        if process.poll() is None:
            try:
                process.stdin.write('"stop"\n')
                process.stdin.close()
                process.wait(10)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                process.kill()
        process.wait()
        process.stdout.close()
        self._errors.close()

    def _ask(self, question: Any) -> dict[str, Any]:
        """Sends one line and returns the answer to it."""
        timer = threading.Timer(self._timeout, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        try:
            answer = json.loads(line)
        except ValueError:
            raise PeerFailed(f"the peer ended without an answer: {self._last_words()}") from None
        if "error" in answer:
            self._explain(answer["error"])
        return answer

    def _explain(self, error: str) -> None:
        if error.startswith(("ModuleNotFoundError", "ImportError")):
            raise UserError(
                f"--against = 'transformers': {error}; install the extra: "
                "pip install 'moejax[parity]'"
            )
        raise PeerFailed(error)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1][:300] if lines else f"no output in {self._timeout:g} s"
