"""The price books, the packaged one and a user's own, and a number in the config."""

import datetime
import math

import pytest

from moejax.config import ConfigError, UserError
from moejax.cost import energy, prices
from moejax.cost.hardware import CHIPS
from moejax.cost.prices import KINDS, packaged, purchase, resolve


def book(tmp_path, text):
    path = tmp_path / "book.yaml"
    path.write_text(text)
    return path


def test_every_chip_has_a_rate_or_a_reason_and_every_figure_a_source():
    """Nobody outside China lists an H20, so it has a purchase price only."""
    assert packaged().keys() == CHIPS.keys()
    for chip, entry in packaged().items():
        assert (entry.default is None) == (chip == "h20")
        for kind, price in entry.rates.items():
            assert price.kind == kind and kind in KINDS and kind not in ("user", "owned")
            assert price.dollars_per_hour > 0 and price.source and price.book == "moejax"
            assert 2020 <= int(price.date[:4]) <= 2030
            low, high = price.low or 0, price.high or math.inf
            assert low <= price.dollars_per_hour <= high


def test_v3s_rate():
    price = resolve("h800_sxm")
    assert (price.dollars_per_hour, price.kind, price.date) == (2.0, "assumed", "2024-12")
    assert "DeepSeek-V3" in price.source


def test_a_kind_chooses_among_a_chips_rates():
    spot, listed = resolve("h100_sxm", kind="spot"), resolve("h100_sxm", kind="on_demand")
    assert spot.dollars_per_hour < resolve("h100_sxm").dollars_per_hour < listed.dollars_per_hour
    assert (spot.kind, listed.kind) == ("spot", "on_demand")


def test_a_users_rate_overrides_the_book_and_zero_is_a_rate():
    price = resolve("h800_sxm", 3)
    assert (price.dollars_per_hour, price.kind, price.source) == (3.0, "user", "config")
    assert price.date == datetime.date.today().isoformat() and price.book is None
    assert resolve("h20", 0.0).dollars_per_hour == 0.0


@pytest.mark.parametrize("price", [-1.0, math.nan, math.inf])
def test_bad_rates(price):
    with pytest.raises(ConfigError, match=r"cost\.price = .*: must be a finite number"):
        resolve("cpu", price)


def test_a_chip_without_a_known_rate_asks_for_one():
    with pytest.raises(
        ConfigError, match=r"no rate is known for h20; set .*cost.price_kind = 'owned'"
    ):
        resolve("h20")


@pytest.mark.parametrize(
    "chip, kind, message",
    [
        ("h80", None, r"cost\.hardware = 'h80': no such chip; did you mean"),
        ("h100_sxm", "spott", r"cost\.price_kind = 'spott': no such kind of rate; .* 'spot'"),
        ("h800_sxm", "spot", r"no such rate is known for h800_sxm; known: assumed, .*, owned$"),
        ("cpu", "owned", r"no such rate is known for cpu; known: on_demand$"),
        ("tpu_v6e", "owned", r"tpu_v6e's power is not published; set cost\.price"),
    ],
)
def test_rates_that_nobody_knows(chip, kind, message):
    with pytest.raises(ConfigError, match=message):
        resolve(chip, kind=kind)


def test_a_price_and_a_kind_together_are_refused():
    with pytest.raises(ConfigError, match=r"cost\.price_kind = 'spot': has no use beside"):
        resolve("h100_sxm", 2.0, kind="spot")


def test_the_owned_rate_by_hand():
    """$33,800 x 0.14 x ln 10 / 8766 / 0.81 + 1.194 kW x $0.0771 (Epoch AI): $1.627 an hour."""
    wear = 33_800 * 0.14 * math.log(10) / 8766 / 0.81
    price = resolve("h800_sxm", kind="owned")
    assert price.dollars_per_hour == pytest.approx(wear + 1.194375 * 0.0771)
    assert price.dollars_per_hour == pytest.approx(1.627, abs=0.001)
    assert price.high == pytest.approx(wear * 44_750 / 33_800 + 1.194375 * 0.0771)
    assert price.kind == "owned" and "$33,800" in price.source and price.date == "2025-02-21"
    free = resolve("h800_sxm", kind="owned", dollars_per_kwh=0.0)
    assert free.dollars_per_hour == pytest.approx(wear)
    green = resolve("h800_sxm", kind="owned", pue=1.0)
    assert green.dollars_per_hour == pytest.approx(wear + 1.194375 / 1.25 * 0.0771)
    assert energy.kilowatts("h800_sxm") == pytest.approx(1.194375)


