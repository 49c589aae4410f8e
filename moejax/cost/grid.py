"""What the energy of a place emits: kg of CO2-equivalent for a kWh of its grid, on average."""

import types

# Ember's figures as Our World in Data has them, from codecarbon 3.3.2
# (data/private_infra/global_energy_mix.json); the world: IEA's, from the same package.
CARBON_KG_PER_KWH = types.MappingProxyType({
    "world": 0.475,
    "argentina": 0.354, "australia": 0.549, "austria": 0.111, "belgium": 0.138, "brazil": 0.098,
    "canada": 0.170, "chile": 0.291, "china": 0.582, "czechia": 0.450, "denmark": 0.152,
    "egypt": 0.570, "estonia": 0.417, "finland": 0.079, "france": 0.056, "germany": 0.381,
    "greece": 0.337, "hungary": 0.204, "india": 0.713, "ireland": 0.291, "italy": 0.331,
    "japan": 0.485, "kazakhstan": 0.821, "kenya": 0.070, "mexico": 0.507, "netherlands": 0.268,
    "new_zealand": 0.113, "nigeria": 0.523, "norway": 0.030, "pakistan": 0.441,
    "philippines": 0.611, "poland": 0.662, "portugal": 0.166, "romania": 0.241, "russia": 0.441,
    "singapore": 0.471, "south_africa": 0.708, "south_korea": 0.431, "spain": 0.174,
    "sweden": 0.041, "switzerland": 0.035, "taiwan": 0.642, "thailand": 0.550, "turkey": 0.465,
    "uk": 0.238, "usa": 0.369, "vietnam": 0.475,
    # of EARLIER
    "hong_kong": 0.699, "iceland": 0.028, "indonesia": 0.676, "israel": 0.583, "malaysia": 0.606,
    "saudi_arabia": 0.707, "ukraine": 0.260, "united_arab_emirates": 0.561,
})  # fmt: skip

EARLIER = frozenset({
    "hong_kong", "iceland", "indonesia", "israel", "malaysia", "saudi_arabia", "ukraine",
    "united_arab_emirates",
})  # fmt: skip


def source(region: str) -> str:
    """Who says what a known region's grid emits, and of which year."""
    if region == "world":
        return "codecarbon 3.3.2: IEA, 2018"
    return f"codecarbon 3.3.2: Ember and Our World in Data, {2022 if region in EARLIER else 2023}"
