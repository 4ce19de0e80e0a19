#!/usr/bin/env bash
# The five stages in order, each from the one before. A finished stage is left alone and a broken-off one goes on from its
# last checkpoint, so the same line continues a run. Arguments and launchers as in run_stage.sh:
#     scripts/train_all.sh --run runs/demo --scale tiny
# Slurm runs a copy of this file, so the folder of the others is then the one of submission.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[ -x "$here/run_stage.sh" ] || here=$SLURM_SUBMIT_DIR/scripts

# A shell passes no signal on, and dies of it unless it traps it: told to stop, wait until the run has saved.
child=
trap '[ -z "$child" ] || kill -TERM "$child"' TERM INT
for stage in 1_alignment 2_pretraining 3_short_sft 4_context_extension 5_long_sft; do
    "$here/run_stage.sh" "$stage" "$@" &
    child=$! status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || status=$?
    done
    [ "$status" -eq 0 ] || exit "$status"
done
