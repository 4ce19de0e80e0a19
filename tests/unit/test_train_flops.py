"""Model FLOPs are what torch's own counter sees of the same model, and of attention only what the mask allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from longvila.config import PARTS, LoraConfig
from longvila.model import build_model
from longvila.parallel.batch import shift_labels
from longvila.parallel.blocks import Mask
from longvila.shards.rows import Row
from longvila.train import flops
from longvila.train.flops import count_flops, peak_flops, visible_pairs
from longvila.train.optimizer import add_lora, choose_trained

from .model_parts import llama, model_config, random_frames

SIZES = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
NUM_FRAMES = 3


def moe():
    config = Qwen3MoeConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=48, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def timm_tower() -> dict:
    return {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "map", "timm_proj": "none"}


def make_row(model) -> Row:
    """One document of frames and text, of which every token is a target."""
    places = NUM_FRAMES * model.projector.tokens_per_frame
    ids = torch.cat([torch.full((places,), model.config.frame_token_id), torch.arange(7, 18)])
    labels = torch.arange(len(ids)) % 200
    frames = random_frames(NUM_FRAMES, model.vision.image_size)
    return Row(ids, labels, torch.arange(len(ids)), (len(ids),), ("a",), (NUM_FRAMES,), frames, ())


def counted_by_torch(model, row: Row) -> int:
    """Forward and backward with all logits; attention as plain matrix products, over every pair."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model.train()(row.input_ids[None], row.frames, row.position_ids[None])
        torch.nn.functional.cross_entropy(output.logits[0], row.labels).backward()
    # Some releases of transformers write the outer product of positions and frequencies as a matrix product.
    with FlopCounterMode(display=False) as angles:
        model.language_model.get_decoder().rotary_emb(torch.empty(1), row.position_ids[None])
    return counter.get_total_flops() - angles.get_total_flops()


def over_every_pair(found: flops.ModelFlops) -> flops.ModelFlops:
    return replace(found, masks=(Mask(causal=False),) * len(found.masks))


@pytest.mark.parametrize("trains", [PARTS, ("projector",), ("projector", "language_model"), ("vision",)], ids=str)
@pytest.mark.parametrize("projector", ["downsample_mlp", "linear"])
def test_they_are_what_torch_counts_whatever_is_trained(tmp_path, trains, projector):
    model, _ = build_model(model_config(tmp_path, projector=projector))
    choose_trained(model, trains)
    row = make_row(model)
    assert over_every_pair(count_flops(model)).of_row(row) == counted_by_torch(model, row)


@pytest.mark.parametrize("language_model", [llama, moe], ids=["untied", "experts"])
def test_they_are_what_torch_counts_of_other_language_models(tmp_path, language_model):
    model, _ = build_model(model_config(tmp_path, language_model()))
    model.language_model.set_experts_implementation("eager")  # torch does not count grouped products
    row = make_row(model)
    assert over_every_pair(count_flops(model)).of_row(row) == counted_by_torch(model, row)


def test_they_are_what_torch_counts_of_a_timm_tower(tmp_path):
    model, _ = build_model(model_config(tmp_path, **timm_tower()))
    row = make_row(model)
    assert over_every_pair(count_flops(model)).of_row(row) == counted_by_torch(model, row)


def test_they_are_what_torch_counts_of_adapters(tmp_path):
    model, _ = build_model(model_config(tmp_path))
    choose_trained(model, ("language_model",))
    add_lora(model.language_model, LoraConfig(rank=2))
    row = make_row(model)
    assert over_every_pair(count_flops(model)).of_row(row) == counted_by_torch(model, row)


def test_a_frozen_tower_costs_a_third(tmp_path):
    model, _ = build_model(model_config(tmp_path, projector="linear"))
    choose_trained(model, ("language_model",))
    frozen = count_flops(model).frame
    choose_trained(model, PARTS)
    first = 2 * model.vision.patch_projection.weight.numel() * model.vision.grid**2
    assert count_flops(model).frame == 3 * frozen - first  # no gradient of pixels


@pytest.mark.parametrize("mask", [Mask(), Mask(window=4), Mask(window=64), Mask(causal=False)], ids=str)
def test_pairs_are_those_of_the_dense_mask(mask):
    lengths = (1, 9, 4, 30)
    total = 0
    for length in lengths:
        i, j = torch.arange(length)[:, None], torch.arange(length)
        seen = (j <= i) | (not mask.causal)
        total += int((seen & (i - j < (mask.window or length))).sum())
    assert visible_pairs(lengths, mask) == total


def test_a_packed_row_costs_what_its_documents_cost_alone(tmp_path):
    config = MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=48, sliding_window=5)
    model, _ = build_model(model_config(tmp_path, MistralForCausalLM(config)))
    found = count_flops(model)
    assert found.masks == (Mask(window=5),) * 2
    lengths = (12, 3, 20)
    labels = torch.arange(35)
    labels[:6] = -100

    def row(labels, lengths):
        empty = torch.zeros(sum(lengths), dtype=torch.long)
        return Row(empty, shift_labels(labels, lengths), empty, lengths, ("",) * len(lengths), (0,) * len(lengths),
                   random_frames(0), ())  # fmt: skip

    alone = [row(part, (len(part),)) for part in labels.split(lengths)]
    whole = row(labels, lengths)
    assert found.of_row(whole) == sum(found.of_row(one) for one in alone)
    assert found.of_row(whole) < found.of_row(row(labels, (35,)))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 2060", None),
    ],
)
def test_a_gpu_is_known_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), "bf16") == peak
    assert peak_flops(torch.device("cuda", 0), "fp32") is None


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), "bf16") is None
