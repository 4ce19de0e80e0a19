"""Exports: plain transformers reads the language model, `import longvila` the whole, and every logit is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from typer.testing import CliRunner

from longvila import config as configuration
from longvila.cli import app
from longvila.config import DataConfig, LoraConfig, Phase, SourceConfig, StageConfig
from longvila.errors import ConfigError, LongvilaError
from longvila.model import build_model, load_model, save_model
from longvila.model.chat import FRAME_TOKEN
from longvila.model.rope import extend_context
from longvila.parallel.launch import run_ranks
from longvila.shards.order import Cursor
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.export import export, find_source
from longvila.train.loop import load_start, prepare

from .model_parts import llama, model_config, qwen3, random_frames
from .video_fixtures import make_video

IDS = torch.tensor([[72, 101, 5, 33, 200, 7, 90, 90, 14]])

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(input_ids=torch.tensor({ids})).logits
assert not [name for name in sys.modules if name.startswith("longvila")]
torch.save({{"logits": logits, "rows": model.get_input_embeddings().num_embeddings, "vocabulary": len(tokenizer),
            "text": tokenizer.decode(tokenizer("Hello film").input_ids),
            "stops": model.generation_config.eos_token_id}}, out)
"""

WHOLE = """
import sys, torch
{imports}
folder, inputs, out = sys.argv[1:]
with torch.no_grad():
    torch.save(AutoModel.from_pretrained(folder).eval()(**torch.load(inputs)).logits, out)
"""
ORDERS = {
    "longvila first": "import longvila\nassert 'transformers' not in sys.modules\nfrom transformers import AutoModel",
    "transformers first": "from transformers import AutoModel\nimport longvila",
    "asked whether it is there": (
        "import longvila, importlib.util\nimportlib.util.find_spec('transformers')\nfrom transformers import AutoModel"
    ),
}


