#!/usr/bin/env bash
# GRPO with the same number of completions: 12 plans of one CoT each, no plan reward.
# Any further flag of grpo.py may follow: recipes/grpo.sh --steps 50 --model Qwen/Qwen2.5-7B-Instruct
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node="${GPUS:-8}" grpo.py --out runs/grpo --plans 12 --cots 1 --beta 0 "$@"
