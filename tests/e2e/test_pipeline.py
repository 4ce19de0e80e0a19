"""The commands a user types, on real files and real processes: pack, train on two ranks, resume, caption, evaluate."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longvila.bench.tiny import write_models

from ..unit.eval_parts import evaluation_folder
from ..unit.video_fixtures import make_video

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module", "--", "longvila.cli"]

STAGE = """
from dataclasses import replace
from longvila.config import *

def config(scale, models):
    data = DataConfig((SourceConfig("clips"),), FrameSampling("fps", 4), row_tokens=128)
    longer = replace(data, row_tokens=256, workers=1)
    first, second = Phase("a", 3, data, 1e-3), Phase("b", 3, longer, 5e-4, rope_theta=5e4)
    model = ModelConfig(str(models / "tower.json"), None, str(models / "lm"))
    return StageConfig("{name}", scale, {starts_from}, model, {trains}, (first, second), lora={lora},
                       parallel=ParallelConfig(inner=2), checkpoint_every=2)
"""


def run(*arguments, check=True, ranks=1, timeout=300):
    """One command of longvila; two ranks go through torchrun."""
    launcher = TORCHRUN if ranks == 2 else ["-m", "longvila.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=environment,
        timeout=timeout,
    )  # fmt: skip
    if check and result.returncode:
        pytest.fail(f"{arguments} failed:\n{result.stdout}\n{result.stderr}")
    return result


def write_stage(folder, name, starts_from=None, trains='("projector",)', lora=None):
    path = folder / f"{name}.py"
    path.write_text(STAGE.format(name=name, starts_from=repr(starts_from), trains=trains, lora=lora))
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with packed clips (one of them broken) and base models."""
    root = tmp_path_factory.mktemp("run")
    videos = root / "videos"
    videos.mkdir()
    lines = []
    for index in range(6):
        (videos / f"{index}.mp4").write_bytes(make_video(num_frames=12))
        turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is shown?"}]}]
        turns += [{"role": "assistant", "content": f"a film, number {index}"}]
        lines.append(json.dumps({"video": f"{index}.mp4", "messages": turns}))
    (videos / "3.mp4").write_bytes(b"")
    (videos / "conversations.jsonl").write_text("\n".join(lines))
    run("pack", "folder", "--out", root / "data" / "clips", "-o", f"folder={videos}",
            "-o", f"conversations={videos / 'conversations.jsonl'}")  # fmt: skip
    write_models(root / "models", ["What is shown? a film, number 0 1 2 3 4 5"])
    return root


@pytest.fixture(scope="module")
def trained(run_folder):
    """Two stages, trained in order on two ranks that share each row."""
    first = write_stage(run_folder, "align")
    second = write_stage(run_folder, "tune", "align", '("language_model",)', "LoraConfig(2, 4)")
    for stage in (first, second):
        run("train", stage, "--run", run_folder, ranks=2)
    return run_folder


def test_a_broken_video_is_counted_and_named_when_packing(run_folder):
    (line,) = (run_folder / "data" / "clips" / "bad.jsonl").read_text().splitlines()
    assert "3" in json.loads(line)["key"]


def test_a_stage_says_what_it_trained_and_how_it_went(trained):
    summary = json.loads((trained / "align" / "summary.json").read_text())
    assert summary["parts_moved"] == {"vision": False, "projector": True, "language_model": False}
    assert summary["steps"] == 6
    assert summary["ranks"] == summary["sequence_ranks"] == 2
    lines = [json.loads(line) for line in (trained / "align" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line["phase"] for line in lines} == {"a", "b"}
    assert all(line["flops_per_second"] == line["flops"] / line["seconds"] for line in lines)
    assert all(line["memory"] > 2**20 for line in lines)
    assert all(0 < line["data_seconds"] < line["seconds"] for line in lines)
    epochs = [line["epoch"] for line in lines]
    assert epochs[0] == epochs[3] == 0  # each phase begins anew
    assert epochs[:3] == sorted(epochs[:3])
    assert epochs[3:] == sorted(epochs[3:]) != [0, 0, 0]  # rows of 256 tokens have five short clips twice
    assert not any("mfu" in line for line in lines)  # nobody knows the peak of a CPU


def test_a_pipeline_of_stages_trains_the_same_weights(trained):
    path = write_stage(trained, "piped")
    path.write_text(path.read_text().replace("ParallelConfig(inner=2)", "ParallelConfig(pipeline=2)"))
    run("train", path, "--run", trained, ranks=2)
    summary = json.loads((trained / "piped" / "summary.json").read_text())
    assert summary["parts_moved"] == {"vision": False, "projector": True, "language_model": False}
    assert summary["parameters"] == json.loads((trained / "align" / "summary.json").read_text())["parameters"]
    whole, piped = ([json.loads(line) for line in (trained / name / "metrics.jsonl").read_text().splitlines()]
                    for name in ("align", "piped"))  # fmt: skip
    for name in ("tokens", "frames", "target_tokens", "flops"):
        assert [line[name] for line in piped] == [line[name] for line in whole]
    one, other = (load_file(trained / name / "model" / "model.safetensors") for name in ("align", "piped"))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (other[name] - weight).abs().max() < 1e-4, name


def test_adapters_are_merged_and_the_context_base_is_kept(trained):
    names = load_file(trained / "tune" / "model" / "model.safetensors")
    assert not [name for name in names if "lora" in name]
    text = json.loads((trained / "tune" / "model" / "config.json").read_text())["text_config"]
    assert text["rope_parameters"]["rope_theta"] == 5e4


def test_the_middle_of_a_run_and_its_end_are_exported_by_one_process(trained, tmp_path):
    tune = trained / "tune"
    run("export", tune / "checkpoints" / "step-000002", "--out", tmp_path / "middle")
    run("export", tune, "--out", tmp_path / "end")
    run("export", tune, "--out", tmp_path / "text", "--part", "language_model", "--dtype", "bf16")
    start, middle, end = (load_file(folder / "model.safetensors") for folder in
                          (trained / "align" / "model", tmp_path / "middle", tmp_path / "end"))  # fmt: skip
    assert start.keys() == middle.keys() == end.keys()
    moved = [name for name in start if not torch.equal(start[name], middle[name])]
    assert moved
    assert all(name.startswith("language_model.") for name in moved)
    assert any(not torch.equal(middle[name], end[name]) for name in moved)
    assert all(
        torch.equal(end[name], weight) for name, weight in load_file(tune / "model" / "model.safetensors").items()
    )
    bases = [json.loads((tmp_path / name / "config.json").read_text())["text_config"]["rope_parameters"]["rope_theta"]
             for name in ("middle", "end")]  # fmt: skip
    assert bases == [5e4, 5e4]  # the stage before ended with it
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight, end["language_model.model.embed_tokens.weight"].bfloat16())
    assert "2 of 6" in (tmp_path / "middle" / "README.md").read_text()
    assert "versions" in (tmp_path / "end" / "README.md").read_text()


