#!/usr/bin/env bash
# The cold start of a model: plans distilled from the chains of thought of 10K OpenThoughts
# problems, then 3 epochs of SFT.
#   recipes/cold_start.sh qwen2.5_7b --teacher URL --teacher_model Qwen/Qwen3-235B-A22B
# Flags of sft.py may follow. The paper's teacher, Qwen3-235B, needs a server (vLLM, SGLang or
# another with the OpenAI interface). With a folder or hub id, --teacher loads a model here:
# --teacher Qwen/Qwen2.5-7B-Instruct is the paper's "self-plan" row.
source "$(dirname "$0")/common.sh"
NAME=${1:?give a model: $NAMES}
model_settings "$NAME"
shift
PLANNER="" SERVED="" REST=()  # --teacher and --teacher_model go to distill.py, the others to sft.py
while [ $# -gt 0 ]; do
    case "$1" in
        --teacher=*|--teacher_model=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --teacher) PLANNER=${2:?$1 wants a value}; shift 2 ;;
        --teacher_model) SERVED=${2:?$1 wants a value}; shift 2 ;;
        *) REST+=("$1"); shift ;;
    esac
done
set -- "${REST[@]}"

SFT=(--out "$RUNS/${NAME}_sft" --epochs 3 "$@")
if dry "$@"; then
    launch_dry sft.py --model "recipes/shapes/$NAME" --data "$RUNS/plans.jsonl" "${SFT[@]}"
    echo "(the run itself uses --model $ID; recipes/shapes holds its shapes without weights)"
    exit
fi
[ -n "$PLANNER" ] || fail "give a teacher: --teacher URL --teacher_model NAME, or --teacher with a \
model folder or hub id"
TEACHER=(--teacher "$PLANNER" ${SERVED:+--teacher_model "$SERVED"})
PLANS=${SERVED:-$PLANNER}
PLANS=$RUNS/plans_${PLANS//[^A-Za-z0-9._-]/_}.jsonl  # one file per teacher
prepare openthoughts "$RUNS/data/openthoughts.jsonl" --solutions --limit 10000
python distill.py --data "$RUNS/data/openthoughts.jsonl" --out "$PLANS" "${TEACHER[@]}" --resume
launch sft.py --model "$ID" --data "$PLANS" "${SFT[@]}"
