#!/usr/bin/env bash
# Makes data/toy_base, the tiny model that `make demo` starts from. It has random weights at first,
# and is trained on toy solutions without plans, from short problems to long ones: it learns to look
# values up on short ones first. This takes about half an hour on two cores. The scripts are the
# same as for any model: distill.py, then sft.py --use_plan false.
set -euo pipefail
[ $# = 0 ] || { echo "error: ${0##*/} takes no flags: set RUN before it" >&2; exit 1; }
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/toy_base}

# train NAME START_MODEL LOW HIGH PROBLEMS SEED EPOCHS SCHEDULE LR: LOW to HIGH facts per problem
train() {
    python -m data.toy --out "$RUN/$1" --facts "$3" "$4" --sft "$5" --seed "$6" \
        --train 0 --test 1 --overwrite
    python distill.py --teacher rule --data "$RUN/$1/sft.jsonl" --out "$RUN/$1/cots.jsonl" \
        --limit 0 --overwrite
    python sft.py --model "$2" --data "$RUN/$1/cots.jsonl" --use_plan false --out "$RUN/$1/sft" \
        --overwrite --epochs "$7" --schedule "$8" --lr "$9" --warmup_steps 50 --batch_size 64 \
        --tokens_per_micro_batch 4000 --activation_checkpointing false
}
python -m data.toy --out "$RUN" --sft 1 --train 0 --test 1 --overwrite  # for its random model/
train short   "$RUN/model"              2 3  16000  1 1   constant 3e-3
train long    "$RUN/short/sft/model"    3 6  80000  1 0.7 cosine   3e-3
train longer  "$RUN/long/sft/model"     3 6  90000 11 0.9 cosine   3e-3
train longest "$RUN/longer/sft/model"   3 6 170000 21 1   cosine   3e-3
train last    "$RUN/longest/sft/model"  3 6  45000 31 1   cosine   1e-3
echo "done: copy $RUN/last/sft/model to data/toy_base"
