"""The command line: its help is complete and quick, its errors are one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3MoeConfig
from typer.main import get_command
from typer.testing import CliRunner

from longvila.cli import _weight_type, app
from longvila.model import save_model

from .eval_parts import tiny_answerer
from .video_fixtures import make_video

VERBS = ["pack", "base", "train", "eval", "caption", "export", "report", "gradients", "doctor"]
HEAVY = ["torch", "transformers", "open_clip", "av", "webdataset", "numpy", "PIL"]

runner = CliRunner()


def test_help_names_every_verb():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    commands = result.output.split("Commands")[1]
    assert [verb for verb in VERBS if f" {verb} " in commands] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_each_of_its_options(verb: str):
    result = runner.invoke(app, [verb, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert "--traceback" in result.output
    command = get_command(app).commands[verb]
    assert command.help
    assert all(each.help for each in command.params), [each.name for each in command.params if not each.help]


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=lambda a: a[0])
def test_help_imports_nothing_heavy(arguments: list[str]):
    program = (
        "import sys\n"
        "from longvila.cli import main\n"
        f"sys.argv = ['longvila', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    sys.exit(end.code or (f'help imports {heavy}' if heavy else 0))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_error_is_one_line_and_exit_code_1():
    result = runner.invoke(app, ["train", "9_unknown", "--run", "runs/none"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "there is no stage '9_unknown'" in result.stderr
    assert "5_long_sft" in result.stderr


def test_traceback_shows_where_an_error_came_from():
    result = runner.invoke(app, ["train", "9_unknown", "--run", "runs/none", "--traceback"])
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "ConfigError"


def test_a_rank_signs_its_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    result = runner.invoke(app, ["train", "9_unknown", "--run", "runs/none"])
    assert "error (rank 3):" in result.stderr


def test_wrong_usage_is_exit_code_2():
    assert runner.invoke(app, ["train"]).exit_code == 2
    assert runner.invoke(app, ["no_such_verb"]).exit_code == 2


def test_a_missing_checkpoint_is_one_line_that_names_it(tmp_path: Path):
    (tmp_path / "film.mp4").write_bytes(b"")
    result = runner.invoke(app, ["caption", str(tmp_path / "film.mp4"), "--checkpoint", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert str(tmp_path / "nothing") in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    answerer = tiny_answerer(tmp_path / "base")
    save_model(answerer.model, answerer.tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("gpu", "native", "expected"), [(False, False, "fp32"), (True, False, "fp32"), (True, True, "bf16")]
)
def test_auto_is_bf16_where_a_gpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, native: bool, expected: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert _weight_type("auto") == _weight_type(expected)
    assert (_weight_type("fp32"), _weight_type("bf16")) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("choice", "dtype"), [([], torch.float32), (["--dtype", "bf16"], torch.bfloat16)])
def test_evaluation_and_captions_run_in_the_type_that_is_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: list[str], dtype: torch.dtype
):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("longvila.generate.caption.caption", lambda answerer, *args, **kwargs: seen.append(answerer))
    monkeypatch.setattr(
        "longvila.evaluate.runner.run_benchmark", lambda module, answerer, *args, **kwargs: seen.append(answerer)
    )
    common = ["--checkpoint", str(checkpoint), *choice]
    runner.invoke(app, ["caption", str(tmp_path / "film.mp4"), *common])
    result = runner.invoke(app, ["eval", "needle", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *common])
    assert result.exit_code == 0, result.output
    assert [answerer.model.dtype for answerer in seen] == [dtype, dtype]


def test_captions_say_where_they_are_cut_and_are_kept_in_a_file(checkpoint: Path, tmp_path: Path):
    films, out = tmp_path / "films", tmp_path / "captions.jsonl"
    films.mkdir()
    (films / "a.mp4").write_bytes(make_video(4))
    (films / "b.mp4").write_bytes(b"")
    arguments = ["caption", str(films), "--checkpoint", str(checkpoint), "--max-new-tokens", "3", "--frames", "2"]
    result = runner.invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "... cut at 3 tokens" in result.stdout
    assert "1 captioned, 1 skipped\n" in result.stdout
    assert out.read_text().count("\n") == 1
    result = runner.invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"0 captioned, 1 skipped, 1 were in {out} already" in result.stdout


def test_groups_of_ranks_that_share_prompts_must_divide_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    common = ["--checkpoint", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, ["eval", "needle", *common, "--sequence-ranks", "3"])
    assert result.exit_code == 1
    assert "--sequence-ranks 3 does not divide the 4 ranks" in result.stderr


def test_option_help_lists_the_options_of_a_file(tmp_path: Path):
    source = tmp_path / "mine.py"
    source.write_text('def samples(videos: str, count: int = 3):\n    """My videos."""\n    yield from ()\n')
    result = runner.invoke(app, ["pack", "-o", "help", str(source)])
    assert result.exit_code == 0
    assert "My videos." in result.output
    assert result.output.split("\n")[1].split() == ["videos", "str", "needed"]
    assert result.output.split("\n")[2].split() == ["count", "int", "default", "3"]


def test_option_help_of_an_unknown_file_is_one_line():
    result = runner.invoke(app, ["eval", "nothing", "-o", "help"])
    assert result.exit_code == 1
    assert "there is no benchmark 'nothing'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_how_to_write_shards_does_not_go_with_evaluation_files(tmp_path: Path):
    result = runner.invoke(app, ["pack", "demo", "--out", str(tmp_path / "out"), "--evaluation", "--height", "240"])
    assert result.exit_code == 1
    assert "--evaluation writes no shards" in result.stderr


def test_a_source_without_evaluation_files_says_so(tmp_path: Path):
    source = tmp_path / "mine.py"
    source.write_text("def samples():\n    yield from ()\n")
    result = runner.invoke(app, ["pack", str(source), "--out", str(tmp_path / "out"), "--evaluation"])
    assert result.exit_code == 1
    assert "does not define evaluation()" in result.stderr


def test_folds_are_shown_without_a_process_and_experts_that_span_nodes_are_warned_of():
    arguments = ["show", "folds", "--world", "16", "--set", "head=2", "--set", "inner=2"]
    result = runner.invoke(app, [*arguments, "--set", "experts=8"])
    assert result.exit_code == 0
    lines = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.strip()}
    assert lines["sequence"][:4] == ["4", "4", "0", "[0,1,2,3]"]
    assert lines["heads"][:4] == ["8", "2", "0", "[0,1]"]
    assert lines["experts"][:3] == ["2", "8", "0"]
    assert lines["copies"][:4] == ["8", "2", "8", "[0,8]"]
    assert "warning" not in result.output
    result = runner.invoke(app, [*arguments, "--set", "experts=16"])
    assert "1 of 1 groups that share experts span nodes" in " ".join(result.output.split())
    result = runner.invoke(app, [*arguments, "--set", "experts=5"])
    assert result.exit_code == 1
    assert "parallel.experts=5" in result.output


@pytest.mark.parametrize(("world", "size"), [(64, 4), (4096, 8)])
def test_folds_of_many_ranks_leave_every_column_readable(world: int, size: int):
    arguments = ["show", "folds", "--world", str(world), "--set", f"inner={size}", "--set", f"outer={size}"]
    result = runner.invoke(app, [*arguments, "--set", "experts=8"])
    assert result.exit_code == 0
    assert "ranks in each" in result.output
    assert "…" not in result.output  # how rich cuts a cell that does not fit
    groups = {line.split()[0]: line.split()[4:] for line in result.output.splitlines() if line.strip()}
    assert groups["sequence"][0] == f"[0,1,2,...,{size * size - 1}]"
    assert groups["experts"][0] == "[0,1,2,3,4,5,6,7]"
    assert len(groups["copies"]) == 5  # four groups, and three points for the others


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (["experts=4", "pipeline=2"], ""),
        (["experts=8"], "4 experts of Qwen3MoeExperts cannot be shared out evenly among parallel.experts=8 ranks"),
        (["experts=2", "expert_tensor=4"], ""),
        (["expert_tensor=8"], ""),
        (["expert_tensor=16"], "8 neurons of gate_up_proj of Qwen3MoeExperts cannot be shared out evenly among"),
        (["pipeline=4"], "4 stretches of layers, but the language model has 3 layers"),
        (["pipeline=2", "stage_layers=[1, 1]"], "are 2 layers, but the language model has 3"),
    ],
)
def test_folds_that_a_model_is_too_small_for_are_refused_without_a_process(tmp_path: Path, choices, words):
    Qwen3MoeConfig(num_hidden_layers=3, num_experts=4, hidden_size=32, moe_intermediate_size=8).save_pretrained(
        tmp_path
    )
    arguments = ["show", "folds", "--world", "16", "--model", str(tmp_path)]
    result = runner.invoke(app, [*arguments, *(word for choice in choices for word in ("--set", choice))])
    assert result.exit_code == bool(words), result.output
    assert words in " ".join(result.output.split())


def test_folds_of_a_dense_model_share_no_experts(tmp_path: Path):
    Qwen3Config(num_hidden_layers=2, hidden_size=32).save_pretrained(tmp_path)
    result = runner.invoke(app, ["show", "folds", "--world", "8", "--model", str(tmp_path), "--set", "experts=2"])
    assert result.exit_code == 1
    assert "parallel.experts=2 and expert_tensor=1, but Qwen3ForCausalLM has no experts" in " ".join(
        result.output.split()
    )
    result = runner.invoke(app, ["show", "folds", "--world", "8", "--model", str(tmp_path / "absent")])
    assert result.exit_code == 1
    assert "no configuration of a model there" in " ".join(result.output.split())


def test_doctor_names_what_the_machine_has():
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    for word in ("python", "torch", "GPUs", "gloo", "decode h264", "flash-attn", "deepspeed", "gguf", "memory"):
        assert word in result.output
    assert "decord" not in result.output  # frames are decoded by PyAV alone


@pytest.mark.parametrize(("error", "code"), [(1e-13, 0), (1e-3, 1)])
def test_gradients_writes_its_figures_and_fails_past_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, code: int
):
    monkeypatch.setattr("longvila.train.gradients.check", lambda: {"max_error": error, "bound": 1e-11})
    result = runner.invoke(app, ["gradients", "--json", str(tmp_path / "new" / "gradients.json")])
    assert result.exit_code == code
    assert ("holds" if code == 0 else "missed") in result.output
    assert '"gradient_max_error"' in (tmp_path / "new" / "gradients.json").read_text()
