"""Checkpoints: exact to continue from, complete or absent, and no use when damaged."""

import json
import logging
import os
import random
import re
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longvila.bench.engines import make_config, make_state, take_steps
from longvila.config import ParallelConfig, ShardingConfig
from longvila.errors import ConfigError, LongvilaError
from longvila.parallel.launch import run_ranks
from longvila.shards.order import Cursor
from longvila.train import checkpoint
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.loop import resume

from .training_parts import whole_weights

PAIR = ParallelConfig(inner=2)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def save_after_two(parallel, folder, asynchronous=False, sharding=ShardingConfig()):
    """Two steps, a checkpoint, a third step: the weights then. In the background nothing is written before its end."""
    state = make_state(parallel, sharding=sharding)
    take_steps(state, 0, 2)
    write, changed = Checkpoints._write, threading.Event()
    if asynchronous:
        Checkpoints._write = lambda *arguments: changed.wait(60) and write(*arguments)
    with Checkpoints(folder, 1, asynchronous) as checkpoints:
        checkpoints.save(state.engine.state(), Position(2, Cursor(0, 0, 8)), state.config)
        take_steps(state, 2, 1)
        changed.set()
    return whole_weights(state.model)


def continue_after_two(parallel, folder):
    state = make_state(parallel)
    assert resume(state.engine, Checkpoints(folder, 1)) == Position(2, Cursor(0, 0, 8))
    take_steps(state, 2, 1)
    return whole_weights(state.model)


def same(one, other):
    return all(torch.equal(one[name], weight) for name, weight in other.items())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_same_ranks_continue_bit_for_bit(tmp_path, asynchronous):
    expected = run_ranks(save_after_two, 2, PAIR, tmp_path, asynchronous)[0]
    assert same(run_ranks(continue_after_two, 2, PAIR, tmp_path)[0], expected)


@pytest.mark.parametrize(
    ("world", "parallel", "sharding"),
    [
        (2, PAIR, ShardingConfig()),
        (4, PAIR, ShardingConfig("node", "node", "node", node=2)),
    ],
)
def test_another_world_fold_or_sharding_continues_with_the_same_weights(tmp_path, world, parallel, sharding):
    expected = run_ranks(save_after_two, world, parallel, tmp_path, False, sharding)[0]
    resumed = run_ranks(continue_after_two, 4, ParallelConfig(head=2), tmp_path)[0]
    for name, weight in expected.items():
        assert (resumed[name] - weight).abs().max() < 1e-9, name


def start_without_a_checkpoint(folder, ask):
    state = make_state(PAIR)
    if ask:
        assert resume(state.engine, Checkpoints(folder, 1)) == Position()
    take_steps(state, 0, 2)
    return whole_weights(state.model)


def test_looking_for_a_checkpoint_where_there_is_none_changes_no_step(tmp_path):
    expected, asked = (run_ranks(start_without_a_checkpoint, 2, tmp_path, ask)[0] for ask in (False, True))
    assert same(asked, expected)


def tiny_state():
    return {"model": {"weight": torch.arange(6.0).view(2, 3)}, "optimizer": {"state": {}}}


def save_some(folder, numbers=(1, 2), keep=2):
    config = make_config(PAIR)
    checkpoints = Checkpoints(folder, keep)
    for step in numbers:
        state = tiny_state()
        state["model"]["weight"] += step
        checkpoints.save(state, Position(step), config)


def load_tiny(folder):
    """The step of the checkpoint that was loaded, and whether the weights are its own."""
    state = tiny_state()
    position = Checkpoints(folder, 2).load(state)
    if position is None:
        return None
    return (
        position.step if torch.equal(state["model"]["weight"], tiny_state()["model"]["weight"] + position.step) else -1
    )


def test_only_the_newest_are_kept(tmp_path):
    run_ranks(save_some, 2, tmp_path, (8, 9, 10, 100), 2)
    assert names(tmp_path) == ["step-000010", "step-000100"]


def test_none_to_be_kept_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="checkpoints_kept is 0"):
        Checkpoints(tmp_path, 0)


def test_steps_are_ordered_by_number(tmp_path):
    run_ranks(save_some, 1, tmp_path, (999_999, 1_000_000))
    assert run_ranks(load_tiny, 1, tmp_path) == [1_000_000]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [
    (flip, "__0_0.distcp", "__0_0.distcp is corrupted"),
    (flip, "__1_0.distcp", "__1_0.distcp is corrupted"),
    (flip, ".metadata", ".metadata is corrupted"),
    (flip, "checkpoint.json", "checkpoint.json is corrupted"),
    (truncate, "__1_0.distcp", r"__1_0.distcp has \d+ bytes, not \d+"),
    (Path.unlink, "__1_0.distcp", "__1_0.distcp is missing"),
    (truncate, "manifest.json", "manifest.json is corrupted"),
    (Path.unlink, "manifest.json", "manifest.json is missing"),
]