def test_a_users_book_goes_before_the_packaged_one(tmp_path):
    path = book(
        tmp_path,
        """
        h100_sxm:
          default: reserved
          rates:
            reserved: {dollars_per_hour: 1.75, date: 2026-03-01, source: our contract}
            spot: {dollars_per_hour: 1, low: 0.8, high: 1.2, date: 2026-03, source: our cloud}
          purchase: {dollars: 25000, date: 2026, source: our invoice}
        h20:
          rates:
            specialised_cloud: {dollars_per_hour: 0.9, date: 2026-02-01, source: our cloud}
        """,
    )
    chosen = resolve("h100_sxm", book=path)
    assert chosen == prices.Price(1.75, "reserved", "our contract", "2026-03-01", book=str(path))
    assert resolve("h100_sxm", kind="spot", book=path).low == 0.8
    # A kind that only the packaged book has is still there, and says whose it is.
    assert resolve("h100_sxm", kind="on_demand", book=path).book == "moejax"
    assert resolve("h20", book=path).dollars_per_hour == 0.9  # an only rate is the default
    assert resolve("h800_sxm", book=path) == resolve("h800_sxm")
    assert purchase("h100_sxm", path).dollars == 25_000
    assert purchase("h100_sxm", path).date == "2026"
    assert purchase("h20", path) == purchase("h20")
    assert resolve("h100_sxm", kind="owned", book=path).book == str(path)


RATE = "{dollars_per_hour: 2, date: 2026-01-01, source: us}"
BAD_BOOKS = [
    ("h100_smx: {rates: {spot: RATE}}", r"book\.yaml: h100_smx = .* did you mean 'h100_"),
    ("h100_sxm: {rates: {sopt: RATE}}", r"h100_sxm\.rates\.sopt = .* did you mean 'spot'"),
    ("h100_sxm: {rate: {spot: RATE}}", r"h100_sxm\.rate = .*no such field.* 'rates'"),
    ("h100_sxm: {rates: {spot: RATE, reserved: RATE}}",
     r"h100_sxm\.default = None: must say which of these .*: spot, reserved"),
    ("h100_sxm: {default: spot, rates: {reserved: RATE}}", r"\.default = 'spot': must say"),
    ("h100_sxm: {}", "must have rates or a purchase"),
    ("h100_sxm: 2.5", "h100_sxm = 2.5: must be a block"),
    ("h100_sxm: {rates: 2}", r"h100_sxm\.rates = 2: must be rates by kind"),
    ("h100_sxm: {rates: {spot: 2}}", r"rates\.spot = 2: must be a block"),
    ("2.5", "= 2.5: must be chips"),
    ("", "= None: must be chips"),
    ("h100_sxm: {rates: {spot: [}}", r"book\.yaml, line 1: is not YAML"),
    ("h20:\n  purchase: 1\nh20:\n  purchase: 2", r"book\.yaml, line 3: .*'h20' occurs twice"),
    ("? [h20]\n: 1", "line 1: is not YAML that can be used: no name"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", BAD_BOOKS)
def test_bad_books(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve("h100_sxm", book=book(tmp_path, text.replace("RATE", RATE)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "book.yaml") in str(caught.value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("dollars_per_hour", "-1", r"dollars_per_hour = -1.0: must be dollars, 0 or above"),
        ("dollars_per_hour", ".nan", r"dollars_per_hour = nan: must be a finite number"),
        ("dollars_per_hour", ".inf", r"dollars_per_hour = inf: must be a finite number"),
        ("dollars_per_hour", "two", r"dollars_per_hour = 'two': is a string, but must be a number"),
        ("dollars_per_hour", "yes", r"dollars_per_hour = True: is True or False, but must be"),
        ("dollar_per_hour", "1", r"\.dollar_per_hour = .*no such field.* 'dollars_per_hour'"),
        ("low", "3", r"\.low = 3.0: must be from 0 to dollars_per_hour"),
        ("high", "1", r"\.high = 1.0: must be at least dollars_per_hour"),
        ("date", "2026-13-01", r"\.date = '2026-13-01': must be a date: YYYY-MM-DD"),
        ("date", "2025-02-30", r"\.date = '2025-02-30': must be a date"),
        ("date", "yesterday", r"\.date = 'yesterday': must be a date"),
        ("date", "202", r"\.date = '202': must be a date"),
        ("date", "2999-01-01", r"\.date = '2999-01-01': is still to come"),
        ("date", "null", r"\.date = None: is None, but must be a string"),
        ("source", "''", r"\.source = '': must say who says so"),
        ("kind", "spot", r"\.kind = 'spot': no such field"),
    ],
)
def test_bad_fields_of_a_rate(tmp_path, field, value, message):
    fields = {"dollars_per_hour": "2", "date": "2026-01-01", "source": "us"} | {field: value}
    line = ", ".join(f"{k}: {v}" for k, v in fields.items())
    path = book(tmp_path, f"h100_sxm: {{rates: {{spot: {{{line}}}}}}}")
    with pytest.raises(ConfigError, match=message) as caught:
        resolve("h100_sxm", book=path)
    assert str(caught.value).startswith(f"{path}: h100_sxm.rates.spot.")


def test_a_rate_needs_a_source_and_a_date(tmp_path):
    path = book(tmp_path, "h100_sxm: {rates: {spot: {dollars_per_hour: 2, date: 2026}}}")
    with pytest.raises(ConfigError, match=r"h100_sxm\.rates\.spot\.source = None: has no default"):
        resolve("h100_sxm", book=path)


def test_a_book_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cost.price_book = .*none\.yaml': cannot be read \(No"):
        resolve("cpu", book=tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cost.price_book = .* is not text; give a YAML file"):
        resolve("cpu", book=tmp_path / "binary.yaml")
