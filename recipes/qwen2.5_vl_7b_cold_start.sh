#!/usr/bin/env bash
# The cold start of Qwen2.5-VL-7B: plans distilled from SRPO's chains of thought, then SFT with
# SRPO's settings. The tower stays as it is, there as here.
#   SRPO=FOLDER recipes/qwen2.5_vl_7b_cold_start.sh --teacher URL --teacher_model NAME
# FOLDER holds SRPO's train.json and the pictures that it names: the hub has only the former. The
# teacher sees the chain of thought, not the pictures. Flags of sft.py may follow.
source "$(dirname "$0")/vision.sh"
TEACHER=() REST=()
while [ $# -gt 0 ]; do
    case "$1" in
        --teacher|--teacher_model) TEACHER+=("$1" "${2:?$1 wants a value}"); shift 2 ;;
        *) REST+=("$1"); shift ;;
    esac
done
set -- "${REST[@]}"

SFT=(--out "$RUNS/${NAME}_sft" --epochs 3 --batch_size 16 --lr 1e-5 --max_tokens 4096)
SFT+=("${PIXELS[@]}" "$@")
if dry "$@"; then
    launch_dry sft.py --model "recipes/shapes/$NAME" --data "$RUNS/plans_vision.jsonl" "${SFT[@]}"
    echo "(the run itself uses --model $ID; recipes/shapes holds its shapes without weights)"
    exit
fi
[ ${#TEACHER[@]} -gt 0 ] || fail "give a teacher: --teacher URL --teacher_model NAME, or --teacher \
with a model folder or hub id"
prepare "srpo_sft=${SRPO:?name the folder of the SRPO data and their pictures}" \
    "$RUNS/data/srpo_sft.jsonl" --solutions
python distill.py --data "$RUNS/data/srpo_sft.jsonl" --out "$RUNS/plans_vision.jsonl" \
    "${TEACHER[@]}" --limit 0 --resume
launch sft.py --model "$ID" --data "$RUNS/plans_vision.jsonl" --limit 0 "${SFT[@]}"