def load_and_listen(folder):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("longvila").addHandler(handler)
    logging.getLogger("longvila").setLevel(logging.INFO)
    return load_tiny(folder), lines


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, name, words):
    run_ranks(save_some, 2, tmp_path)
    damage(tmp_path / "step-000002" / name)
    (first, said), (second, silent) = run_ranks(load_and_listen, 2, tmp_path)
    assert (first, second) == (1, 1)
    assert len(said) == 1
    assert silent == []
    assert re.search(f"step-000002: {words}", said[0])
    assert names(tmp_path) == ["step-000001", "step-000002.bad"]
    run_ranks(save_some, 2, tmp_path, (2,))
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_any_single_flipped_bit_of_the_manifest_is_noticed_or_harmless(tmp_path):
    run_ranks(save_some, 1, tmp_path, (1,))
    path = tmp_path / "step-000001" / "manifest.json"
    whole = path.read_bytes()
    found = run_ranks(load_with_flipped_bits, 1, tmp_path)[0]
    assert found["noticed"] > 0.9 * len(range(0, len(whole), 7))
    assert found["wrong"] == 0


def load_with_flipped_bits(folder):
    """Flips one bit of every seventh byte in turn. A flip inside white space may still be the same JSON."""
    path = folder / "step-000001" / "manifest.json"
    whole, found = path.read_bytes(), {"noticed": 0, "wrong": 0}
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        try:
            found["wrong"] += load_tiny(folder) != 1
        except ConfigError:
            found["noticed"] += 1
    return found


def load_raises(folder):
    with pytest.raises(ConfigError) as caught:
        load_tiny(folder)
    return str(caught.value)


def test_where_no_checkpoint_is_good_every_rank_says_what_is_wrong_with_each(tmp_path):
    run_ranks(save_some, 2, tmp_path)
    flip(tmp_path / "step-000001" / "__0_0.distcp")
    truncate(tmp_path / "step-000002" / "__0_0.distcp")
    for said in run_ranks(load_raises, 2, tmp_path):
        assert "none of the checkpoints in" in said
        assert "step-000002: __0_0.distcp has" in said
        assert "step-000001: __0_0.distcp is corrupted" in said
    assert names(tmp_path) == ["step-000001", "step-000002"]


def load_other(folder, change):
    state = tiny_state()
    change(state["model"])
    with pytest.raises(ConfigError) as caught:
        Checkpoints(folder, 2).load(state)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(weight=torch.zeros(3, 3)), "model.weight is (2, 3) float32 there and (3, 3) float32 here"),
        (lambda m: m.update(weight=m["weight"].double()), "is (2, 3) float32 there and (2, 3) float64 here"),
        (lambda m: m.update(bias=torch.zeros(3)), "model.bias is absent there and (3,) float32 here"),
        (lambda m: m.pop("weight"), "model.weight is (2, 3) float32 there and absent here"),
    ],
)
def test_another_architecture_is_refused_and_what_differs_is_named(tmp_path, change, words):
    run_ranks(save_some, 2, tmp_path)
    for said in run_ranks(load_other, 2, tmp_path, change):
        assert words in said
    assert names(tmp_path) == ["step-000001", "step-000002"]


def die_while_saving(folder):
    """Rank 1 is gone before its share is written."""
    if dist.get_rank() == 1:
        Checkpoints._write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save_some(folder, (3,))


def test_a_killed_save_leaves_the_last_good_one_and_the_next_start_removes_its_rest(tmp_path):
    run_ranks(save_some, 2, tmp_path)
    with pytest.raises(RuntimeError, match="ended without an answer"):
        run_ranks(die_while_saving, 2, tmp_path)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003.part"]
    assert run_ranks(load_tiny, 2, tmp_path) == [2, 2]
    assert names(tmp_path) == ["step-000001", "step-000002"]


