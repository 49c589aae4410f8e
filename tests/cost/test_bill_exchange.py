"""The exchange as a line of the bill, by hand."""

import pytest
from ledgers import charge, header, write

from moejax.cost.bill import read, summarize
from moejax.cost.bill_text import format_ledger

HOW = {"kind": "all_to_all", "expert_devices": 16, "devices_per_node": 8}
# Of 100 tokens 50 were counted. A token sends 160 GB within a machine (1 s at 0.8 of the H800's
# 200 GB/s) and 80 GB between machines (2 s at 0.8 of its network card's 50 GB/s).
SENT = {"tokens": 50, "scale_up": 50 * 160e9, "scale_out": 50 * 80e9}


def on_h800(segment="s1"):
    return header(segment, hardware="h800_sxm", devices=16, exchange=HOW)


def test_by_hand(tmp_path):
    """100 tokens of 2 device-seconds in 50 s of 16 devices at $1.8: a quarter of it."""
    write(tmp_path, on_h800(), charge(50.0, tokens=100, exchange=SENT))
    sent = read(tmp_path)["exchange"]
    assert sent["bytes_per_token"] == pytest.approx({"scale_up": 160e9, "scale_out": 80e9})
    assert sent["device_hours"] == pytest.approx(200 / 3600)
    assert sent["dollars"] == pytest.approx(1.8 * 200 / 3600)
    assert sent["share"] == pytest.approx(0.25)
    assert sent["source"] == "estimate" and "0.8 of their rating" in sent["assumption"]
    assert (sent["kind"], sent["expert_devices"], sent["devices_per_node"]) == ("all_to_all", 16, 8)
    found = format_ledger(summarize([tmp_path]))
    assert (
        "sent    r: 160 GB over NVLink 4, 80 GB over 400 Gb/s InfiniBand or RoCE a token, "
        "all_to_all over 16 devices, 8 a machine; 25.0 % of training, $0.1, not hidden (estimate: "
    ) in found


def test_segments_add_up(tmp_path):
    less = SENT | {"scale_out": 0.0}
    write(
        tmp_path, on_h800("a"), charge(50.0, "a", tokens=100, exchange=SENT),
        on_h800("b"), charge(50.0, "b", tokens=100, exchange=less),
    )  # fmt: skip
    sent = read(tmp_path)["exchange"]
    assert sent["bytes_per_token"] == pytest.approx({"scale_up": 160e9, "scale_out": 40e9})
    assert sent["device_hours"] == pytest.approx((200 + 100) / 3600)


def test_links_that_nobody_knows(tmp_path):
    write(tmp_path, header(exchange=HOW), charge(50.0, tokens=100, exchange=SENT))
    sent = read(tmp_path)["exchange"]
    assert sent["bytes_per_token"]["scale_up"] == pytest.approx(160e9)
    assert sent["dollars"] is sent["share"] is sent["device_hours"] is None
    assert "its time is not known" in format_ledger(summarize([tmp_path]))


def test_a_run_that_sends_nothing(tmp_path):
    write(tmp_path, header(), charge(50.0))
    assert read(tmp_path)["exchange"] is None
    assert "sent" not in format_ledger(summarize([tmp_path]))
