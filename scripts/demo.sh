#!/usr/bin/env bash
# The whole pipeline on this machine, from nothing to a report: data, base models, five stages on two ranks, evaluation.
#     scripts/demo.sh [--scale tiny|small]
# Writes runs/demo (runs/demo-small). A step that is done is not done again; remove its file in steps/ to repeat it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scale=tiny
if [ "${1:-}" = --scale ]; then
    scale=${2:?--scale takes tiny or small}
    shift 2
fi
if [ $# -gt 0 ] || [[ ! $scale =~ ^(tiny|small)$ ]]; then
    echo "usage: scripts/demo.sh [--scale tiny|small]" >&2
    exit 2
fi
run=runs/demo films=(--option frames=1400) haystacks=()
if [ "$scale" = small ]; then # a hundred times the tiny model's work for a token: fewer frames and answers
    run=runs/demo-small films=(--option frames=32) haystacks=(--option frames=16,32,64,128 --option answers=5)
fi
# Samples of each split: enough for each to be seen a few times, few enough to be made in minutes.
splits="images=10000 short=3000 medium=500 long=80 text=2000 long_text=200"

scripts/setup.sh
# Two ranks on the CPU, also where there is a GPU, which they could not share.
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 NPROC=2 CUDA_VISIBLE_DEVICES=
mkdir -p "$run/steps"

# Runs a command once, and notes the seconds it took whether it succeeds or not.
step() {
    local name=$1 begin=$SECONDS status=0
    shift
    if [ -e "$run/steps/$name" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    "$@" || status=$?
    echo "$name $((SECONDS - begin))" >>"$run/steps.txt"
    [ "$status" -eq 0 ] || exit "$status"
    touch "$run/steps/$name"
}

# Packing starts over after a break: half a folder is no data set.
pack() {
    rm -rf "${run:?}/${1:?}"
    longvila pack demo --out "$run/$1" "${@:2}"
}

evaluate() {
    local out=$1 benchmark=$2 stage=$3
    python -m longvila.launch --standalone --nproc-per-node 2 --module -- longvila.cli eval "$benchmark" \
        --checkpoint "$run/$stage/model" --data "$run/data/evaluation" --out "$run/eval/$out/$benchmark" "${@:4}"
}

for split in $splits; do
    name=${split%=*}
    step "pack_$name" pack "data/$name" --option split="$name" --option count="${split#*=}"
done
step pack_evaluation pack data/evaluation --evaluation
step base env OMP_NUM_THREADS="$(nproc)" longvila base --scale "$scale" --out "$run/models"
step gradients longvila gradients --json "$run/gradients.json"
step train scripts/train_all.sh --run "$run" --scale "$scale"
step final_needle evaluate final needle 5_long_sft "${haystacks[@]}"
step final_videomme evaluate final videomme 5_long_sft "${films[@]}"
step final_captioning evaluate final captioning 5_long_sft "${films[@]}"
# Where stage 1 stood; it knows no long videos, so its haystacks end at 128 frames.
step stage1_needle evaluate stage1 needle 1_alignment "${haystacks[@]}" --option frames=16,32,64,128
step stage1_videomme evaluate stage1 videomme 1_alignment "${films[@]}"
step stage1_captioning evaluate stage1 captioning 1_alignment "${films[@]}" --option max_new_tokens=96
# Controls: the same questions about another film's frames, which nobody should be able to answer.
for benchmark in videomme captioning; do
    step "swapped_$benchmark" evaluate swapped "$benchmark" 5_long_sft "${films[@]}" --option swap=true
done

awk '{ seconds[$1] += $2; total += $2 }
    END {
        printf "{\"seconds\": %d, \"steps\": {", total
        for (name in seconds) { printf "%s\"%s\": %d", separator, name, seconds[name]; separator = ", " }
        print "}}"
    }' "$run/steps.txt" >"$run/timing.json"
echo "== report"
longvila report --run "$run"
