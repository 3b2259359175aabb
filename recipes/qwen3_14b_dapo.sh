#!/usr/bin/env bash
# Table 1: Qwen3-14B, DAPO.
# Paper: MATH500 93.27, AIME24 72.55, AIME25 71.77, AMC23 95.66, mean 83.31.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen3_14b dapo "$@"
