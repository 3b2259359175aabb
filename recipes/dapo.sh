#!/usr/bin/env bash
# DAPO: clip-higher, dynamic sampling, token-level loss, overlong shaping, no KL term.
# Any further flag of grpo.py may follow: recipes/dapo.sh --steps 50 --model Qwen/Qwen2.5-7B-Instruct
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node="${GPUS:-8}" grpo.py --out runs/dapo --plans 12 --cots 1 --beta 0 --loss_agg token --clip_high 0.28 --dynamic_sampling \
    --overlong_buffer 512 --kl_coef 0 "$@"
