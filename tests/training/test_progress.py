"""Progress: exact plain lines, and what a terminal shows."""

import io
import os
import pty
import re
import sys
import threading

import pytest
from rich.console import Console

from moejax.training.progress import Progress, format_dollars, format_seconds, format_si

FIGURES = dict(
    loss=3.21449,
    tokens_per_second=12_345,
    mfu=0.312,
    peak_flops=0.21e12,
    dollars=0.00123,
    dollars_to_come=0.0111,
    seconds_left=200,
)
LINE = "loss 3.214  12.3k tokens/s  MFU 31.2 % of 0.21 TFLOP/s  $0.0012 so far, $0.011 to come  3 min 20 s left"  # fmt: skip # noqa: E501


def test_plain_lines(capsys):
    with Progress(1000, start_step=90) as progress:
        progress.message("resumed at step 90")
        for step in range(91, 101):
            progress.tick(step)
        progress.update(100, **FIGURES)
        progress.update(200, loss=float("nan"))
        progress.update(300, loss=2.0, mfu=0.05, dollars=1.5)
        progress.close()
        progress.message("done [bold]100 %[/bold]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "resumed at step 90",
        f"step 100/1000  {LINE}",
        "step 200/1000  loss nan",
        "step 300/1000  loss 2  MFU 5.0 %  $1.50 so far",
        "done [bold]100 %[/bold]",
    ]


def test_lines_go_to_the_stream_given(capsys):
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        progress.update(10, loss=1.0)
    assert stream.getvalue() == "step 10/10  loss 1\n"
    assert capsys.readouterr() == ("", "")


def without_control_codes(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")


def test_live_bar_shows_everything_and_messages_stand_above_it():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=140, color_system=None)
    with Progress(1000, start_step=90, console=console) as progress:
        progress.tick(95)
        progress.update(100, **FIGURES)
        progress.message("checkpoint 100 saved [in brackets]")
        progress.tick(110)
    shown = without_control_codes(file.getvalue())
    assert "step 90/1000" in shown and "step 100/1000" in shown and " 10%" in shown
    assert LINE in shown
    assert shown.count("checkpoint 100 saved [in brackets]\n") == 1
    after = shown.split("checkpoint 100 saved [in brackets]")[1]
    assert "step 110/1000" in after and LINE in after, "the bar is drawn again below the message"
    progress.close()
    progress.message("the end")
    assert file.getvalue().endswith("the end\n")


def on_terminal(monkeypatch, term):
    """What a Progress writes on a pseudo-terminal, and on standard output meanwhile."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "200")
    master, slave = pty.openpty()
    received = []

    def drain():
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            received.append(data)

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        stdout = sys.stdout
        with Progress(50, stream=stream) as progress:
            assert sys.stdout is stdout, "standard output is left alone"
            progress.update(25, **FIGURES)
            progress.message("hello")
            progress.tick(50)
    reader.join()
    os.close(master)
    return b"".join(received).decode()


def test_terminal_is_found_by_itself(monkeypatch, capsys):
    text = on_terminal(monkeypatch, "xterm")
    assert "\x1b[" in text, "drawn with control codes"
    shown = without_control_codes(text)
    assert "step 25/50" in shown and "step 50/50" in shown and LINE in shown and "hello" in shown
    assert capsys.readouterr() == ("", "")


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    text = on_terminal(monkeypatch, "dumb").replace("\r\n", "\n")
    assert text == f"step 25/50  {LINE}\nhello\n"


@pytest.mark.parametrize(
    "dollars, text",
    [
        (0, "$0.00"), (0.1, "$0.10"), (0.094, "$0.094"), (0.0949, "$0.095"), (0.05, "$0.050"),
        (0.00996, "$0.010"), (0.00034, "$0.00034"), (1.2e-7, "$0.00000012"), (1.005e-3, "$0.0010"),
        (3.14159, "$3.14"), (1234.5, "$1,234.50"), (5_576_000, "$5,576,000"), (-2.5, "-$2.50"),
        (float("nan"), "$?"), (float("inf"), "$?"),
    ],
)  # fmt: skip
def test_format_dollars(dollars, text):
    assert format_dollars(dollars) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"), (0.352, "0.35 s"), (0.999, "1.0 s"), (3.21, "3.2 s"), (9.97, "10 s"),
        (42.4, "42 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"), (86_399, "1 d 00 h"), (4.9 * 86_400, "4 d 22 h"),
        (float("nan"), "?"), (float("inf"), "?"), (-1, "?"),
    ],
)  # fmt: skip
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"), (7, "7"), (0.5, "0.5"), (999, "999"), (999.9, "1.00k"), (1000, "1.00k"),
        (12_345, "12.3k"), (123_456, "123k"), (999_999, "1.00M"), (2.1e11, "210G"),
        (3.3e24, "3.30Y"), (float("nan"), "?"), (-4_500, "-4.50k"),
    ],
)  # fmt: skip
def test_format_si(value, text):
    assert format_si(value) == text


def test_format_si_with_a_unit():
    assert format_si(2.1e11, "FLOP/s") == "210 GFLOP/s"
    assert format_si(42, "B") == "42 B"
