"""The vision tower: the features are open_clip's own, and nothing unused is left in it."""

import json

import open_clip
import pytest
import torch

from longvila.errors import ConfigError, DataError
from longvila.model.tower import VisionTower, build_visual, load_tower_weights, read_tower_config

from .model_parts import VISION, random_frames


def tower_file(tmp_path, **vision):
    path = tmp_path / "tower.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": {**VISION, **vision}, "text_cfg": {}}))
    return str(path)


def siglip_file(tmp_path):
    """SigLIP's kind of tower (timm trunk, attention pooling), as small as timm has one."""
    path = tmp_path / "siglip.json"
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    data = {
        "model_cfg": {"embed_dim": 64, "vision_cfg": vision},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    path.write_text(json.dumps(data))
    return str(path)


def normalised(frames, config):
    mean, std = (torch.tensor(config["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
    return (frames.float() / 255 - mean) / std


def test_features_are_those_of_the_last_block_but_one(tmp_path):
    config = read_tower_config(tower_file(tmp_path))
    visual = build_visual(config).eval()
    frames = random_frames(2)
    expected = visual.forward_intermediates(normalised(frames, config), output_fmt="NLC")["image_intermediates"][-2]
    tower = VisionTower(config, visual.state_dict()).eval()
    assert (tower.grid, tower.width, tower.image_size, len(tower.blocks)) == (4, 32, 32, 2)
    torch.testing.assert_close(tower(frames), expected)


def test_siglip_features_are_those_of_the_last_block_but_one(tmp_path):
    config = read_tower_config(siglip_file(tmp_path))
    visual = build_visual(config).eval()
    frames = random_frames(1, 160)
    expected = visual.forward_intermediates(normalised(frames, config), output_fmt="NLC")["image_intermediates"][-2]
    tower = VisionTower(config, visual.state_dict()).eval()
    assert (tower.grid, tower.width, len(tower.blocks)) == (10, 64, 5)
    torch.testing.assert_close(tower(frames), expected)


@pytest.mark.parametrize("make", [tower_file, siglip_file])
def test_every_parameter_of_the_tower_gets_a_gradient(tmp_path, make):
    tower = VisionTower(read_tower_config(make(tmp_path)))
    tower(random_frames(1, tower.image_size)).square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_a_named_siglip_is_normalised_as_its_published_weights_were():
    config = read_tower_config("ViT-SO400M-14-SigLIP-384")
    assert config["preprocess_cfg"] == {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    assert read_tower_config("ViT-B-32")["preprocess_cfg"]["mean"] == list(open_clip.OPENAI_DATASET_MEAN)


def test_weights_are_read_from_a_whole_clip_or_from_the_visual_part_alone(tmp_path):
    name = tower_file(tmp_path)
    visual = build_visual(read_tower_config(name)).state_dict()
    torch.save(visual, tmp_path / "visual.pt")
    torch.save({"logit_scale": torch.ones(()), **{f"visual.{k}": v for k, v in visual.items()}}, tmp_path / "clip.pt")
    for file in ("visual.pt", "clip.pt"):
        loaded = load_tower_weights(name, str(tmp_path / file))
        assert loaded.keys() == visual.keys()
        assert all(torch.equal(loaded[key], visual[key]) for key in visual)


def test_weights_of_another_tower_are_refused(tmp_path):
    weights = build_visual(read_tower_config(tower_file(tmp_path, width=48))).state_dict()
    with pytest.raises(ConfigError, match="weights are of another tower"):
        VisionTower(read_tower_config(tower_file(tmp_path)), weights)


def test_a_tower_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ConfigError, match="ViT-Z-99"):
        read_tower_config("ViT-Z-99")
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        read_tower_config("nowhere.json")


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"layers": 1}, "has 1 block; features are those of the last but one"),
        ({"patch_size": 64}, "images of 32 pixels hold no patch of 64"),
        ({"depth": 4}, "open_clip does not know: .*'depth'"),
    ],
)
def test_a_tower_that_cannot_be_built_is_refused_with_the_numbers(tmp_path, vision, words):
    with pytest.raises(ConfigError, match=words):
        VisionTower(read_tower_config(tower_file(tmp_path, **vision)))


def test_damaged_files_are_refused_by_name(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"list\.json: holds a list"):
        read_tower_config(str(tmp_path / "list.json"))
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ConfigError, match=f"{name} cannot be read as weights"):
            load_tower_weights(tower_file(tmp_path), str(tmp_path / name))


def test_a_weight_tag_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"'laion9b'.*laion2b"):
        load_tower_weights("ViT-B-32", "laion9b")


@pytest.mark.parametrize("name", ["RN50", "convnext_base"])
def test_a_tower_that_is_no_vision_transformer_is_refused_by_name(name):
    with torch.device("meta"), pytest.raises(ConfigError, match=f"{name} is a .*vision transformers only"):
        VisionTower(read_tower_config(name))


def test_frames_of_another_size_are_refused_with_both_shapes(tmp_path):
    tower = VisionTower(read_tower_config(tower_file(tmp_path)))
    with pytest.raises(DataError, match=r"\(2, 3, 16, 16\).*\(F, 3, 32, 32\)"):
        tower(random_frames(2, 16))
