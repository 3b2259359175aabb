#!/usr/bin/env bash
# A base row of Table 1, or any other model on its four benchmarks.
#   recipes/evaluate.sh MODEL OUT [flags of eval.py]
source "$(dirname "$0")/common.sh"
evaluate "${1:?give a model: a folder or a hub id}" "${2:?give an output folder}" "${@:3}"
