#!/usr/bin/env bash
# The whole method on questions with pictures, on a CPU: recipes/demo.sh on the picture form of linked
# quantities (data/toy_pictures.py), from a tiny Qwen2.5-VL. It ends with the same table.
set -euo pipefail
[ $# = 0 ] || { echo "error: ${0##*/} takes no flags: set RUN or STEPS before it" >&2; exit 1; }
export RUN=${RUN:-runs/demo_images} TASK=pictures
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}  # for a machine without other work: docs/running.md
exec "$(dirname "$0")/demo.sh"
