"""The user's DeepSpeed file and the configuration: completed where they agree, refused where they do not."""

import json
from dataclasses import replace

import pytest

from longvila.bench.engines import make_config
from longvila.config import MixtureConfig, OptimizerConfig, ParallelConfig, ShardingConfig
from longvila.errors import ConfigError
from longvila.train.deepspeed import deepspeed_config

CONFIG = make_config(ParallelConfig(), engine="zero2")


def merged(tmp_path, file, **fields):
    path = tmp_path / "deepspeed.json"
    path.write_text(file if isinstance(file, str) else json.dumps(file))
    return deepspeed_config(replace(CONFIG, deepspeed_json=str(path), **fields), world=4)


def test_without_a_file_the_configuration_says_everything():
    found = deepspeed_config(CONFIG, world=4)
    assert found["zero_optimization"] == {"stage": 2}
    assert found["gradient_clipping"] == CONFIG.optimizer.clip
    assert found["train_batch_size"] == 4


def test_a_file_as_hugging_face_writes_it_is_taken(tmp_path):
    file = {
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.1}},
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "reduce_bucket_size": "auto",
            "overlap_comm": True,
        },
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": 1,
        "wall_clock_breakdown": False,
    }  # fmt: skip
    found = merged(tmp_path, file)
    assert found["zero_optimization"] == {
        "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "overlap_comm": True,
    }  # fmt: skip
    assert "optimizer" not in found
    assert "scheduler" not in found
    assert "auto" not in json.dumps(found)
    assert found["wall_clock_breakdown"] is False


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, here it is 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, here it is 0.5"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, here it is False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, here it is 1"),
        ({"train_batch_size": 512}, "train_batch_size is 512, here it is decided by the run"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type is Adam, here it is AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, "optimizer.params.lr is 0.0003"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type is WarmupLR"),
        ({"prescale_gradients": True}, "prescale_gradients is True"),
    ],
)
def test_a_file_that_contradicts_the_configuration_is_refused_with_both_values(tmp_path, file, words):
    with pytest.raises(ConfigError) as caught:
        merged(tmp_path, file)
    assert words in str(caught.value)


def test_every_contradiction_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"gradient_clipping.*; .*stage"):
        merged(tmp_path, {"gradient_clipping": 7, "zero_optimization": {"stage": 1}})


@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read"), ("[]", "holds list, not an object")])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        merged(tmp_path, text)


def test_what_zero_cannot_do_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="use zero2"):
        deepspeed_config(replace(CONFIG, engine="zero1", precision="bf16"), 2)
    with pytest.raises(ConfigError, match="sharding"):
        deepspeed_config(replace(CONFIG, sharding=ShardingConfig("node")), 2)
    with pytest.raises(ConfigError, match=r"parallel\.experts=2"):
        deepspeed_config(replace(CONFIG, parallel=ParallelConfig(experts=2)), 2)
    with pytest.raises(ConfigError, match="mixture"):
        deepspeed_config(replace(CONFIG, mixture=MixtureConfig(balance=0.1)), 2)
    for what in ("offload_optimizer", "offload_param"):
        nvme = {"zero_optimization": {"stage": 3, "offload_param": None, what: {"device": "nvme"}}}
        with pytest.raises(ConfigError, match=f"{what} on nvme"):
            merged(tmp_path, nvme, engine="zero3")


def test_the_weight_decay_of_a_file_is_compared(tmp_path):
    file = {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.2}}}
    with pytest.raises(ConfigError, match=r"weight_decay is 0\.2, here it is 0\.1"):
        merged(tmp_path, file)
    assert merged(tmp_path, file, optimizer=OptimizerConfig(weight_decay=0.2))
