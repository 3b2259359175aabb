#!/usr/bin/env bash
# Table 1: LLaMA3.2-3B, PTA-GRPO.
# Paper: MATH500 66.25, AIME24 24.92, AIME25 20.75, AMC23 49.55, mean 40.37.
# Flags of grpo.py may follow: --dry_run, --resume, or an ablation of recipes/README.md.
source "$(dirname "$0")/common.sh"
row llama3.2_3b pta_grpo "$@"
