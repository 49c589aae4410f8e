"""``moejax plan --serve``: the bill of a deployment, and its break-even."""

import json

import pytest

from moejax import cli

# DeepSeek's own day: 226.75 nodes of 8 H800, 168B output tokens.
GPUS, OUTPUT = 1814, 168e9
A_SECOND = OUTPUT / GPUS / 86_400
DAY = [
    f"--serve={A_SECOND}", "--hardware=h800_sxm", f"--devices={GPUS}", "--list-price=deepseek_r1",
    f"--input-per-output={608 / 168}", f"--cache-hit-share={342 / 608}",
]  # fmt: skip


def plan(capsys, *flags):
    assert cli.main(["plan", *flags, "--format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_deepseeks_own_day(capsys):
    found = plan(capsys, *DAY)
    # 1814 x $2 x 24 = $87,072; over 168B tokens $0.52 a million.
    assert found["dollars_per_day"] == pytest.approx(87_072)
    assert found["dollars_per_million_tokens"] == pytest.approx(0.52, abs=0.005)
    assert found["capacity_per_day"] == pytest.approx(OUTPUT)
    # Sold at R1's prices the day brings in $562,027, so 87,072 / 562,027 of it would pay.
    even = found["break_even"]
    assert even["load"] == pytest.approx(87_072 / 562_027, rel=1e-3) and even["possible"]


def test_a_price_below_the_cost_never_pays(capsys):
    found = plan(capsys, "--serve=10", "--hardware=h100_sxm", "--list-price=0.5", "--price=3")
    # 3 / (10 x 3600) x 1e6 = $83.33 a million tokens.
    assert found["dollars_per_million_tokens"] == pytest.approx(83.333, rel=1e-4)
    assert found["break_even"]["load"] == pytest.approx(83.333 / 0.5, rel=1e-4)
    assert not found["break_even"]["possible"]
    assert cli.main(["plan", "--serve=10", "--hardware=h100_sxm", "--list-price=0.5"]) == 0
    assert "it never pays" in capsys.readouterr().out


def test_without_a_list_price(capsys):
    found = plan(capsys, "--serve=100", "--hardware=h800_sxm")
    assert found["list_price"] is None and found["break_even"] is None


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--serve=nan"], "--serve = nan"),
        (["--serve=-1"], "--serve = -1.0"),
        (["--serve=10", "--devices=0"], "devices = 0"),
        (["--serve=10", "--hardware=h900"], "did you mean"),
        (["--serve=10", "--list-price=o11"], "did you mean 'o1'"),
        (["--serve=10", "--list-price=-2"], "--list-price = '-2'"),
        (["--serve=10", "--list-price=o1", "--cache-hit-share=2"], "--cache-hit-share = 2.0"),
        (["--serve=10", "--list-price=o1", "--input-per-output=-1"], "--input-per-output = -1.0"),
        (["--serve=10", "--model=deepseek_v3"], "leave out one of the two"),
        (["--serve=10", "--published"], "leave out one of the two"),
        (["--list-price=o1", "--model=deepseek_v3", "--tokens=1"], "belongs to --serve"),
    ],
)
def test_mistakes_are_one_line(flags, wanted, capsys):
    assert cli.main(["plan", *flags]) == 2
    out, err = capsys.readouterr()
    assert not out and wanted in err and err.count("\n") == 1
