"""The whole model: equal to the plain Hugging Face language model, kept by saving, faithful in generation."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config

from longvila.config import ModelConfig
from longvila.errors import ConfigError, DataError
from longvila.model import LongVilaModel, build_model, load_model, save_model
from longvila.model.rope import extend_context

from .model_parts import byte_tokenizer, llama, model_config, qwen3, random_frames

FRAME = 259  # the first id after byte_tokenizer's own


def row(num_frames=2, tokens_per_frame=4):
    """Two documents, frames in the first; labels already shifted, on the tail of each."""
    first = [1, 10, *[FRAME] * (num_frames * tokens_per_frame), 20, 21, 22, 2]
    second = [1, 30, 31, 2]
    labels = [-100] * (len(first) - 4) + [21, 22, 2, -100] + [-100, 31, 2, -100]
    positions = [*range(len(first)), *range(len(second))]
    return {
        "input_ids": torch.tensor([first + second]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


@pytest.mark.parametrize("language_model", [qwen3, llama])
def test_loss_and_gradients_equal_the_plain_language_model_on_each_document(tmp_path, language_model):
    model, _ = build_model(model_config(tmp_path, language_model()))
    model.double()
    frames, batch = random_frames(2), row()
    output = model(frames=frames, loss_chunk=2, **batch)
    output.loss_sum.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    loss = 0
    ids, labels, positions = (batch[key][0] for key in ("input_ids", "labels", "position_ids"))
    split = int((positions == 0).nonzero()[1])
    for part in (slice(0, split), slice(split, None)):
        embeddings = model.language_model.get_input_embeddings()(ids[part].where(ids[part] != FRAME, 0))
        if (ids[part] == FRAME).any():
            embeddings = embeddings.index_put(
                ((ids[part] == FRAME).nonzero()[:, 0],), model.encode_frames(frames).flatten(0, 1)
            )
        logits = model.language_model(inputs_embeds=embeddings[None]).logits[0]
        loss = loss + F.cross_entropy(logits, labels[part], ignore_index=-100, reduction="sum")
    loss.backward()

    assert output.num_targets == 5
    torch.testing.assert_close(output.loss_sum, loss, rtol=0, atol=1e-11)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-11, msg=name)


def test_a_row_without_frames_still_gives_every_parameter_a_gradient(tmp_path):
    model, _ = build_model(model_config(tmp_path))
    batch = {key: value[:, -4:] for key, value in row().items()}
    model(frames=random_frames(0), **batch).loss_sum.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert sum(parameter.grad.abs().sum() for parameter in model.vision.parameters()) == 0


def test_a_route_decides_which_frame_token_goes_to_which_placeholder(tmp_path):
    model, _ = build_model(model_config(tmp_path))
    batch, frames = row(), random_frames(2)
    del batch["labels"]
    plain = model(frames=frames.flip(0), **batch).logits
    routed = model(frames=frames, route=lambda tokens: tokens.flip(0).flatten(0, 1), **batch).logits
    torch.testing.assert_close(plain, routed)


def test_placeholders_that_do_not_match_the_frames_are_refused_with_both_numbers(tmp_path):
    model, _ = build_model(model_config(tmp_path))
    with pytest.raises(DataError, match="8 frame placeholders, but 12 frame tokens"):
        model(frames=random_frames(3), **row())


def test_saving_and_loading_keeps_every_logit_and_the_tied_weights(tmp_path):
    model, tokenizer = build_model(model_config(tmp_path))
    save_model(model, tokenizer, tmp_path / "saved")
    save_model(model, tokenizer, tmp_path / "saved")  # again, over the first
    loaded, loaded_tokenizer = load_model(tmp_path / "saved")
    batch = row()
    del batch["labels"]
    expected = model.eval()(frames=random_frames(2), **batch).logits
    torch.testing.assert_close(loaded(frames=random_frames(2), **batch).logits, expected, rtol=0, atol=0)
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight
    assert type(loaded.language_model) is type(qwen3())
    assert loaded_tokenizer.convert_tokens_to_ids("<frame>") == loaded.config.frame_token_id == FRAME
    assert isinstance(AutoModel.from_pretrained(tmp_path / "saved"), LongVilaModel)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("saved")] == ["saved"]


def test_a_rope_base_set_after_building_is_saved_with_the_model(tmp_path):
    model, tokenizer = build_model(model_config(tmp_path))
    extend_context(model.language_model, 5e4, 65_536)
    save_model(model, tokenizer, tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model")
    assert loaded.language_model.config.rope_parameters["rope_theta"] == 5e4
    assert loaded.language_model.config.max_position_embeddings == 65_536


def test_building_keeps_the_weights_of_the_language_model_and_follows_the_seed(tmp_path):
    config = model_config(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(config.language_model).state_dict()
    first, second, other = (build_model(config, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(plain[name], value) for name, value in first.language_model.state_dict().items())
    same = second.state_dict()
    assert all(torch.equal(same[name], value) for name, value in first.state_dict().items())
    assert not torch.equal(first.projector.layers[1].weight, other.projector.layers[1].weight)
    assert not torch.equal(first.vision.patch_projection.weight, other.vision.patch_projection.weight)


def test_generation_with_a_cache_equals_greedy_choice_without_one(tmp_path):
    model, _ = build_model(model_config(tmp_path))
    model.eval()
    prompt, frames = row()["input_ids"][:, :12], random_frames(2)
    new = model.generate(prompt, frames, max_new_tokens=8, do_sample=False, eos_token_id=2)
    from_tokens = model.generate(prompt, model.encode_frames(frames), max_new_tokens=8, do_sample=False, eos_token_id=2)
    ids = prompt
    for _ in range(8):
        logits = model(ids, frames, torch.arange(ids.shape[1])[None]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert new.tolist() == from_tokens.tolist()
    assert new[0].tolist() == ids[0, 12 : 12 + new.shape[1]].tolist()
    assert new.shape[1] == 8 or new[0, -1] == 2


def test_a_folder_that_is_no_checkpoint_of_ours_is_refused(tmp_path):
    config = model_config(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="type 'qwen3', not a longvila checkpoint"):
        load_model(tmp_path / "language_model")
    with pytest.raises(ConfigError, match="nobody/nothing"):
        build_model(ModelConfig(config.tower, None, str(tmp_path / "nobody/nothing")))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer = build_model(model_config(tmp_path))
    save_model(model, tokenizer, tmp_path / "saved")
    weights = load_file(tmp_path / "saved/model.safetensors")
    weights.pop("projector.layers.1.bias")
    save_file(weights, tmp_path / "saved/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing.*projector\.layers\.1\.bias"):
        load_model(tmp_path / "saved")


QWEN2 = {  # as published: https://huggingface.co/Qwen/Qwen2-1.5B-Instruct and Qwen2-7B-Instruct, config.json
    "1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize(("scale", "language_parameters"), [("1.5b", 1_543_714_304), ("7b", 7_615_616_512)])
def test_the_published_scales_have_their_sizes(tmp_path, scale, language_parameters):
    Qwen2Config(**QWEN2[scale]).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = build_model(ModelConfig("ViT-SO400M-14-SigLIP-384", "webli", str(tmp_path)), device="meta")
    width, text = 1152, QWEN2[scale]["hidden_size"]
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    block = 4 * width * (width + 1) + 2 * width * 4304 + width + 4304 + 4 * width
    assert count["vision"] == 26 * block + 27 * 27 * width + 14 * 14 * 3 * width + width
    assert count["projector"] == 2 * 4 * width + 4 * width * text + text + text * text + text
    assert count["language_model"] == language_parameters
    assert (model.vision.grid, model.projector.tokens_per_frame) == (27, 196)
