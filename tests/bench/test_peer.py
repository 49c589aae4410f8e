"""The protocol between this process and the peer's, with one that computes nothing; and the real
peer, where PyTorch is installed."""

import pathlib
import sys

import pytest

from moejax.bench.models import describe, find_model
from moejax.bench.peer import PeerFailed, PeerProcess
from moejax.config import UserError
from moejax.moe.routers import SoftmaxTopKOptions

FAKE = (sys.executable, str(pathlib.Path(__file__).with_name("fake_peer.py")))
SIZES = {"D": 8, "L": 2, "H": 2, "E": 4, "K": 2, "F": 8, "V": 16, "B": 2, "S": 8}


def settings(mode=None):
    return {"sizes": SIZES, "dtype": "float32", "mode": mode}


def test_a_window_is_steps_by_the_peers_own_clock():
    with PeerProcess(settings(), FAKE) as peer:
        # A waiting thread of the peer's must not spin while this side measures.
        assert peer.description["wait"] == "PASSIVE"
        assert peer.window("forward_backward")(3) == pytest.approx(0.060)
        assert peer.window("train_step")(1) == pytest.approx(0.030)
        process = peer._process
    assert process.returncode == 0


def test_an_error_of_the_peers_is_passed_on():
    with PeerProcess(settings("breaks"), FAKE) as peer, pytest.raises(PeerFailed, match="memory"):
        peer.window("train_step")(1)


def test_a_peer_that_dies_leaves_its_last_words():
    with pytest.raises(PeerFailed, match="the card is on fire"):
        PeerProcess(settings("dies"), FAKE)


def test_a_peer_that_hangs_is_ended():
    with pytest.raises(PeerFailed, match=r"without an answer: no output in 0\.5 s"):
        PeerProcess(settings("hangs"), FAKE, timeout=0.5)


def test_a_missing_package_is_the_users_to_install():
    with pytest.raises(UserError, match=r"torch.*pip install 'moejax\[parity\]'"):
        PeerProcess(settings("no torch"), FAKE)


WHY = "the real peer needs the extra 'parity' (transformers and torch), which is not installed"


def test_transformers_runs_the_same_model_with_grouped_products():
    pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("transformers", reason=WHY)
    shape = find_model("-".join(f"{axis}{size}" for axis, size in SIZES.items()))
    real = {"sizes": SIZES, "device": "cpu", "dtype": "float32", "threads": 1, "seed": 0}
    with PeerProcess(real) as peer:
        said = peer.description
        assert said["experts_implementation"] == "grouped_mm" and said["dtype"] == "float32"
        # The same parameters, but for a norm of the queries and one of the keys in each layer.
        ours = describe(shape.config("float32", "blocks", SoftmaxTopKOptions()), shape.S)
        assert said["params"] - ours["params"] == said["query_key_norms"] == 2 * 8 * 2
        assert 1 <= said["max_over_mean"] <= 2
        for passes in ("forward_backward", "train_step"):
            assert peer.window(passes)(2) > 0
        with pytest.raises(PeerFailed, match="no pass 'backward'"):
            peer.window("backward")(1)


def test_transformers_without_grouped_products_is_an_error(tmp_path):
    """Should PyTorch not run them, the loop that Transformers falls back to is not measured."""
    pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("transformers", reason=WHY)
    from moejax.bench import peer

    script = tmp_path / "falls_back.py"
    script.write_text(
        "import runpy, transformers.integrations.moe as moe\n"
        "moe._can_use_grouped_mm = lambda *_: False\n"
        f"runpy.run_path({str(peer.SCRIPT)!r}, run_name='__main__')\n"
    )
    real = {"sizes": SIZES, "device": "cpu", "dtype": "float32", "threads": 1, "seed": 0}
    with pytest.raises(PeerFailed, match="did not run as grouped_mm"):
        PeerProcess(real, (sys.executable, "-P", str(script)))
