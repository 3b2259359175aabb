#!/usr/bin/env bash
# Table 1: Qwen2.5-7B-Instruct, GRPO.
# Paper: MATH500 90.67, AIME24 30.15, AIME25 25.20, AMC23 73.21, mean 54.81.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen2.5_7b grpo "$@"
