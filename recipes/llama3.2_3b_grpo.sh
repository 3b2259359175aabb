#!/usr/bin/env bash
# Table 1: LLaMA3.2-3B, GRPO.
# Paper: MATH500 62.23, AIME24 19.55, AIME25 18.29, AMC23 46.44, mean 36.63.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row llama3.2_3b grpo "$@"
