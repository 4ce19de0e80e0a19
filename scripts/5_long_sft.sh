#!/usr/bin/env bash
#SBATCH --job-name=longvila_5
#SBATCH --ntasks-per-node=1
# Stage 5_long_sft (stages/5_long_sft.py says what it trains); arguments and launchers as in run_stage.sh:
#     scripts/5_long_sft.sh --run runs/demo --scale tiny
# Slurm runs a copy of this file, so the folder of the others is then the one of submission.
here=$(dirname "${BASH_SOURCE[0]}")
[ -x "$here/run_stage.sh" ] || here=$SLURM_SUBMIT_DIR/scripts
exec "$here/run_stage.sh" 5_long_sft "$@"