def test_a_run_broken_off_and_resumed_gives_the_same_weights_bit_for_bit(trained):
    whole = load_file(trained / "align" / "model" / "model.safetensors")
    stage = write_stage(trained, "align")
    again = trained / "again"
    (again / "align").mkdir(parents=True)
    for name in ("data", "models"):
        (again / name).symlink_to(trained / name)
    source = trained / "align"
    # What a run killed after step 5 leaves: the checkpoint of step 4, and lines up to step 5.
    (again / "align" / "config.json").write_text((source / "config.json").read_text().replace(str(trained), str(again)))
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (again / "align" / "metrics.jsonl").write_text("".join(lines[:5]))
    (again / "align" / "checkpoints").mkdir()
    (again / "align" / "checkpoints" / "step-000004").symlink_to(source / "checkpoints" / "step-000004")
    run("train", stage, "--run", again, ranks=2)
    resumed = load_file(again / "align" / "model" / "model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert len((again / "align" / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_run_that_is_told_to_stop_saves_and_goes_on_from_there(trained):
    stage = write_stage(trained, "align")
    options = [stage, "--set", "parallel.inner=1", "--set", "phases.1.steps=60", "--set", "checkpoint_every=0"]
    runs = {name: trained / name for name in ("whole", "stopped")}
    for folder in runs.values():
        folder.mkdir()
        for name in ("data", "models"):
            (folder / name).symlink_to(trained / name)
    run("train", *options, "--models", trained / "models", "--run", runs["whole"])
    command = [sys.executable, "-m", "longvila.cli", "train", *options, "--models", trained / "models"]
    process = subprocess.Popen(
        [*map(str, command), "--run", str(runs["stopped"])], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = runs["stopped"] / "align" / "metrics.jsonl"
    while process.poll() is None and (not lines.exists() or lines.read_text().count("\n") < 5):
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    saved = int(re.search(r"was told to stop \(SIGTERM\) and saved step (\d+) of 63", errors)[1])
    assert [path.name for path in (runs["stopped"] / "align" / "checkpoints").iterdir()] == [f"step-{saved:06d}"]
    run("train", *options, "--models", trained / "models", "--run", runs["stopped"])
    whole, stopped = (load_file(folder / "align" / "model" / "model.safetensors") for folder in runs.values())
    assert all(torch.equal(weight, stopped[name]) for name, weight in whole.items())


def test_a_finished_stage_is_not_trained_again(trained):
    before = (trained / "align" / "metrics.jsonl").stat().st_mtime_ns
    result = run("train", write_stage(trained, "align"), "--run", trained)
    assert "complete" in result.stderr
    assert (trained / "align" / "metrics.jsonl").stat().st_mtime_ns == before


def test_chosen_steps_are_profiled_and_a_peak_that_is_given_makes_an_mfu(trained):
    options = ["--set", "parallel.inner=1", "--set", "peak_flops=1e9", "--profile", "2:3"]
    result = run("train", write_stage(trained, "seen"), "--run", trained, *options)
    assert [path.name for path in (trained / "seen" / "profile").iterdir()] == ["steps-2-3.json.gz"]
    assert "Self CPU" in result.stderr
    lines = [json.loads(line) for line in (trained / "seen" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["mfu"] == line["flops_per_second"] / 1e9 for line in lines)
    # The same rows, which two ranks shared, their parameters sharded.
    shared = [json.loads(line) for line in (trained / "align" / "metrics.jsonl").read_text().splitlines()]
    assert [line["flops"] for line in lines] == [line["flops"] for line in shared]
    assert re.search(r"step 6/6  b  loss \d.*tokens/s  .*% MFU  .* GiB  \d+% data  ETA 0:00:00", result.stderr)


@pytest.mark.parametrize(
    ("name", "starts_from", "extra", "words"),
    [
        ("orphan", "nowhere", ("--set", "parallel.inner=1"), "starts from nowhere, but"),
        ("align", None, ("--set", "seed=7"), "holds a run with another configuration"),
        ("wide", None, ("--set", "parallel.inner=3"), "sequence group of 3 ranks"),
        ("empty", None, ("--data", "/nonexistent", "--set", "parallel.inner=1"), "/nonexistent"),
        ("typo", None, ("--set", "optimizer.clap=1"), "no such field"),
        ("words", None, ("--profile", "two"), "--profile two: write FIRST:LAST"),
        ("late", None, ("--profile", "5:7", "--set", "parallel.inner=1"), "within the steps that are left, 1:6"),
    ],
)
def test_a_run_that_cannot_start_says_why_in_one_line(trained, name, starts_from, extra, words):
    result = run("train", write_stage(trained, name, starts_from), "--run", trained, *extra, check=False)
    assert result.returncode == 1
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_folder_of_videos_is_captioned_and_a_broken_one_is_named(trained):
    result = run("caption", trained / "videos", "--checkpoint", trained / "tune" / "model", "--frames", "4")
    assert "5 captioned, 1 skipped" in result.stdout
    assert "3.mp4" in result.stderr
    # Two ranks that share each film say the same, once.
    command = ["caption", trained / "videos", "--checkpoint", trained / "tune" / "model", "--frames", "4"]
    shared = run(*command, "--out", trained / "captions.jsonl", ranks=2)
    assert shared.stdout == result.stdout
    assert shared.stderr.count("3.mp4") == result.stderr.count("3.mp4")
    assert len((trained / "captions.jsonl").read_text().splitlines()) == 5


def test_a_benchmark_has_the_answers_of_one_process_where_ranks_share_its_prompts(trained, tmp_path):
    evaluation_folder(tmp_path / "data")
    common = [
        "eval",
        "captioning",
        "--checkpoint",
        trained / "tune" / "model",
        "--data",
        tmp_path / "data",
        "-o",
        "frames=3",
    ]
    run(*common, "--out", tmp_path / "alone")
    run(*common, "--out", tmp_path / "shared", "--sequence-ranks", "2", ranks=2)
    (alone,), (shared,) = ((tmp_path / name).glob("responses-*.jsonl") for name in ("alone", "shared"))
    assert alone.name == shared.name == "responses-0.jsonl"
    assert alone.read_text() == shared.read_text()
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("alone", "shared")]
    assert scores[0].pop("seconds")
    assert scores[1].pop("seconds")
    assert scores[0] == scores[1]


def test_a_dry_run_reads_models_and_data_and_writes_nothing(trained):
    result = run("train", write_stage(trained, "dry"), "--run", trained, "--set", "parallel.inner=1", "--dry-run")
    said = " ".join(result.stderr.split())
    assert "a: 3 steps of 1 rows of 128 tokens at rate 0.001; the first: " in said
    assert re.search(r"\d+ tokens in \d+ documents with \d+ frames on this data rank, \d+ targets in all", said)
    assert "nothing was written" in result.stderr
    assert not (trained / "dry").exists()


def test_a_dry_run_beside_a_run_leaves_its_checkpoints_alone(trained):
    stage = write_stage(trained, "beside")
    options = [stage, "--run", trained, "--set", "parallel.inner=1"]
    run("train", *options)
    shutil.rmtree(trained / "beside" / "model")
    folder = trained / "beside" / "checkpoints"
    (folder / "step-000006.part").mkdir()
    (folder / "step-000004" / "manifest.json").write_text("{")
    before = sorted(path.name for path in folder.rglob("*"))
    said = run("train", *options, "--dry-run").stderr
    assert "manifest.json is corrupted; the checkpoint before it would be used" in " ".join(said.split())
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_stage_under_deepspeed_ends_with_the_weights_of_fsdp2(trained):
    pytest.importorskip("deepspeed")
    stage = write_stage(trained, "zero", "align", '("language_model",)', "LoraConfig(2, 4)")
    run("train", stage, "--run", trained, "--set", "engine=zero3", ranks=2)
    expected, found = (load_file(trained / name / "model" / "model.safetensors") for name in ("tune", "zero"))
    assert found.keys() == expected.keys()
    assert max((found[name] - weight).abs().max().item() for name, weight in expected.items()) < 1e-5
    sizes = [json.loads((trained / name / "summary.json").read_text())["parameters"] for name in ("tune", "zero")]
    assert sizes[0] == sizes[1]
