"""Checkpoints: bit-equal round trips, damage found in every file, keep policies, failed saves."""

import errno
import os
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ConfigError, UserError
from moejax.training import manifest
from moejax.training.checkpoints import CheckpointConfig, Checkpointer, CheckpointError


def make_state(seed=0):
    """A small state of every kind of leaf that training has."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "params": {"w": normal(64, 32), "b": normal(8).astype(jnp.bfloat16)},
        "opt": ({"mu": normal(64, 32)}, (), jnp.int32(seed)),
        "router_state": {"bias": normal(3, 16), "none": None},
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 4),
        "flags": jnp.array([True, False]),
    }


def abstract(state, sharding=None):
    one = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


def bits(leaf):
    """The bytes of an array, typed PRNG keys included."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype, path
        assert bits(a) == bits(b), path


def save_steps(directory, *steps, config=None, losses=None):
    with Checkpointer(directory, config) as checkpointer:
        for step in steps:
            loss = (losses or {}).get(step)
            checkpointer.save(step, make_state(step), {"next_index": 7 * step}, val_loss=loss)
    return pathlib.Path(directory)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path, position=None):
    """Flips one bit of the file's middle byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0x10
    path.write_bytes(data)


def test_round_trip_is_bit_equal(tmp_path):
    state = make_state(3)
    extra = {"next_index": 12_345, "seed": 0, "val_loss": 1.25, "history": [1, 2.5, None, "é"]}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() is None and not (tmp_path / "checkpoints").exists()
        assert checkpointer.save(10, state, extra, val_loss=1.25)
        checkpointer.finalize()
        assert checkpointer.poll() == [10] and checkpointer.poll() == []
        checkpointer.verify(10)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        got = checkpointer.restore(abstract(state))
        assert (checkpointer.latest_step(), checkpointer.best_step()) == (10, 10)
    assert_same_bits(got.state, state)
    assert (got.extra, got.step, got.messages) == (extra, 10, [])


def test_donated_state_is_saved_as_it_was(tmp_path):
    """Saves overlap with steps that may overwrite the very buffers that are being written."""
    step_fn = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {f"w{i}": jnp.full((512, 512), float(i)) for i in range(8)}
    with Checkpointer(tmp_path, CheckpointConfig(keep_newest=3)) as checkpointer:
        for step in range(1, 4):
            state = step_fn(state)
            checkpointer.save(step, state, {})
            for _ in range(20):
                state = step_fn(state)
        for step in range(1, 4):
            got = checkpointer.restore(abstract(state), step).state
            for i in range(8):
                assert np.all(np.asarray(got[f"w{i}"]) == i + 21 * (step - 1) + 1)


def test_flipped_bit_is_found_in_every_file(tmp_path):
    save_steps(tmp_path, 1, 2)
    files = files_of(tmp_path / "2")
    assert len(files) >= 10 and sum("/d/" in str(f) for f in files) >= 4
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.verify(2)
        found = 0
        for path in files:
            for position in (0, None, -1):
                good = path.read_bytes()
                flip_bit(path, position)
                with pytest.raises(CheckpointError, match=f"step 2 refused: .*{path.name}"):
                    checkpointer.verify(2)
                path.write_bytes(good)
                found += 1
        checkpointer.verify(2)
    assert found == 3 * len(files)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda f: flip_bit(f), "differs from its SHA-256 in the manifest"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "instead of"),
        (lambda f: f.write_bytes(b""), "has 0 bytes instead of"),
        (lambda f: f.unlink(), "is missing"),
        (lambda f: (f.unlink(), f.mkdir()), "is missing"),
    ],
)
def test_damaged_step_is_refused_and_the_one_before_it_used(tmp_path, damage, reason):
    save_steps(tmp_path, 1, 2)
    largest = max(files_of(tmp_path / "2" / "state"), key=os.path.getsize)
    damage(largest)
    with Checkpointer(tmp_path) as checkpointer:
        got = checkpointer.restore(abstract(make_state()))
        with pytest.raises(CheckpointError, match="step 2 refused"):
            checkpointer.restore(abstract(make_state()), step=2)
    assert got.step == 1 and got.extra == {"next_index": 7}
    assert_same_bits(got.state, make_state(1))
    refused, going_back = got.messages
    assert refused.startswith("checkpoint of step 2 refused: state/") and reason in refused
    assert largest.name in refused and going_back == "going back to the checkpoint of step 1"


def test_no_manifest_no_checkpoint(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "2" / "manifest.json").unlink()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]
        got = checkpointer.restore(abstract(make_state()))
    assert got.step == 1 and "has no manifest.json, so its save did not end" in got.messages[0]


def test_no_good_checkpoint_is_one_line(tmp_path):
    with Checkpointer(tmp_path / "nothing") as checkpointer:
        with pytest.raises(CheckpointError, match=r"^no good checkpoint in .*nothing$"):
            checkpointer.restore(abstract(make_state()))
        assert not (tmp_path / "nothing").exists()
    save_steps(tmp_path, 1)
    flip_bit(tmp_path / "1" / "extra.json")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.restore(abstract(make_state()))
    assert "step 1 refused: extra.json differs" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_newest_and_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: float("nan"), 6: None}
    config = CheckpointConfig(keep_newest=2, keep_best=1)
    save_steps(tmp_path, *losses, config=config, losses=losses)
    with Checkpointer(tmp_path, config) as checkpointer:
        assert checkpointer.steps() == [2, 5, 6]
        assert (checkpointer.best_step(), checkpointer.latest_step()) == (2, 6)
    save_steps(tmp_path / "one", 1, 2, 3, config=CheckpointConfig(keep_newest=1, keep_best=0))
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["3"]


def test_steps_that_others_branch_off_from_are_saved_and_stay(tmp_path):
    config = CheckpointConfig(keep_newest=1, keep_best=0, at_steps=(2, 3))
    assert [step for step in range(1, 8) if config.due(step, 7)] == [2, 3, 7]
    save_steps(tmp_path, 2, 3, 5, 7, config=config)
    assert Checkpointer(tmp_path).steps() == [2, 3, 7]
    with pytest.raises(ConfigError, match=r"checkpoint.at_steps = \(0,\)"):
        CheckpointConfig(at_steps=(0,))


def test_old_one_goes_only_once_the_new_one_is_sealed(tmp_path, monkeypatch):
    events = []
    seal, delete = manifest.seal, manifest.delete
    monkeypatch.setattr(
        manifest, "seal", lambda f, c: (seal(f, c), events.append(("seal", f.name)))
    )
    monkeypatch.setattr(
        manifest, "delete", lambda f: (events.append(("delete", f.name)), delete(f))
    )
    save_steps(tmp_path, 1, 2, config=CheckpointConfig(keep_newest=1))
    assert events == [("seal", "1"), ("seal", "2"), ("delete", "1")]


def test_going_back_replaces_the_later_future(tmp_path):
    """After a restore of step 2, the old steps 3 and 4 give way to the new step 3."""
    config = CheckpointConfig(keep_newest=9)
    save_steps(tmp_path, 1, 2, 3, 4, config=config)
    with Checkpointer(tmp_path, config) as checkpointer:
        with pytest.raises(CheckpointError, match="did not begin from it; resume it"):
            checkpointer.save(3, make_state(30), {})
        checkpointer.restore(abstract(make_state()), step=2)
        assert not checkpointer.save(2, make_state(2), {}), "it is there already"
        checkpointer.save(3, make_state(30), {"again": True}, wait=True)
        assert checkpointer.steps() == [1, 2, 3]
        got = checkpointer.restore(abstract(make_state()))
    assert got.extra == {"again": True} and not got.messages
    assert_same_bits(got.state, make_state(30))


def test_leftovers_of_a_killed_save(tmp_path):
    save_steps(tmp_path, 1, 2)
    # Killed while Orbax wrote, and killed between Orbax's commit and the manifest.
    shutil.copytree(tmp_path / "2" / "state", tmp_path / "3" / "state.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "2", tmp_path / "4")
    (tmp_path / "4" / "manifest.json").rename(tmp_path / "4" / "manifest.json.tmp")
    (tmp_path / "notes").mkdir()
    with Checkpointer(tmp_path) as checkpointer:
        got = checkpointer.restore(abstract(make_state()))
        assert got.step == 2 and len(got.messages) == 3
        assert (tmp_path / "3").exists() and (tmp_path / "4").exists(), "reading deletes nothing"
        checkpointer.save(4, make_state(4), {}, wait=True)
        assert checkpointer.steps() == [2, 4]
        checkpointer.verify(4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4", "notes"]


@pytest.mark.parametrize("where", ["orbax", "orbax at once", "manifest", "folder"])
def test_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, where):
    save_steps(tmp_path, 1)
    full, told = OSError(errno.ENOSPC, "No space left on device"), []
    expected = (
        "checkpoint of step 2 was not saved: no space left on the device; free some; "
        "the last good one is of step 1"
    )

    def refuse(*_, **__):
        raise full

    def sealing():
        return threading.current_thread().name == "seal checkpoint"

    for on_error in (told.append, None):
        with Checkpointer(tmp_path, on_error=on_error) as checkpointer, monkeypatch.context() as m:
            if where == "orbax":
                queued, wait = [full] * 3, checkpointer._orbax.wait_until_finished
                late = lambda q=queued, w=wait: (w(), sealing() and q and refuse(q.pop()))
                monkeypatch.setattr(checkpointer._orbax, "wait_until_finished", late)
            elif where == "orbax at once":
                m.setattr(checkpointer._orbax, "save", refuse)
            elif where == "manifest":
                m.setattr(manifest, "write_whole", refuse)
            else:
                m.setattr(pathlib.Path, "mkdir", refuse)
            if on_error is None:
                with pytest.raises(CheckpointError, match=expected):
                    checkpointer.save(2, make_state(2), {}, wait=True)
            else:
                checkpointer.save(2, make_state(2), {})
                checkpointer.finalize()
                assert [str(e) for e in told] == [expected] and checkpointer.poll() == []
            assert checkpointer.steps() == [1] and not (tmp_path / "2").exists()
            checkpointer.verify(1)
            m.undo()
            assert checkpointer.save(2, make_state(2), {}, wait=True), "room again"
        assert Checkpointer(tmp_path).steps() == [1, 2]
        shutil.rmtree(tmp_path / "2")


def test_failure_of_a_pending_save_is_told_by_restore(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpointer, monkeypatch.context() as m:
        m.setattr(manifest, "seal", lambda *_: 1 / 0)
        checkpointer.save(2, make_state(2), {})
        got = checkpointer.restore(abstract(make_state()))
    assert got.step == 1 and "step 2 was not saved: ZeroDivisionError" in got.messages[0]


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"expert": 4, "data": 2}])
def test_restore_onto_other_meshes(tmp_path, axes):
    mesh = lambda shape, names, n: jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:n]
    )
    saved_on = mesh(tuple(axes.values()), tuple(axes), 8)
    spec = P(*axes) if len(axes) == 2 else P("fsdp")
    plain = {
        "w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.bfloat16),
        "bias": jnp.arange(16.0),
        "key": jax.random.key(5),
    }
    specs = {"w": spec, "bias": P(next(iter(axes))), "key": P()}
    place = lambda m, s: {k: NamedSharding(m, v) for k, v in s.items()}
    save_on = jax.device_put(plain, place(saved_on, specs))
    targets = [
        (mesh((1,), ("data",), 1), {"w": P(), "bias": P(), "key": P()}),
        (mesh((2,), ("fsdp",), 2), {"w": P("fsdp"), "bias": P("fsdp"), "key": P()}),
        (mesh((2, 2), ("data", "tensor"), 4), {"w": P(None, "tensor"), "bias": P(), "key": P()}),
    ]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, save_on, {})
        for target, target_specs in targets:
            shardings = place(target, target_specs)
            wanted = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings
            )
            got = checkpointer.restore(wanted).state
            assert_same_bits(got, plain)
            assert all(got[k].sharding == shardings[k] for k in plain)


def test_without_a_sharding_arrays_go_to_one_device(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jax.device_put(jnp.ones((4, 4)), jax.devices()[5])}, {})
        got = checkpointer.restore({"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}).state
    assert got["w"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize(
    "change, line",
    [
        (
            {"w": jnp.zeros((64, 16))},
            "params/w is float32 64x32 in the checkpoint and float32 64x16",
        ),
        (
            {"w": jnp.zeros((64, 32), jnp.bfloat16)},
            "params/w is float32 64x32 .* and bfloat16 64x32",
        ),
        (
            {"extra": jnp.float32(0)},
            "params/extra is absent in the checkpoint and float32 scalar here",
        ),
        ({"b": None}, "params/b is bfloat16 8 in the checkpoint and absent here"),
    ],
)
def test_another_model_is_one_line_naming_the_leaf(tmp_path, change, line):
    save_steps(tmp_path, 1)
    other = make_state()
    other["params"] |= change
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=line) as caught,
    ):
        checkpointer.restore(abstract(other))
    assert "\n" not in str(caught.value)


def test_only_arrays_and_json_are_taken(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match="state leaf a/1 is a int"):
            checkpointer.save(1, {"a": (jnp.ones(2), 3)}, {})
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpointer.save(1, {"a": jnp.ones(2)}, {"position": object()})
        assert list(tmp_path.iterdir()) == []


def test_config_checks_itself_and_says_when():
    for field, value in [("every_steps", -1), ("keep_newest", 0), ("keep_best", -2)]:
        with pytest.raises(ConfigError, match=f"^checkpoint.{field} = {value}: "):
            CheckpointConfig(**{field: value})
    assert [s for s in range(1, 8) if CheckpointConfig(every_steps=3).due(s, 7)] == [3, 6, 7]
    assert [s for s in range(1, 8) if CheckpointConfig().due(s, 7)] == [7]
