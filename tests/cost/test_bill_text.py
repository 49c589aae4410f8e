"""``moejax ledger`` as text."""

from ledgers import charge, done, header, plan, write

from moejax.cost.bill import summarize
from moejax.cost.bill_text import format_ledger


def table(folder):
    return format_ledger(summarize([folder]))


def test_every_run_the_totals_and_what_they_rest_on(tmp_path):
    write(tmp_path / "final", header(run_id="final", final=True, stage="sft"), done(3600.0))
    write(tmp_path / "failed", header(run_id="failed"), done(1800.0, status="failed"))
    write(tmp_path / "killed", header(run_id="killed"), charge(900.0))
    found = table(tmp_path)
    for words in ("final *", "headline *", "all in", "$6.30", "$3.60", "killed", "2 cpu",
                  "cpu $1.8/h (a test, 2025)", "estimate", "train 105 min 00 s",
                  "went to training $3.60, failed $1.80 (1 run), killed $0.90 (1 run)",
                  "all in is 1.75 times the headline"):  # fmt: skip
        assert words in found
    rows = [line.split() for line in found.splitlines()]
    assert ["pretrain", "2", "runs", "1.5", "$2.70", "20", "20", "G"] in rows
    assert ["completed", "1", "run", "2", "$3.60", "10", "10", "G"] in rows


def test_one_run_has_no_subtotals(tmp_path):
    write(tmp_path, header(final=True), done(3600.0))
    found = table(tmp_path)
    assert len(found.split("\n\n")[0].splitlines()) == 4  # head, run, headline, all in
    assert "times the headline" not in found and "went to training $3.60\n" in found


def test_every_price_that_was_charged(tmp_path):
    dear = {"dollars_per_hour": 3.0, "source": "another", "date": "2026"}
    write(tmp_path, header("a"), charge(1.0, "a"), header("b", price=dear), charge(1.0, "b"))
    assert "prices  cpu $1.8/h (a test, 2025); cpu $3/h (another, 2026)" in table(tmp_path)


def test_redone_steps_and_time_between_segments(tmp_path):
    """Ten minutes of nothing on 2 devices at $1.8; a clock set back is no time."""
    first = charge(9.0, "a", steps=3, tokens=300, from_step=0, from_tokens=0,
                   time="2025-01-01T00:00:09Z")  # fmt: skip
    second = charge(9.0, "b", steps=3, tokens=300, from_step=1, from_tokens=100)
    write(tmp_path, header("a"), first, header("b", time="2025-01-01T00:10:09Z"), second)
    found = table(tmp_path)
    assert "redone  r: 2 steps, 200 of 600 tokens, $0.006; its model has seen 400" in found
    assert "idle    10 min 00 s between segments by the wall clock, not billed; devices that were "
    assert "kept cost $0.60 more" in found
    write(tmp_path, header("a"), first, header("b", time="2024-01-01T00:10:00Z"), second)
    assert "idle" not in table(tmp_path)
    write(tmp_path, header("a"), charge(9.0, "a"), header("b"), charge(9.0, "b"))
    assert "redone  r: not known" in table(tmp_path)


def test_plan_against_actual(tmp_path):
    line = done(18, tokens=1000, flops=9e11, seconds={"train": 18, "compile": 36, "eval": 0.01})
    write(tmp_path, header(plan=plan()), line)
    found = table(tmp_path)
    assert (
        "plan    r: $0.054 for $0.036 planned (+50.0 %), 0.03 for 0.02 device-hours, 1 k for 1 k "
        "tokens\n        because of compilation +$0.036, MFU 50.0 % for 25.0 % -$0.018\n"
        in found
        + "\n"
    )


def test_a_plan_at_no_price_is_compared_by_hours(tmp_path):
    free = {"dollars_per_hour": 0.0, "source": "a test", "date": "2025"}
    made = plan(price=free, dollars={"rental": 0.0, "owned": None})
    write(tmp_path, header(plan=made, price=free), done(360, tokens=1000, flops=9e11))
    found = table(tmp_path)
    assert "$0.00 for $0.00 planned (+900.0 %)" in found
    assert "because of MFU 2.5 % for 25.0 % +0.18 h" in found


def test_a_ratio_that_would_be_a_long_percentage(tmp_path):
    write(tmp_path, header(plan=plan()), done(36000, tokens=1000, flops=9e11))
    assert "$36.00 for $0.036 planned (1,000 times)" in table(tmp_path)
