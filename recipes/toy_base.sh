#!/usr/bin/env bash
# Makes data/toy_base, the tiny model that `make demo` starts from: random weights, then supervised training on toy
# solutions without plans. The same script as for any model does it: sft.py --use_plan false.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/toy_base}
python -m data.toy --out "$RUN" --seed 1 --sft 100000 --train 0 --test 1 --facts 2 6
python sft.py --model "$RUN/model" --data "$RUN/sft.jsonl" --use_plan false --out "$RUN/sft" --overwrite \
    --epochs 2 --batch_size 64 --lr 2.5e-3 --warmup_steps 100 --tokens_per_micro_batch 4000
