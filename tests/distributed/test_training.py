"""Steps on several ranks give the weights of one process, whatever the fold and the sharding."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longvila.bench.engines import (
    DOCUMENTS,
    OPTIMIZER,
    RATE,
    ROWS_PER_STEP,
    make_config,
    make_rows,
    make_state,
    make_step,
    plain_steps,
    take_steps,
)
from longvila.config import DataConfig, ParallelConfig, Phase, ShardingConfig, ValidationConfig
from longvila.errors import ConfigError
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_cases, run_ranks
from longvila.train import loop
from longvila.train import step as step_module
from longvila.train.checkpoint import Position
from longvila.train.feed import IGNORE, Step
from longvila.train.gradients import make_model, make_row, reference
from longvila.train.loop import (
    check_batches,
    check_context,
    claim_folder,
    other_batch,
    part_checksums,
    rows_of_phase,
)
from longvila.train.step import take_step

from .training_parts import RowList, whole_weights


def train_three_steps(parallel, sharding=ShardingConfig()):
    state = make_state(parallel, sharding=sharding)
    figures = take_steps(state, 0, 3)
    return figures, whole_weights(state.model)


@pytest.fixture(scope="module")
def one_process():
    return run_ranks(plain_steps, 1, 3)[0]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig()),
        (2, ParallelConfig(inner=2)),
        (2, ParallelConfig(head=2)),
        (4, ParallelConfig(inner=2, layout="zigzag")),
        (4, ParallelConfig(head=2, outer=2)),
    ],
)
def test_steps_on_several_ranks_give_the_weights_of_one_process(world, parallel, one_process):
    check_steps(run_ranks(train_three_steps, world, parallel), one_process)


SHARDINGS = [
    ShardingConfig(optimizer, parameters, gradients, node)
    for optimizer, parameters in [
        ("world", "node"), ("world", "none"), ("node", "node"), ("node", "none"), ("none", "none"),
    ]
    for gradients in (optimizer, "none")
    for node in (2,)
]  # fmt: skip


def test_every_sharding_gives_the_weights_of_one_process(one_process):
    shardings = [*SHARDINGS, ShardingConfig(gradients="none")]
    cases = [(ParallelConfig(inner=2), sharding) for sharding in shardings]
    for sharding, by_rank in zip(shardings, run_cases(train_three_steps, 4, cases), strict=True):
        check_steps(by_rank, one_process, sharding)


def check_steps(by_rank, one_process, what=""):
    expected_figures, _, expected = one_process
    for figures, weights in by_rank:
        for mine, theirs in zip(figures, expected_figures, strict=True):
            for name, value in theirs.items():
                assert mine[name] == pytest.approx(value, rel=1e-9), (what, name)
            assert mine["grad_norm"] > OPTIMIZER.clip, "clipping must be at work"
        for name, weight in weights.items():
            # AdamW divides by the root of the squared gradient, which magnifies rounding where that is near 0.
            assert (weight - expected[name]).abs().max() < 1e-6 * 3 * RATE + 1e-12, (what, name)


def train_projector():
    state = make_state(ParallelConfig(inner=2), trains=("projector",))
    before = part_checksums(state.engine)
    take_steps(state, 0, 1)
    after = part_checksums(state.engine)
    return {part: before[part] != after[part] for part in before}


def test_only_the_parts_that_a_stage_trains_move():
    for moved in run_ranks(train_projector, 2):
        assert moved == {"vision": False, "projector": True, "language_model": False}


def local_shares(sharding):
    """Of the largest weight: the share of it that this rank keeps, and that of its first moment after a step."""
    state = make_state(ParallelConfig(), sharding=sharding)
    take_steps(state, 0, 1)
    weight = state.model.language_model.model.embed_tokens.weight
    moment = state.engine.optimizer.state[weight]["exp_avg"]
    return [x.to_local().numel() / x.numel() for x in (weight, moment)]


@pytest.mark.parametrize(("scope", "share"), [("world", 1 / 4), ("node", 1 / 2), ("none", 1.0)])
def test_a_rank_keeps_the_share_that_the_scope_says(scope, share):
    for shares in run_ranks(local_shares, 4, ShardingConfig(scope, "none", scope, node=2)):
        assert shares == [share, share]


def reductions(gradients):
    """Gradient reductions of a step of two rows on this rank."""
    state = make_state(ParallelConfig(inner=2), sharding=ShardingConfig(gradients=gradients))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiled:
        take_steps(state, 0, 1)
    names = [event.name for event in profiled.events()]
    return sum(name.startswith("c10d::") and "reduce_scatter" in name for name in names)


def test_whole_gradients_are_reduced_once_a_step():
    (each,), (once,) = (set(run_ranks(reductions, 4, name)) for name in ("world", "none"))
    assert each == 2 * once > 0


def poison(steps_with_nan, max_skipped=10):
    """Makes the loss of one rank not a number at some calls, from 0, and takes five steps."""
    state = make_state(ParallelConfig(inner=2))
    state.config = dataclasses.replace(state.config, optimizer=dataclasses.replace(OPTIMIZER, max_skipped=max_skipped))
    real, calls = step_module.forward_row, itertools.count()

    def forward_row(state, row):
        loss = real(state, row)
        return loss * float("nan") if next(calls) // ROWS_PER_STEP in steps_with_nan and dist.get_rank() == 1 else loss

    step_module.forward_row = forward_row
    figures, weights = [], []
    for step in range(5):
        figures += take_steps(state, step, 1)
        weights.append(whole_weights(state.model))
    return [one["skipped"] for one in figures], weights


def test_a_step_that_is_not_finite_is_skipped_by_all_ranks_and_changes_nothing():
    clean = run_ranks(poison, 2, ())[0][1]
    for skipped, weights in run_ranks(poison, 2, (2, 3)):
        assert skipped == [0, 0, 1, 1, 0]
        for name in clean[0]:
            assert torch.equal(weights[1][name], clean[1][name])
            assert torch.equal(weights[3][name], weights[1][name])
        assert any(not torch.equal(weights[4][name], weights[3][name]) for name in clean[0])


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_a_run():
    assert run_ranks(poison, 2, (1, 3), 1)[0][0] == [0, 1, 0, 1, 0]


def poison_all(bound):
    state = make_state(ParallelConfig(inner=2))
    state.config = dataclasses.replace(state.config, optimizer=dataclasses.replace(OPTIMIZER, **bound))
    take_steps(state, 0, 5)


def without_targets(parallel, dropped):
    """A step whose rows have no target left, of which rank 0's group dropped `dropped` documents; then another."""
    state = make_state(parallel)
    before = whole_weights(state.model)
    step = make_step(state.fold, 0)
    rows = tuple(dataclasses.replace(row, labels=torch.full_like(row.labels, IGNORE)) for row in step.rows)
    figures = take_step(state, Step(rows, 0, dropped if state.fold.data_rank == 0 else 0), RATE)
    unmoved = all(torch.equal(weight, before[name]) for name, weight in whole_weights(state.model).items())
    return figures["skipped"], unmoved, take_steps(state, 1, 1)[0]["skipped"]


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(inner=2), ParallelConfig(pipeline=2)], ids=str)
def test_a_step_whose_documents_were_all_dropped_is_skipped_by_all_ranks(parallel):
    assert run_ranks(without_targets, 2, parallel, 2) == [(1, True, 0)] * 2


