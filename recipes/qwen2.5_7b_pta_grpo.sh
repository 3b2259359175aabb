#!/usr/bin/env bash
# Table 1: Qwen2.5-7B-Instruct, PTA-GRPO.
# Paper: MATH500 92.53, AIME24 34.53, AIME25 29.25, AMC23 77.51, mean 58.46.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen2.5_7b pta_grpo "$@"
