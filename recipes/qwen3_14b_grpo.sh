#!/usr/bin/env bash
# Table 1: Qwen3-14B, GRPO.
# Paper: MATH500 92.48, AIME24 73.62, AIME25 71.33, AMC23 94.87, mean 83.08.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen3_14b grpo "$@"