def test_a_step_that_never_had_a_target_is_an_error_on_every_rank():
    with pytest.raises(RankError, match="no target token in the whole step") as caught:
        run_ranks(without_targets, 2, ParallelConfig(), 0)
    assert str(caught.value).count("LongvilaError: no target token") == 2


def claim(folder, changes):
    return claim_folder(folder, dataclasses.replace(make_config(ParallelConfig()), **changes))


def test_a_run_goes_on_when_only_how_it_is_carried_out_changes(tmp_path):
    other = {"parallel": ParallelConfig(inner=2), "engine": "zero2", "rank_timeout": 7.0, "recompute": "all"}
    for changes in ({}, other):
        assert run_ranks(claim, 2, tmp_path / "run", changes) == [False, False]
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        assert saved["rank_timeout"] == changes.get("rank_timeout", 1800.0)
    phase, data = make_config(ParallelConfig()).phases[0], make_config(ParallelConfig()).phases[0].data
    workers = dataclasses.replace(data, workers=2, max_bad_share=0.5)
    rows = dataclasses.replace(data, row_tokens=64)
    carried_out = {
        "phases": (dataclasses.replace(phase, data=workers),),
        "optimizer": dataclasses.replace(OPTIMIZER, max_skipped=99),
        "validation": ValidationConfig(data),
    }
    assert run_ranks(claim, 2, tmp_path / "run", carried_out) == [False, False]
    trained = {"phases": (dataclasses.replace(phase, data=rows),)}
    with pytest.raises(RankError, match=r"another configuration: phases\.0\.data\.row_tokens in .*config\.json"):
        run_ranks(claim, 2, tmp_path / "run", trained)
    with pytest.raises(RankError, match=r"holds a run with another configuration: precision, seed in .*config\.json"):
        run_ranks(claim, 2, tmp_path / "run", {"seed": 7, "precision": "bf16", "engine": "fsdp2"})


def test_a_configuration_saved_by_another_version_is_read_or_refused_by_its_field(tmp_path):
    run_ranks(claim, 1, tmp_path / "run", {})
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    del saved["phases"][0]["data"]["frames"]["tiles"]
    path.write_text(json.dumps(saved))
    assert run_ranks(claim, 1, tmp_path / "run", {}) == [False]
    path.write_text(json.dumps(saved | {"forgotten": 1}))
    with pytest.raises(RankError, match=r"config\.json is of another version .* has no field \['forgotten'\]"):
        run_ranks(claim, 1, tmp_path / "run", {})


@pytest.mark.parametrize("bound", [{"skip_norm": 1e-9, "max_skipped": 2}])
def test_too_many_skipped_steps_in_a_row_stop_every_rank_and_name_the_samples(bound):
    with pytest.raises(RankError, match=r"3 steps in a row were skipped") as caught:
        run_ranks(poison_all, 2, bound)
    assert str(caught.value).count("LongvilaError: 3 steps in a row were skipped") == 2
    assert "row8-0" in str(caught.value)


