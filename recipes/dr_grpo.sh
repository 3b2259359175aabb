#!/usr/bin/env bash
# Dr. GRPO: no division by the group's std, a loss over a constant length, no KL term.
# It is not in Table 1.
source "$(dirname "$0")/common.sh"
row "${1:?give a model: $NAMES}" dr_grpo "${@:2}"