def run_python(program: str, *arguments: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def plain(folder: Path) -> dict:
    """What a program without longvila finds in a folder."""
    run_python(PLAIN.format(ids=IDS.tolist()), folder, folder.parent / "plain.pt")
    return torch.load(folder.parent / "plain.pt")


def text_logits(model) -> torch.Tensor:
    """Logits of the whole model for a row without frames."""
    size = model.vision.image_size
    none = torch.zeros((0, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        return model.eval()(IDS, none, torch.arange(IDS.shape[1])[None]).logits


def video_inputs(model) -> dict[str, torch.Tensor]:
    """A row with two frames."""
    places = torch.full((1, 2 * model.projector.tokens_per_frame), model.config.frame_token_id)
    ids = torch.cat([IDS[:, :3], places, IDS[:, 3:]], dim=1)
    return {"input_ids": ids, "frames": random_frames(2), "position_ids": torch.arange(ids.shape[1])[None]}


def make_stage(run: Path, name: str = "tune", **changes) -> StageConfig:
    """The folder of a stage that has not begun."""
    (run / "models").mkdir(parents=True, exist_ok=True)
    data = DataConfig((SourceConfig("clips", 2.0),))
    phases = (Phase("a", 3, data, 1e-3), Phase("b", 3, data, 1e-3, rope_theta=5e4))
    config = StageConfig(name, "tiny", None, model_config(run / "models"), ("language_model",), phases)
    config = replace(config, **changes)
    (run / name).mkdir()
    (run / name / "config.json").write_text(configuration.to_json(config))
    return config


def make_checkpoint(config: StageConfig, run: Path, step: int):
    """Writes a checkpoint of weights that differ from the start's, and returns the adapted model that has them."""
    model, _ = load_start(config, run)
    merge = prepare(model, config)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    state = {"model": model.state_dict(), "optimizer": {"weight": {"exp_avg": torch.zeros(3)}}}
    run_ranks(save, 2, run / config.name / "checkpoints", state, Position(step, Cursor(0, 0, step)), config)
    return model, merge


def save(folder: Path, state: dict, position: Position, config: StageConfig):
    Checkpoints(folder, 5).save(state, position, config)


@pytest.mark.parametrize("language_model", [qwen3(), llama()], ids=["tied", "untied"])
def test_the_language_model_loads_without_longvila_and_has_every_logit(tmp_path, language_model):
    model, tokenizer = build_model(model_config(tmp_path, language_model))
    save_model(model, tokenizer, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", part="language_model")
    found = plain(tmp_path / "out")
    assert torch.equal(found["logits"], text_logits(model))
    assert found["text"] == "Hello film"


def test_no_token_of_the_exported_tokenizer_lies_behind_the_embeddings(tmp_path):
    model, tokenizer = build_model(model_config(tmp_path))
    save_model(model, tokenizer, tmp_path / "model")
    assert FRAME_TOKEN in tokenizer.get_vocab()
    assert len(tokenizer) == 260
    export(tmp_path / "model", tmp_path / "out", part="language_model")
    found = plain(tmp_path / "out")
    assert found["vocabulary"] == found["rows"] == 259


@pytest.mark.parametrize("imports", ORDERS.values(), ids=list(ORDERS))
def test_the_whole_model_loads_after_importing_longvila_in_either_order(tmp_path, imports):
    model, tokenizer = build_model(model_config(tmp_path))
    save_model(model, tokenizer, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    inputs = video_inputs(model)
    torch.save(inputs, tmp_path / "inputs.pt")
    run_python(WHOLE.format(imports=imports), tmp_path / "out", tmp_path / "inputs.pt", tmp_path / "logits.pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model.eval()(**inputs).logits)


def test_generation_settings_of_the_base_model_survive_to_the_export(tmp_path):
    base = qwen3()
    base.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model, tokenizer = build_model(model_config(tmp_path, base))
    save_model(model, tokenizer, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", part="language_model")
    assert plain(tmp_path / "out")["stops"] == [2, 0]


def test_bf16_is_what_rounding_gives_and_stays_bf16_when_exported_again(tmp_path):
    model, tokenizer = build_model(model_config(tmp_path))
    save_model(model, tokenizer, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "half", "bf16")
    export(tmp_path / "half", tmp_path / "again")
    for folder in (tmp_path / "half", tmp_path / "again"):
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
        loaded, _ = load_model(folder)
        weights = model.state_dict()
        assert all(torch.equal(w, weights[name].bfloat16().float()) for name, w in loaded.state_dict().items())
    export(tmp_path / "half", tmp_path / "text", part="language_model")
    found = plain(tmp_path / "text")["logits"]
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), text_logits(model), atol=0.1)


def test_the_middle_of_a_run_is_exported_with_its_adapters_merged(tmp_path):
    config = make_stage(tmp_path, lora=LoraConfig(2, 4))
    adapted, _ = make_checkpoint(config, tmp_path, 2)
    export(tmp_path / "tune", tmp_path / "out", part="language_model")
    found, expected = plain(tmp_path / "out")["logits"], text_logits(adapted)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, text_logits(load_start(config, tmp_path)[0]), atol=1e-2)


@pytest.mark.parametrize(("step", "theta"), [(3, 1e4), (4, 5e4)], ids=["end of the first phase", "second phase"])
def test_the_rope_base_is_the_one_of_the_last_step_taken(tmp_path, step, theta):
    config = make_stage(tmp_path)
    model, _ = make_checkpoint(config, tmp_path, step)
    export(tmp_path / "tune", tmp_path / "out", part="language_model")
    extend_context(model.language_model, theta, 4096)
    assert torch.equal(plain(tmp_path / "out")["logits"], text_logits(model))


def test_the_newest_checkpoint_is_exported_or_the_one_that_is_named_or_the_end(tmp_path):
    config = make_stage(tmp_path)
    models = {step: make_checkpoint(config, tmp_path, step)[0] for step in (1, 2)}
    stage = tmp_path / "tune"
    export(stage, tmp_path / "newest")
    export(stage / "checkpoints" / "step-000001", tmp_path / "named")
    final, tokenizer = load_start(config, tmp_path)
    save_model(final, tokenizer, stage / "model")
    export(stage, tmp_path / "end")
    for name, expected in (("newest", models[2]), ("named", models[1]), ("end", final)):
        assert torch.equal(text_logits(load_model(tmp_path / name)[0]), text_logits(expected))


def test_the_card_says_how_to_load_and_what_it_was_trained_with(tmp_path):
    config = make_stage(tmp_path, lora=LoraConfig(2, 4))
    make_checkpoint(config, tmp_path, 2)
    lines = [{"step": step, "loss": 9.0 - step, "tokens": 100, "frames": 5} for step in (1, 2, 3)]
    (tmp_path / "tune" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    export(tmp_path / "tune", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("import longvila", "tune, scale tiny", "2 of 6", "clips (weight 2)", "LoRA of rank 2, merged",
                  "8 at step 1, 7 at 2", "| tokens | 200 |", "are float32", '"checkpoint_every": 200'):  # fmt: skip
        assert words in card
    assert "versions" not in card
    model, tokenizer = load_start(config, tmp_path)
    save_model(model, tokenizer, tmp_path / "tune" / "model")
    summary = {"total_parameters": 4321, "trained_parameters": 1234, "ranks": 8, "sequence_ranks": 4,
               "versions": {"torch": "9.9"}}  # fmt: skip
    (tmp_path / "tune" / "summary.json").write_text(json.dumps(summary))
    export(tmp_path / "tune" / "model", tmp_path / "end", part="language_model")
    card = (tmp_path / "end" / "README.md").read_text()
    for words in ("AutoModelForCausalLM", "the stage's end", "6 at 3", "4,321", "torch 9.9", "8, 4 of them to a row"):
        assert words in card
    assert "import longvila" not in card


def test_the_cards_questions_about_a_film_run(tmp_path, monkeypatch, capsys):
    config = make_stage(tmp_path)
    model, tokenizer = load_start(config, tmp_path)
    save_model(model, tokenizer, tmp_path / "tune" / "model")
    export(tmp_path / "tune", tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[2].split("```")[0]
    (tmp_path / "film.mp4").write_bytes(make_video(12))
    monkeypatch.chdir(tmp_path)
    exec(code, {"print": lambda text: print(f"answer: {text}")})
    assert capsys.readouterr().out.count("answer: ") == 2


def test_a_folder_that_is_not_empty_is_never_overwritten(tmp_path):
    model, tokenizer = build_model(model_config(tmp_path))
    save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "is not empty" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_folder_without_anything_to_export_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="nothing to export"):
        export(tmp_path, tmp_path / "out")
    make_stage(tmp_path)
    with pytest.raises(ConfigError, match="neither a final model nor a checkpoint"):
        export(tmp_path / "tune", tmp_path / "out")


def test_a_folder_is_found_from_inside_it(tmp_path, monkeypatch):
    config = make_stage(tmp_path)
    make_checkpoint(config, tmp_path, 2)
    monkeypatch.chdir(tmp_path / "tune")
    assert find_source(Path()) == find_source(tmp_path / "tune")


def test_checkpoints_may_lie_elsewhere_behind_a_link(tmp_path):
    config = make_stage(tmp_path)
    make_checkpoint(config, tmp_path, 2)
    (tmp_path / "tune" / "checkpoints").rename(tmp_path / "scratch")
    (tmp_path / "tune" / "checkpoints").symlink_to(tmp_path / "scratch")
    assert find_source(tmp_path / "tune").stage == tmp_path / "tune"


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    config = make_stage(tmp_path)
    make_checkpoint(config, tmp_path, 2)
    path = tmp_path / "tune" / "checkpoints" / "step-000002" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"step-000002: __0_0.distcp has \d+ bytes, not \d+; export another"):
        export(tmp_path / "tune", tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    config = make_stage(tmp_path)
    make_checkpoint(config, tmp_path, 2)
    other = make_stage(tmp_path, "other", lora=LoraConfig(2, 4))
    (tmp_path / "tune" / "config.json").write_text(configuration.to_json(replace(other, name="tune")))
    with pytest.raises(LongvilaError, match="do not fit the model"):
        export(tmp_path / "tune", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_chat_template_of_ones_own_is_saved_with_the_model_and_may_change_later(tmp_path):
    first, other = ("{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}" for mark in "#+")
    config = make_stage(tmp_path)
    config = configuration.override(config, f"model.chat_template={first}")
    model, tokenizer = load_start(config, tmp_path)
    save_model(model, tokenizer, tmp_path / "tune" / "model")
    assert load_model(tmp_path / "tune" / "model")[1].chat_template == first
    for template, expected in ((None, first), (other, other)):
        later = replace(config, starts_from="tune", model=replace(config.model, chat_template=template))
        assert load_start(later, tmp_path)[1].chat_template == expected
