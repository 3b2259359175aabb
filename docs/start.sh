#!/usr/bin/env bash
# Where the walkthrough and the labs start: the model of the embedded task *linked quantities* after
# its cold start on plans, as in `make demo TASK=quantities`. It knows the template, and about 60 %
# of its answers are right.
#     bash docs/start.sh runs/lessons
set -euo pipefail
[ $# = 1 ] || { echo "error: name the folder to write: bash docs/start.sh runs/lessons" >&2; exit 1; }
cd "$(dirname "$0")/.."
python -m data.toy --terse 0.5 --out "$1/data" --sft 12000 --test 600 --overwrite
python distill.py --teacher rule --data "$1/data/sft.jsonl" --limit 0 --out "$1/plans.jsonl" \
    --overwrite
python sft.py --model data/toy_base --data "$1/plans.jsonl" --out "$1/sft" --limit 0 --overwrite \
    --epochs 2 --lr 2e-3 --batch_size 64 --tokens_per_micro_batch 4000 --save_every 0 \
    --activation_checkpointing false
