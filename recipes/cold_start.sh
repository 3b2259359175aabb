#!/usr/bin/env bash
# The cold start of a model: 10K OpenThoughts problems, plans distilled from their chains of thought, 3 epochs of SFT.
#   recipes/cold_start.sh qwen2.5_7b --teacher URL --teacher_model Qwen/Qwen3-235B-A22B [flags of sft.py]
# The paper's teacher, Qwen3-235B, wants a server (vLLM, SGLang or another with the OpenAI interface); --teacher with a
# folder or hub id loads a model here: --teacher Qwen/Qwen2.5-7B-Instruct is the paper's "self-plan" row.
source "$(dirname "$0")/common.sh"
NAME=${1:?give a model: qwen2.5_7b, llama3.2_3b, qwen3_8b or qwen3_14b}
model_settings "$NAME"
shift
PLANNER="" SERVED="" REST=()  # --teacher and --teacher_model are distill.py's, the others sft.py's
while [ $# -gt 0 ]; do
    case "$1" in
        --teacher=*|--teacher_model=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --teacher) PLANNER=${2:?$1 wants a value}; shift 2 ;;
        --teacher_model) SERVED=${2:?$1 wants a value}; shift 2 ;;
        *) REST+=("$1"); shift ;;
    esac
done
set -- "${REST[@]}"

if dry "$@"; then
    launch_dry sft.py --model "recipes/shapes/$NAME" --data "$RUNS/plans.jsonl" --out "$RUNS/${NAME}_sft" --epochs 3 "$@"
    echo "(--model stands for $ID: recipes/shapes holds its shapes without weights)"
    exit
fi
[ -n "$PLANNER" ] || { echo "error: give a teacher: --teacher URL --teacher_model NAME, or --teacher with a model folder or hub id" >&2; exit 1; }
TEACHER=(--teacher "$PLANNER" ${SERVED:+--teacher_model "$SERVED"})
PLANS=${SERVED:-$PLANNER}
PLANS=$RUNS/plans_${PLANS//[^A-Za-z0-9._-]/_}.jsonl  # one file a teacher
prepare openthoughts "$RUNS/data/openthoughts.jsonl" --solutions --limit 10000
python distill.py --data "$RUNS/data/openthoughts.jsonl" --out "$PLANS" "${TEACHER[@]}" --resume
launch sft.py --model "$ID" --data "$PLANS" --out "$RUNS/${NAME}_sft" --epochs 3 "$@"