def validate_rows(engine="fsdp2", dtype=torch.float64):
    """Loss on rows that do not train, before and after a step on others, and again."""
    state = make_state(ParallelConfig(inner=2), dtype, engine=engine)
    rows = make_rows(state.fold, range(20, 24))[state.fold.data_rank :: state.fold.num_data]
    loop.make_loader = lambda state, data, root: RowList(rows)
    validation, modes = ValidationConfig(DataConfig(()), rows=4), []
    state.model.language_model.get_decoder().register_forward_pre_hook(lambda module, _: modes.append(module.training))
    losses = [loop.validate(state, validation, Path())]
    assert modes
    assert not any(modes)
    assert all(module.training for module in state.model.modules())
    before = state.engine.weights()
    losses.append(loop.validate(state, validation, Path()))
    untouched = all(torch.equal(weight, before[name]) for name, weight in state.engine.weights().items())
    take_steps(state, 0, 1)
    return [*losses, loop.validate(state, validation, Path())], untouched


def validate_and_look():
    """Checksums of this rank's shares before and after validation, of weights that stay gathered until a backward."""
    state = make_state(ParallelConfig(inner=2), sharding=ShardingConfig(parameters="none"))
    loop.make_loader = lambda state, data, root: RowList(make_rows(state.fold, range(20, 24)))
    before = part_checksums(state.engine)
    loop.validate(state, ValidationConfig(DataConfig(()), rows=4), Path())
    return before, part_checksums(state.engine)


def test_weights_that_validation_gathered_have_not_moved():
    for before, after in run_ranks(validate_and_look, 2):
        assert before == after


@pytest.mark.parametrize("world", [2, 4])
def test_validation_is_the_loss_of_one_process_and_moves_nothing(world):
    rows = [make_row(DOCUMENTS[i % 4], 4, 32, seed=i) for i in range(20, 24)]
    expected, _ = reference(make_model(), rows)
    for (first, again, later), untouched in run_ranks(validate_rows, world):
        assert first == pytest.approx(expected, rel=1e-12)
        assert again == first != later
        assert untouched


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_validation_is_the_same_under_deepspeed(engine):
    pytest.importorskip("deepspeed")
    (expected, _), _ = run_ranks(validate_rows, 2)
    (found, untouched), _ = run_ranks(validate_rows, 2, engine, torch.float32)
    assert found == pytest.approx(expected, rel=1e-5)
    assert untouched


def share_rows(parallel, rows, validated):
    config = make_config(parallel)
    phases = (dataclasses.replace(config.phases[0], rows_per_step=rows),)
    validation = ValidationConfig(DataConfig(()), rows=validated)
    config, fold = dataclasses.replace(config, phases=phases, validation=validation), make_fold(parallel, "cpu")
    check_batches(config, fold)
    return rows_of_phase(config, 0, fold)


def test_data_ranks_share_the_rows_of_a_step():
    assert run_ranks(share_rows, 2, ParallelConfig(), 6, 8) == [3, 3]
    assert run_ranks(share_rows, 2, ParallelConfig(), None, 8) == [1, 1]
    assert run_ranks(share_rows, 2, ParallelConfig(inner=2), 3, 7) == [3, 3]
    for rows, validated, words in [
        (3, 8, r"phases\.0\.rows_per_step=3 rows cannot be shared out evenly over 2 data ranks"),
        (0, 8, r"phases\.0\.rows_per_step=0 rows"),
        (4, 7, r"validation\.rows=7 rows cannot be shared out evenly over 2 data ranks"),
    ]:
        with pytest.raises(RankError, match=words):
            run_ranks(share_rows, 2, ParallelConfig(), rows, validated)


def test_steps_of_other_numbers_of_rows_are_warned_about():
    assert other_batch(Position(3), 4) is None
    assert other_batch(Position(3, num_data=4), 4) is None
    assert "2 data ranks reads the rows of a step, where 4 did before: a step has 0.5 times" in other_batch(
        Position(3, num_data=4), 2
    )


def test_rows_longer_than_the_context_are_refused_unless_a_phase_extends_it():
    def phase(name, tokens, theta=None):
        return Phase(name, 1, DataConfig((), row_tokens=tokens), 1e-3, rope_theta=theta)

    def stage(*phases, validated=None):
        every = ValidationConfig(DataConfig((), row_tokens=8192), every=validated) if validated else None
        return make_config(ParallelConfig(), phases=phases, validation=every)

    long = phase("a", 4096), phase("b", 8192, 5e5), phase("c", 8192)
    check_context(4096, stage(*long))
    with pytest.raises(ConfigError, match="phase c has rows of 16384 tokens, but the model's context is 8192"):
        check_context(4096, stage(*long[:2], phase("c", 16384)))
    check_context(4096, stage(*long, validated=2))
    with pytest.raises(ConfigError, match=r"validation has rows of 8192 tokens, .* context is 4096 .* in phase a"):
        check_context(4096, stage(*long, validated=1))
