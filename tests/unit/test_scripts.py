"""The stage scripts start the right processes on one machine, on several, and under Slurm.

The programs they call are replaced by ones that print how they were called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKES = {
    "python": 'echo "python $*"',
    "scontrol": "printf 'node7\\nnode8\\n'",
    "srun": 'echo "srun $1 $2"; shift; SLURM_NODEID=1 exec "$@"',
}
STAGES = ["1_alignment", "2_pretraining", "3_short_sft", "4_context_extension", "5_long_sft"]
TRAIN = "--module -- longvila.cli train"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the scripts, and beside them `fake/` with the programs they call."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "fake").mkdir()
    for name, body in FAKES.items():
        program = tmp_path / "fake" / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    return tmp_path


def call(checkout: Path, script: Path, *arguments: str, **environment: object) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "NNODES", "NPROC"))}
    kept["PATH"] = f"{checkout / 'fake'}:{kept['PATH']}"
    variables = {name: str(value) for name, value in environment.items()}
    command = [str(script), *arguments, "--run", "r", "--scale", "7b"]
    return subprocess.run(command, env=kept | variables, cwd=checkout, capture_output=True, text=True, check=False)


def test_one_machine_takes_a_free_port_and_a_rank_for_each_gpu(checkout: Path):
    result = call(checkout, checkout / "scripts" / "3_short_sft.sh")
    expected = f"python -m longvila.launch --standalone --nproc-per-node auto {TRAIN} 3_short_sft --run r --scale 7b\n"
    assert result.stdout == expected


def test_several_machines_meet_at_the_first(checkout: Path):
    where = {"NNODES": 4, "NODE_RANK": 2, "MASTER_ADDR": "node0", "NPROC": 8}
    result = call(checkout, checkout / "scripts" / "5_long_sft.sh", **where)
    meeting = "--nnodes 4 --node-rank 2 --master-addr node0 --master-port 29500 --nproc-per-node 8"
    assert result.stdout == f"python -m longvila.launch {meeting} {TRAIN} 5_long_sft --run r --scale 7b\n"


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_a_machine_that_does_not_know_its_place_says_what_to_set(checkout: Path, missing: str):
    where = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "node0"}
    where.pop(missing)
    result = call(checkout, checkout / "scripts" / "5_long_sft.sh", **where)
    assert result.returncode != 0
    assert f"set {missing} to" in result.stderr


@pytest.mark.parametrize("copied_as", ["slurm_script", None], ids=["slurm_script", "own_name"])
@pytest.mark.parametrize(
    ("name", "arguments", "stages"),
    [
        ("5_long_sft.sh", [], ["5_long_sft"]),
        ("run_stage.sh", ["joint_sft"], ["joint_sft"]),
        ("train_all.sh", [], STAGES),
    ],
)
def test_a_slurm_batch_script_starts_once_on_every_node_from_its_copy(
    checkout: Path, name: str, arguments: list[str], stages: list[str], copied_as: str | None
):
    spool = checkout / "spool"  # Slurm runs a copy of the script, in a folder of its own on the first node
    spool.mkdir()
    script = Path(shutil.copy(checkout / "scripts" / name, spool / (copied_as or name)))
    shutil.copytree(checkout / "fake", checkout / ".venv" / "bin")
    (checkout / ".venv" / "bin" / "python").write_text('#!/usr/bin/env bash\necho "venv python $*"\n')
    job = {"SLURM_JOB_ID": 1, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": checkout}
    result = call(checkout, script, *arguments, **job)
    assert result.stderr == ""
    meeting = "--nnodes 2 --node-rank 1 --master-addr node7 --master-port 29500 --nproc-per-node auto"
    lines = [
        (
            f"srun --ntasks-per-node=1 {checkout}/scripts/run_stage.sh",  # the copy is on the first node only
            f"venv python -m longvila.launch {meeting} {TRAIN} {stage} --run r --scale 7b",
        )
        for stage in stages
    ]
    assert result.stdout.splitlines() == [line for pair in lines for line in pair]


def test_train_all_runs_the_stages_in_order_and_stops_at_the_first_that_fails(checkout: Path):
    result = call(checkout, checkout / "scripts" / "train_all.sh")
    assert [line.split(" train ")[1].split()[0] for line in result.stdout.splitlines()] == STAGES
    (checkout / "fake" / "python").write_text('#!/usr/bin/env bash\necho "$*"\n[[ "$*" != *2_pretraining* ]]\n')
    result = call(checkout, checkout / "scripts" / "train_all.sh")
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 2


def test_setup_refuses_an_old_python_in_one_line(checkout: Path):
    python = checkout / "fake" / "python"
    python.write_text('#!/usr/bin/env bash\n[ "$1" = -V ] && echo "Python 3.9.2"\n')
    result = call(checkout, checkout / "scripts" / "setup.sh", PYTHON=python)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"needs Python 3.11 or newer, but '{python}' is Python 3.9.2" in result.stderr


def test_demo_refuses_a_scale_it_cannot_run(checkout: Path):
    result = call(checkout, checkout / "scripts" / "demo.sh")
    assert result.returncode == 2
    assert result.stderr == "usage: scripts/demo.sh [--scale tiny|small]\n"


def test_five_stages_that_are_told_to_stop_wait_until_the_run_has_saved(checkout: Path):
    """A shell that is told to stop would leave its run behind, or end before it."""
    program = checkout / "fake" / "python"
    program.write_text(
        "#!/usr/bin/env bash\ntrap 'sleep 0.5; echo saved; exit 3' TERM\n"
        "echo started\nfor i in {1..100}; do sleep 0.1; done\n"
    )
    environment = {"PATH": f"{checkout / 'fake'}:{os.environ['PATH']}"}
    command = [str(checkout / "scripts" / "train_all.sh"), "--run", "r"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "started\n"
        run.terminate()
        assert run.stdout.read() == "saved\n"
    assert run.returncode == 3
