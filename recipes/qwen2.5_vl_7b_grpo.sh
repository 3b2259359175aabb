#!/usr/bin/env bash
# Table 5: Qwen2.5-VL-7B-Instruct, GRPO. The paper has no such row: it compares with SRPO.
# Paper, PTA-GRPO: MMMU-Pro 44.7, MMMU 59.0, EMMA 31.9, MMK12 58.5 / 68.7 / 66.8 (physics, ...).
# Flags of grpo.py may follow.
source "$(dirname "$0")/vision.sh"
row_vision grpo "$@"
