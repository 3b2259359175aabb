#!/usr/bin/env bash
# PTA-GRPO, the paper's main run: 4 plans x 3 CoTs a question, plan reward with beta = 0.5.
# Any further flag of grpo.py may follow: recipes/pta_grpo.sh --steps 50 --model Qwen/Qwen2.5-7B-Instruct
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node="${GPUS:-8}" grpo.py --out runs/pta_grpo --plans 4 --cots 3 --beta 0.5 "$@"
