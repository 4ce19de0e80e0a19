#!/usr/bin/env bash
# One stage on this machine, on several, or under Slurm. Arguments are those of `longvila train`:
#     scripts/run_stage.sh joint_sft --run runs/demo --scale tiny
#
# One machine:      as above; NPROC ranks, or one for each GPU (each core where there is none) when not set.
# Several machines: the same line on each, with NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT) set.
# Slurm:            sbatch --nodes 8 --gpus-per-node 8 scripts/5_long_sft.sh --run RUN --scale 7b
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
# Slurm runs a copy of a script, whatever it is called; the scripts that stay behind show where this one belongs.
[ -x "$here/setup.sh" ] || here=$SLURM_SUBMIT_DIR/scripts
if [ -d "$here/../.venv" ]; then
    PATH="$(cd "$here/.." && pwd)/.venv/bin:$PATH"
fi

# A batch script runs on its first node only: start this file once on each.
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${LONGVILA_IN_SRUN:-}" ]; then
    # Not through `head`: it closes the pipe early, and a scontrol still writing would end this script under pipefail.
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${hosts%%$'\n'*}
    export MASTER_ADDR LONGVILA_IN_SRUN=1
    exec srun --ntasks-per-node=1 "$here/run_stage.sh" "$@"
fi

nodes=${NNODES:-${SLURM_NNODES:-1}}
if [ "$nodes" -eq 1 ]; then
    meeting=(--standalone)
else
    meeting=(--nnodes "$nodes" --node-rank "${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK to the number of this machine}}"
        --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the host name of machine 0}"
        --master-port "${MASTER_PORT:-29500}")
fi
# The lone -- keeps torchrun from reading the options that follow as its own.
exec python -m longvila.launch "${meeting[@]}" --nproc-per-node "${NPROC:-auto}" --module -- longvila.cli train "$@"
