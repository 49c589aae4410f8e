"""Untrained routers over the same tokens."""

import numpy as np

from moejax.analysis import router_gallery


def test_each_strategy_does_what_it_says():
    chosen = {name: router_gallery.gates(name) > 0 for name in ("hash", "expert_choice", "top_p")}
    ids = np.asarray(router_gallery.inputs().tokens[0])
    for token in np.unique(ids):
        rows = chosen["hash"][ids == token]
        assert (rows == rows[0]).all()
    # Each expert takes K T / E tokens, whatever they are.
    assert (chosen["expert_choice"].sum(axis=0) == 2 * 48 // 16).all()
    assert len(np.unique(chosen["top_p"].sum(axis=1))) > 1


def test_the_table_says_who_leaks():
    lines = router_gallery.table(["hash", "expert_choice"]).splitlines()
    assert lines[1].split()[-1] == "yes" and lines[2].split()[-1] == "no"
    assert "2 to 2" in lines[1] and " 0.00 " in lines[2]


def test_the_picture_has_a_panel_a_router():
    assert len(router_gallery.plot(["hash", "expert_choice", "top_p"]).axes) == 3
