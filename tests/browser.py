"""Debian's Chromium, headless, by the DevTools protocol: pages as a reader sees them."""

import base64
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import urllib.request

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 60.0  # seconds for a start or an answer, on a busy machine


def needed() -> None:
    """Skips the test where there is no browser."""
    if PROGRAM is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    pytest.importorskip("websocket", reason="websocket-client is not installed (extra test)")


@contextlib.contextmanager
def browser():
    """A running browser; its pages are opened with ``open``."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        process = subprocess.Popen(
            [PROGRAM, "--headless=new", *sandbox, "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars",
             "--force-device-scale-factor=1", "--disable-background-networking",
             "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield Browser(_port(pathlib.Path(profile), process))
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(profile: pathlib.Path, process: subprocess.Popen) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int((profile / "DevToolsActivePort").read_text().split("\n")[0])
        time.sleep(0.05)
    raise RuntimeError(f"{PROGRAM} did not start (status {process.poll()})")


class Browser:
    """A browser that listens on a port."""

    def __init__(self, port: int):
        self._port = port

    @contextlib.contextmanager
    def open(self, file: pathlib.Path, width: int = 1280, dark: bool = False, height: int = 900):
        """A page that has loaded a file, in a window so wide and a system's theme."""
        place = f"http://127.0.0.1:{self._port}/json/new?about:blank"
        with urllib.request.urlopen(urllib.request.Request(place, method="PUT"), timeout=30) as f:
            target = json.load(f)
        page = Page(target["webSocketDebuggerUrl"])
        try:
            page.prepare(width, height, dark)
            page.load(file.resolve().as_uri())
            yield page
        finally:
            page.close()


class Page:
    """A page, what it asked the network for, what of it was blocked, and what it complained of."""

    def __init__(self, address: str):
        import websocket

        self._socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self._count = 0
        self.requests: list[str] = []
        self.blocked: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False

    def call(self, method: str, **parameters):
        """The result of one command of the protocol; events on the way are noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict) -> None:
        method, values = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            address = values["request"]["url"]
            if not address.startswith("data:"):  # what a page holds itself
                self.requests.append(address)
        elif method == "Network.loadingFailed" and values.get("blockedReason"):
            self.blocked.append(values["blockedReason"])
        elif method == "Log.entryAdded":
            self.complaints.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(values["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(values["exceptionDetails"]))
        elif method == "Page.loadEventFired":
            self._loaded = True

    def prepare(self, width: int, height: int, dark: bool) -> None:
        """Sets window and theme, and listens."""
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        self.theme(dark)

    def theme(self, dark: bool) -> None:
        """The system's theme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def load(self, address: str) -> None:
        """Goes to an address and waits until all is there."""
        self._loaded = False
        self.call("Page.navigate", url=address)
        while not self._loaded:
            self._note(json.loads(self._socket.recv()))

    def evaluate(self, expression: str):
        """The JSON value of an expression within the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, path: pathlib.Path, whole: bool = True) -> bytes:
        """A picture of the page, as a PNG file."""
        result = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        data = base64.b64decode(result["data"])
        path.write_bytes(data)
        return data

    def pdf(self, path: pathlib.Path) -> bytes:
        """The page on paper, A4."""
        result = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True,
                           paperWidth=8.27, paperHeight=11.69)  # fmt: skip
        data = base64.b64decode(result["data"])
        path.write_bytes(data)
        return data

    def close(self) -> None:
        """Closes the page."""
        with contextlib.suppress(Exception):
            self.call("Page.close")
        self._socket.close()