def save_on_a_full_disk(folder, full_rank, asynchronous, limit):
    """Files of more than `limit` bytes cannot be written by one rank, as if its disk were full."""
    config = make_config(PAIR)
    state = {"model": {f"weight{i}": torch.zeros(50_000) for i in range(8)}, "optimizer": {}}
    checkpoints = Checkpoints(folder, 2, asynchronous)
    checkpoints.save(state, Position(1), config)
    checkpoints.close()
    checkpoints = Checkpoints(folder, 2, asynchronous)
    if dist.get_rank() == full_rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with pytest.raises(LongvilaError) as caught, checkpoints:  # leaving them waits for a save in the background
        checkpoints.save(state, Position(2), config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(caught.value)


@pytest.mark.parametrize("full_rank", [0, 1])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("limit", "words"),
    [(2000, r"\[Errno 27\] File too large"), (20_000, "a file could not be written to its end")],
)
def test_a_full_disk_is_one_error_on_every_rank_and_the_last_checkpoint_stays(
    tmp_path, full_rank, asynchronous, limit, words
):
    """The two ways in which torch tells of it: as the system does and, inside a tensor, in a way of its own."""
    folder = tmp_path / "checkpoints"
    for said in run_ranks(save_on_a_full_disk, 2, folder, full_rank, asynchronous, limit):
        assert re.search(rf"step-000002 could not be saved: {words} \(rank {full_rank}\)", said)
        assert "It takes 1.6 MB" in said
        assert "the last good checkpoint is step-000001: make room" in said
    assert names(folder) == ["step-000001"]


def save_slowly(folder):
    """Saves twice in the background; what is complete when the second save returns, which writes nothing until then."""
    state, write, returned = tiny_state(), Checkpoints._write, threading.Event()

    def slow(self, state, step, about):
        time.sleep(0.2)
        if step == 2:
            returned.wait(60)
        write(self, state, step, about)

    Checkpoints._write = slow
    with Checkpoints(folder, 2, asynchronous=True) as checkpoints:
        checkpoints.save(state, Position(1), make_config(PAIR))
        checkpoints.save(state, Position(2), make_config(PAIR))
        found = names(folder)
        returned.set()
    return found


def test_one_save_is_under_way_at_a_time(tmp_path):
    assert run_ranks(save_slowly, 2, tmp_path) == [["step-000001"]] * 2
    assert names(tmp_path) == ["step-000001", "step-000002"]


def fail_in_the_background(folder):
    checkpoints = Checkpoints(folder, 2, asynchronous=True)
    (folder.parent / "file").write_text("")
    checkpoints.folder = folder.parent / "file"
    checkpoints.save(tiny_state(), Position(1), make_config(PAIR))
    with pytest.raises(LongvilaError, match=r"step-000001 could not be saved: .*Not a directory.* \(rank 0\)"):
        checkpoints.save(tiny_state(), Position(2), make_config(PAIR))
    checkpoints.close()


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_save_on_every_rank(tmp_path):
    run_ranks(fail_in_the_background, 2, tmp_path / "checkpoints")


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand()


def save_then_draw(folder, asynchronous):
    checkpoints = Checkpoints(folder, 2, asynchronous)
    torch.manual_seed(dist.get_rank())
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    draw()
    checkpoints.save(tiny_state(), Position(1), make_config(PAIR))
    drawn = draw()
    checkpoints.close()
    return drawn


def load_then_draw(folder):
    return load_and_listen(folder)[1], draw()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_rank_goes_on_with_its_own_random_numbers(tmp_path, asynchronous):
    expected = run_ranks(save_then_draw, 2, tmp_path, asynchronous)
    assert expected[0] != expected[1]
    assert [drawn for _, drawn in run_ranks(load_then_draw, 2, tmp_path)] == expected


def test_on_another_number_of_ranks_random_numbers_are_seeded_anew_and_the_log_says_so(tmp_path):
    before = run_ranks(save_then_draw, 2, tmp_path, False)
    found = run_ranks(load_then_draw, 3, tmp_path)
    assert len({str(drawn) for _, drawn in found} | {str(drawn) for drawn in before}) == 5
    assert found == run_ranks(load_then_draw, 3, tmp_path)
    assert "was saved by 2 ranks and continues on 3" in found[0][0][0]


def test_a_checkpoint_says_what_made_it(tmp_path):
    run_ranks(save_some, 2, tmp_path, (1,))
    about = json.loads((tmp_path / "step-000001" / "checkpoint.json").read_text())
    cursor = {"epoch": 0, "window": 0, "row": 0, "sources": []}
    assert about["position"] == {"step": 1, "cursor": cursor, "num_data": None}
    assert about["world"] == 2
    assert about["config"]["name"] == "test"
    assert about["versions"]["torch"] == torch.__version__


def load_under_another_torch(folder):
    checkpoint._versions = lambda: {"torch": "9.9"}
    return load_and_listen(folder)


def test_other_versions_are_named_in_the_log(tmp_path):
    run_ranks(save_some, 1, tmp_path, (1,))
    assert run_ranks(load_and_listen, 1, tmp_path) == [(1, [])]
    step, said = run_ranks(load_under_another_torch, 1, tmp_path)[0]
    assert step == 1
    assert f"'torch': '{torch.__version__}'" in said[0]
    assert "this is {'torch': '9.9'}" in said[0]
