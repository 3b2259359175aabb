#!/usr/bin/env bash
# Table 1: Qwen3-14B, PTA-GRPO.
# Paper: MATH500 96.15, AIME24 75.44, AIME25 73.29, AMC23 95.17, mean 85.01.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen3_14b pta_grpo "$@"
