"""A rank that dies or hangs is one error on the others, whatever they were doing, and in every group."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longvila.bench.engines import make_config, make_state, take_steps
from longvila.config import ParallelConfig, ShardingConfig
from longvila.errors import ConfigError, LongvilaError
from longvila.parallel.agree import any_rank, barrier
from longvila.parallel.fold import make_fold, parameter_mesh, start_world, world_timeout
from longvila.parallel.launch import RankError, run_ranks
from longvila.parallel.lost import lost_ranks
from longvila.train.checkpoint import Checkpoints, Position


def seconds_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def timeouts():
    fold = make_fold(ParallelConfig(head=2, inner=1, outer=2), "cpu")
    links = [*vars(fold.links).values(), *vars(fold.return_links).values()]
    meshes = [fold.mesh, parameter_mesh(ShardingConfig("node", "node", "node", node=2), "cpu")]
    groups = [fold.sequence, fold.context, fold.heads, *links, *(g for mesh in meshes for g in mesh.get_all_groups())]
    return world_timeout(), {seconds_of(group) for group in groups}


def test_ranks_wait_as_long_in_every_group_as_in_the_world():
    for world, found in run_ranks(timeouts, 4, timeout=77):
        assert world == timedelta(seconds=77)
        assert found == {77.0}


def in_a_step(state):
    take_steps(state, 1, 1)


def in_an_agreement(state):
    any_rank(False)


def in_a_barrier(state):
    barrier()


def in_a_save(state):
    checkpoints = state.checkpoints
    checkpoints.save({"model": {"weight": torch.zeros(3)}, "optimizer": {}}, Position(1), make_config(ParallelConfig()))


def lose_rank(work, folder):
    """Rank 1 ends without a word; the others, one in its sequence group and two in another, work on."""
    state = make_state(ParallelConfig(inner=2))
    state.checkpoints = Checkpoints(folder, 1)
    take_steps(state, 0, 1)
    if dist.get_rank() == 1:
        os._exit(1)
    with lost_ranks(9):
        work(state)


@pytest.mark.parametrize("work", [in_a_step, in_an_agreement, in_a_barrier, in_a_save])
def test_a_rank_that_died_is_one_error_on_the_others(work, tmp_path):
    with pytest.raises(RankError, match=r"LongvilaError: another rank died, or did not answer within 9 s") as caught:
        run_ranks(lose_rank, 4, work, tmp_path)
    assert str(caught.value).count("LongvilaError: another rank died, or did not answer within 9 s") == 3
    assert "goes on from the last checkpoint" in str(caught.value)


def wait_for_a_rank(port):
    """Rank 1 says nothing for longer than the others wait."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start_world(3.0)
    fold = make_fold(ParallelConfig(inner=2), "cpu")
    dist.barrier(fold.sequence)
    if rank == 1:
        time.sleep(6)
        return None
    begin = time.monotonic()
    with pytest.raises(LongvilaError) as caught, lost_ranks(3.0):
        dist.barrier(fold.sequence)
    return time.monotonic() - begin, str(caught.value)


def test_a_rank_that_hangs_is_an_error_on_the_others_once_the_timeout_is_over():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seconds, said = run_ranks(wait_for_a_rank, 2, port)[0]
    assert 2.9 < seconds < 6
    assert "did not answer within 3 s (Timed out waiting" in said


def fail_otherwise():
    with lost_ranks(9):
        raise RuntimeError("shapes cannot be multiplied")


def test_errors_that_are_not_about_other_ranks_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fail_otherwise()


def test_no_time_to_wait_is_refused():
    with pytest.raises(ConfigError, match="rank_timeout is 0 s"):
        start_world(0)
