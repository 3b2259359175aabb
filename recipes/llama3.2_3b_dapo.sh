#!/usr/bin/env bash
# Table 1: LLaMA3.2-3B, DAPO.
# Paper: MATH500 63.97, AIME24 18.97, AIME25 18.55, AMC23 46.44, mean 36.98.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row llama3.2_3b dapo "$@"
