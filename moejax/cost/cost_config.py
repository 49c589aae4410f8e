"""Options of the bill (block ``cost`` of a config) and its limits (block ``budget``)."""

import dataclasses
import math

from moejax.config import check
from moejax.cost import energy, hardware, lenses, prices, utilisation


@dataclasses.dataclass(frozen=True)
class CostConfig:
    """What a run is charged, and how.

    Attributes:
      hardware: a chip's name, or ``auto`` for the one that jax runs on.
      price: dollars per device-hour (a core-hour on a CPU); None takes the price book's.
      price_kind: which of the book's rates: ``on_demand``, ``reserved``, ``spot``,
        ``specialised_cloud``, ``owned`` …; None takes the chip's default.
      price_book: a YAML file of prices of your own, which go before the packaged ones; its form is
        that of ``moejax/cost/prices.yaml``. Read when a run is planned or begins.
      region: whose grid the carbon is counted by.
      pue: power usage effectiveness of the data centre, 1 or above; None takes the chip's usual
        one (1.1 at a hyperscaler with TPUs, else 1.25).
      dollars_per_kwh: price of electricity, of which the ``owned`` lens pays.
      mfu: utilisation that a plan assumes, 0 to 1; None takes the default of the hardware.
      final: whether the run belongs to the headline figure; every run belongs to the all-in one.
    """

    hardware: str = "auto"
    price: float | None = None
    price_kind: str | None = None
    price_book: str | None = None
    region: str = "world"
    pue: float | None = None
    dollars_per_kwh: float = energy.DOLLARS_PER_KWH
    mfu: float | None = None
    final: bool = False

    def __post_init__(self) -> None:
        if self.hardware != "auto":
            hardware.lookup(self.hardware)
        if self.price is not None:
            prices.check_price(self.price)
            prices.check_alone(self.price_kind)
        if self.price_kind is not None:
            prices.check_kind(self.price_kind)
        energy.carbon_factor(self.region)
        if self.pue is not None:
            energy.check_pue(self.pue)
        lenses.check_kwh_price(self.dollars_per_kwh)
        if self.mfu is not None:
            utilisation.check_mfu(self.mfu)

    def rate(self, chip: str) -> prices.Price:
        """The rate of a chip that a run is charged at.

        Raises:
          ConfigError, UserError: see ``moejax.cost.prices.resolve``.
        """
        return prices.resolve(
            chip, self.price, kind=self.price_kind, book=self.price_book, pue=self.pue,
            dollars_per_kwh=self.dollars_per_kwh,
        )  # fmt: skip

    def purchase(self, chip: str) -> prices.Purchase | None:
        """What a chip costs to buy; None where nobody says."""
        return prices.purchase(chip, self.price_book)


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """Limits of a run, all of its segments together; None means without limit.

    Attributes:
      max_dollars: rental dollars.
      max_flops: model FLOPs of training.
      max_hours: wall-clock hours (not device-hours) that the run was up.
    """

    max_dollars: float | None = None
    max_flops: float | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(
                value is None or (math.isfinite(value) and value > 0),
                f"budget.{field.name}", value, "must be above zero, or None for no limit",
            )  # fmt: skip

    def exceeded(self, dollars: float, flops: float, hours: float) -> str | None:
        """Names the first limit that was reached, with both figures; None where none was.

        Args:
          dollars, flops, hours: spent so far, all segments together, in the limits' units.
        """
        spent = {"max_dollars": dollars, "max_flops": flops, "max_hours": hours}
        for name, value in spent.items():
            limit = getattr(self, name)
            if limit is not None and value >= limit:
                return f"budget.{name} = {limit:g} reached ({value:g} spent)"
        return None
