#!/usr/bin/env bash
#SBATCH --job-name=longvila_4
#SBATCH --ntasks-per-node=1
# Stage 4_context_extension (stages/4_context_extension.py says what it trains); arguments and launchers as in run_stage.sh:
#     scripts/4_context_extension.sh --run runs/demo --scale tiny
# Slurm runs a copy of this file, so the folder of the others is then the one of submission.
here=$(dirname "${BASH_SOURCE[0]}")
[ -x "$here/run_stage.sh" ] || here=$SLURM_SUBMIT_DIR/scripts
exec "$here/run_stage.sh" 4_context_extension "$@"
