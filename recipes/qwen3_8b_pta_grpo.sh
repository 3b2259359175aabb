#!/usr/bin/env bash
# Table 1: Qwen3-8B, PTA-GRPO.
# Paper: MATH500 93.79, AIME24 72.68, AIME25 56.14, AMC23 93.77, mean 79.10.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen3_8b pta_grpo "$@"
