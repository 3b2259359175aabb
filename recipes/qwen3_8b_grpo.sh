#!/usr/bin/env bash
# Table 1: Qwen3-8B, GRPO.
# Paper: MATH500 94.33, AIME24 71.57, AIME25 54.94, AMC23 93.51, mean 78.59.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen3_8b grpo "$@"
