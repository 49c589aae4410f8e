"""Every record of a result says what it is of: the fingerprint of its run or of its measurement."""

import dataclasses

from moejax.bench import machine
from moejax.bench.options import BenchOptions


def test_a_measurement_is_told_by_its_options_machine_and_versions():
    record = {"machine": {"device": "a"}, "versions": {"jax": "1"}, "results": [1.0]}
    options = BenchOptions(suite="routers", seed=3)
    first = machine.fingerprint(options, record)
    assert len(first) == 64
    same = dataclasses.replace(options, output="elsewhere")
    assert machine.fingerprint(same, {**record, "results": [2.0]}) == first
    others = [
        machine.fingerprint(dataclasses.replace(options, seed=4), record),
        machine.fingerprint(options, {**record, "machine": {"device": "b"}}),
        machine.fingerprint(options, {**record, "versions": {"jax": "2"}}),
    ]
    assert len({first, *others}) == 4
