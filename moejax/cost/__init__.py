"""The bill: counts, hardware, prices and energy; a plan before a run, a ledger during it."""
