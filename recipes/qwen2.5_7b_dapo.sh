#!/usr/bin/env bash
# Table 1: Qwen2.5-7B-Instruct, DAPO.
# Paper: MATH500 91.87, AIME24 31.64, AIME25 22.53, AMC23 74.12, mean 55.04.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row qwen2.5_7b dapo "$@"
