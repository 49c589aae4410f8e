"""Ablations: variants of a run at equal budgets, over several seeds, with their bill."""
