#!/usr/bin/env bash
# Dr. GRPO: no division by the group's std, a constant loss denominator, no KL term.
# Any further flag of grpo.py may follow: recipes/dr_grpo.sh --steps 50 --model Qwen/Qwen2.5-7B-Instruct
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node="${GPUS:-8}" grpo.py --out runs/dr_grpo --plans 12 --cots 1 --beta 0 --std_norm false --loss_agg constant --kl_coef 0 "$@"
