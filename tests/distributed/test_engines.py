"""FSDP2 and every stage of DeepSpeed's ZeRO take the steps of one process, and continue what another saved."""

import importlib
import json
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from longvila.bench.engines import FIRST_GRADIENT, NORM, engine_steps, errors, make_state, plain_steps, take_steps
from longvila.config import LoraConfig, ParallelConfig
from longvila.difference import relative_error
from longvila.parallel.launch import run_ranks
from longvila.shards.order import Cursor
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.gradients import make_model
from longvila.train.loop import part_checksums, resume

pytest.importorskip("deepspeed")

STEPS = 10
ENGINES = ["fsdp2", "zero1", "zero2", "zero3"]
TWO = ParallelConfig(inner=2)


def imports_of_a_step():
    before = set(sys.modules)
    engine_steps(TWO, "zero3", torch.float32, 1)
    return [name for name in sys.modules if name not in before]


@pytest.fixture(scope="module", autouse=True)
def imported_once():
    """What DeepSpeed imports when it is first used, a second and more, before ranks are forked and not in each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in run_ranks(imports_of_a_step, 2)[0]:
            if name.startswith("deepspeed."):
                importlib.import_module(name)


@pytest.fixture(scope="module")
def textbook():
    return run_ranks(plain_steps, 1, STEPS)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("world", "parallel"), [(2, TWO), (4, ParallelConfig(head=2))])
def test_ten_steps_of_every_engine_are_those_of_one_process(engine, world, parallel, textbook):
    found = run_ranks(engine_steps, world, parallel, engine, torch.float32, STEPS)[0]
    assert errors(found, textbook, exact=False)["within"]


def test_ten_steps_of_fsdp2_are_exact_in_fp64(textbook):
    found = run_ranks(engine_steps, 2, TWO, "fsdp2", torch.float64, STEPS)[0]
    assert errors(found, textbook, exact=True)["within"]


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_halved_gradients_hide_in_the_weights_and_are_seen_in_norms_and_gradients(engine, textbook):
    found = errors(run_ranks(engine_steps, 2, TWO, engine, torch.float32, STEPS, 0.5)[0], textbook, exact=False)
    assert found["weight_error"] < 0.01
    assert found["norm_error"] > 0.49 > NORM
    assert found["first_gradient_error"] > 0.49 > FIRST_GRADIENT
    assert not found["within"]


def save_after_two(engine, folder, fields):
    state = make_state(TWO, torch.float32, engine=engine, **fields)
    assert resume(state.engine, Checkpoints(folder, 1)) == Position()
    take_steps(state, 0, 2)
    Checkpoints(folder, 1).save(state.engine.state(), Position(2, Cursor(0, 0, 8)), state.config)
    take_steps(state, 2, 2)
    return state.engine.weights()


def continue_after_two(engine, folder, parallel, fields):
    state = make_state(parallel, torch.float32, engine=engine, **fields)
    assert resume(state.engine, Checkpoints(folder, 1)) == Position(2, Cursor(0, 0, 8))
    take_steps(state, 2, 2)
    return state.engine.weights()


@pytest.mark.parametrize("saved_by", ["fsdp2", "zero1", "zero3"])
def test_every_engine_continues_what_another_saved(saved_by, tmp_path):
    expected = run_ranks(save_after_two, 2, saved_by, tmp_path, {})[0]
    for engine, world, parallel in [("fsdp2", 2, TWO), ("zero1", 2, TWO), ("zero2", 4, TWO), ("zero3", 2, TWO)]:
        found = run_ranks(continue_after_two, world, engine, tmp_path, parallel, {})[0]
        difference = max(relative_error(found[name], weight, scale=1) for name, weight in expected.items())
        assert difference == 0 if engine == saved_by else difference < 2e-6, engine


THREE = ParallelConfig(inner=3)
"""Ranks among which few parameters divide evenly."""


def save_on_three(engine, folder):
    state = make_state(THREE, torch.float32, engine=engine)
    take_steps(state, 0, 2)
    Checkpoints(folder, 1).save(state.engine.state(), Position(2, Cursor(0, 0, 8)), state.config)
    take_steps(state, 2, 2)
    return state.engine.weights()


@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_an_engine_continues_where_parameters_do_not_divide_among_the_ranks(engine, tmp_path):
    expected = run_ranks(save_on_three, 3, engine, tmp_path)[0]
    found = run_ranks(continue_after_two, 3, engine, tmp_path, THREE, {})[0]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def discard(engine, parallel):
    """Weights and moments after two steps, with a step dropped between them and without."""
    ends = []
    for dropped in (False, True):
        state = make_state(parallel, torch.float32, engine=engine)
        take_steps(state, 0, 1)
        if dropped:
            config = state.config
            state.config = replace(config, optimizer=replace(config.optimizer, skip_norm=1e-9))
            assert take_steps(state, 5, 1)[0]["skipped"] == 1
            state.config = config
        take_steps(state, 1, 1)
        moments = state.engine.state()["optimizer"]
        ends.append((state.engine.weights(), {k: v["exp_avg"].full_tensor() for k, v in moments.items()}))
    return ends


@pytest.mark.parametrize(
    ("engine", "world", "parallel"), [*((engine, 2, TWO) for engine in ENGINES), ("zero3", 3, THREE)]
)
def test_a_step_that_is_dropped_leaves_no_trace(engine, world, parallel):
    (weights, moments), (dropped_weights, dropped_moments) = run_ranks(discard, world, engine, parallel)[0]
    assert all(torch.equal(weights[name], dropped_weights[name]) for name in weights)
    assert all(torch.equal(moments[name], dropped_moments[name]) for name in moments)


def train_adapters(engine):
    state = make_state(TWO, torch.float32, engine=engine, trains=("projector", "language_model"), lora=LoraConfig(2, 4))
    before = part_checksums(state.engine)
    take_steps(state, 0, 3)
    after = part_checksums(state.engine)
    return state.engine.weights(), {part: before[part] != after[part] for part in before}


def test_frozen_parts_and_adapters_train_alike_under_every_engine():
    expected, moved = run_ranks(train_adapters, 2, "fsdp2")[0]
    assert moved == {"vision": False, "projector": True, "language_model": True}
    assert any("lora_" in name for name in expected)
    for engine in ENGINES[1:]:
        found, moved_too = run_ranks(train_adapters, 2, engine)[0]
        assert moved_too == moved
        assert found.keys() == expected.keys()
        assert max(relative_error(found[name], weight, scale=1) for name, weight in expected.items()) < 2e-6


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_the_users_own_file_offloads_to_the_host_and_the_steps_stay_the_same(engine, tmp_path, textbook):
    file = tmp_path / "deepspeed.json"
    offload = {"device": "cpu"}
    stage = {"stage": int(engine[-1]), "offload_optimizer": offload, "reduce_bucket_size": "auto"}
    file.write_text(json.dumps({"zero_optimization": stage, "train_batch_size": "auto", "gradient_clipping": "auto"}))
    found = run_ranks(offloaded_steps, 2, engine, str(file))[0]
    assert errors(found, textbook, exact=False)["within"]


def offloaded_steps(engine, file):
    return engine_steps(TWO, engine, torch.float32, STEPS, deepspeed_json=file)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_bf16_keeps_masters_and_what_is_frozen_in_fp32(engine, tmp_path):
    fields = {"precision": "bf16", "trains": ("projector", "language_model")}
    expected = run_ranks(save_after_two, 2, engine, tmp_path, fields)[0]
    start = make_model().float().state_dict()
    assert all(torch.equal(start[name], weight) for name, weight in expected.items() if name.startswith("vision."))
    assert any((weight != weight.bfloat16().float()).any() for name, weight in expected.items() if "q_proj" in name)
    same = run_ranks(continue_after_two, 2, engine, tmp_path, TWO, fields)[0]
    assert all(torch.equal(same[name], weight) for name, weight in expected.items())
    other = run_ranks(continue_after_two, 2, "fsdp2", tmp_path, TWO, fields)[0]
    # AdamW turns a gradient that bf16 rounds to the other side of 0 round: two steps' worth, either way.
    assert max(relative_error(other[name], weight, scale=1) for name, weight in expected.items()) <= 4.1e-3


def frequencies(engine):
    state = make_state(TWO, torch.float32, engine=engine, precision="bf16")
    return state.model.language_model.get_decoder().rotary_emb.inv_freq


def ask_for_the_state(engine):
    """Weights after two steps, with the state asked for before the first and without."""
    ends = []
    for asked in (False, True):
        state = make_state(TWO, torch.float32, engine=engine)
        if asked:
            state.engine.state()
        take_steps(state, 0, 2)
        ends.append(state.engine.weights())
    return ends


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_asking_for_the_state_changes_no_step(engine):
    weights, asked = run_ranks(ask_for_the_state, 2, engine)[0]
    assert all(torch.equal(weights[name], asked[name]) for name in weights)


def test_rope_frequencies_stay_in_fp32_where_deepspeed_casts_the_model():
    expected = make_model().float().language_model.get_decoder().rotary_emb.inv_freq
    assert torch.equal(run_ranks(frequencies, 2, "zero2")[0], expected)
