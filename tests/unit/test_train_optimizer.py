"""Which parameters move, in which group, and at what rate."""

import math

import pytest

from longvila.config import DataConfig, OptimizerConfig, ParameterGroup, Phase
from longvila.errors import ConfigError
from longvila.train.gradients import make_model
from longvila.train.optimizer import choose_trained, freeze, learning_rate, make_optimizer, set_learning_rate


@pytest.fixture
def model():
    return make_model()


def groups_of(model, *groups, weight_decay=0.1):
    """name -> (factor, weight decay) of every trained parameter."""
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=weight_decay, groups=groups))
    set_learning_rate(optimizer, 2.0)
    found = {
        id(p): (group["lr"] / 2, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_matrices_decay_and_norms_biases_and_embeddings_do_not(model):
    decays = {name: decay for name, (_, decay) in groups_of(model, ParameterGroup("")).items()}
    for kind, decay in [
        ("q_proj.weight", 0.1),
        ("c_fc.weight", 0.1),
        ("norm.weight", 0),
        ("bias", 0),
        ("embed_tokens", 0),
        ("positional_embedding", 0),
    ]:
        found = {name: value for name, value in decays.items() if kind in name}
        assert found, kind
        assert set(found.values()) == {decay}, found


def test_betas_and_epsilon_are_the_configurations(model):
    groups = (ParameterGroup(r"^vision\.", 0.1), ParameterGroup(""))
    optimizer = make_optimizer(model, OptimizerConfig(betas=(0.7, 0.8), eps=1e-3, groups=groups))
    assert len(optimizer.param_groups) > 1
    assert {(*group["betas"], group["eps"], group["amsgrad"]) for group in optimizer.param_groups} == {
        (0.7, 0.8, 1e-3, False)
    }


def test_a_parameter_follows_the_first_group_that_matches_its_name(model):
    groups = groups_of(
        model, ParameterGroup(r"^vision\.", 0.1), ParameterGroup("norm", 1.0, 0.3), ParameterGroup("", 0.5)
    )
    for name, (factor, decay) in groups.items():
        if name.startswith("vision."):
            assert factor == pytest.approx(0.1)
        elif "norm" in name:
            assert (factor, decay) == (1.0, 0.3)
        else:
            assert factor == 0.5


def test_a_group_without_parameters_is_refused_by_name(model):
    with pytest.raises(ConfigError, match=r"group 'nothing' has no parameter"):
        groups_of(model, ParameterGroup("nothing"), ParameterGroup(""))
    with pytest.raises(ConfigError, match=r"group 'vision' has no parameter"):
        groups_of(model, ParameterGroup(""), ParameterGroup("vision"))


def test_a_parameter_in_no_group_is_refused_by_name(model):
    with pytest.raises(ConfigError, match=r"no group .* matches the parameter language_model\."):
        groups_of(model, ParameterGroup("vision"), ParameterGroup("projector"))


def test_parameters_are_frozen_by_name(model):
    choose_trained(model, ("projector", "language_model"))
    freeze(model, (r"layers\.0\.", "embed"))
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name in moving if "layers.0." in name or "embed" in name or name.startswith("vision")]
    assert any("layers.1." in name for name in moving)


def test_freezing_nothing_or_everything_is_refused(model):
    choose_trained(model, ("projector",))
    with pytest.raises(ConfigError, match=r"'embed' matches no trained parameter; they are projector\."):
        freeze(model, ("embed",))
    with pytest.raises(ConfigError, match="leaves no parameter of projector to train"):
        freeze(model, ("projector",))


def test_freezing_a_whole_part_that_is_to_train_is_refused_by_its_name(model):
    choose_trained(model, ("vision", "projector"))
    with pytest.raises(ConfigError, match="leaves no parameter of vision to train; take it out of trains"):
        freeze(model, (r"^vision\.",))


def phase(schedule, steps=100, warmup=0.1, floor=0.0):
    return Phase("p", steps, DataConfig(()), 2.0, schedule, warmup, floor=floor)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "warmup_stable_decay"])
def test_the_rate_rises_to_its_peak_and_no_step_is_taken_at_zero(schedule):
    rates = [learning_rate(phase(schedule), step) for step in range(100)]
    assert min(rates) > 0
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == pytest.approx(2.0)
    assert (rates[-1] < 0.5) == (schedule != "constant")


def test_a_stable_rate_stays_at_its_peak_until_the_last_tenth():
    rates = [learning_rate(phase("warmup_stable_decay", floor=0.1), step) for step in range(100)]
    assert rates[9:90] == [2.0] * 81
    assert rates[90:] == sorted(rates[90:], reverse=True)
    assert 0.2 < rates[99] < 0.3 < rates[95] < rates[90] < 2


def test_cosine_is_the_textbooks_and_ends_at_its_floor():
    rates = [learning_rate(phase("cosine", warmup=0.0, floor=0.1), step) for step in range(100)]
    expected = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step + 1) / 101))) for step in range(100)]
    assert rates == pytest.approx(expected)
    assert learning_rate(phase("linear", floor=0.25), 99) == pytest.approx(0.5, rel=0.05)
