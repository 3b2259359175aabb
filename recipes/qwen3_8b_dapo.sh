#!/usr/bin/env bash
# Table 1: Qwen3-8B, DAPO.
# Paper: MATH500 93.09, AIME24 69.17, AIME25 52.77, AMC23 92.35, mean 76.85.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen3_8b dapo "$@"
