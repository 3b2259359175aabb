#!/usr/bin/env bash
# The whole method on an embedded task, on a CPU: data, distilled plans, SFT, GRPO and PTA-GRPO,
# evaluation. `make demo` runs this. TASK is doors, in which the plan is the decision, quantities, in
# which execution is, walk, in which CoTs act and meet shut doors, or pictures. GRPO and PTA-GRPO
# start from the same checkpoint and decode equally many tokens: a plan is decoded once for its CoTs,
# so PTA-GRPO takes more steps.
set -euo pipefail
[ $# = 0 ] || { echo "error: ${0##*/} takes no flags: set RUN, TASK or STEPS before it" >&2; exit 1; }
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/demo}
TASK=${TASK:-doors}
lr=1e-4
# steps and tree_steps: of GRPO, and of PTA-GRPO for as many tokens; beside them tokens per question.
case "$TASK" in
    doors)
        data=(data.doors --train 8000) base="$RUN/data/model" sft=(--epochs 1 --lr 3e-3 --batch_size 32)
        limits=(--max_plan_tokens 30 --max_completion_tokens 48)
        steps=${STEPS:-30} tree_steps=$((steps * 384 / 232)) ;;  # 12 (19 + 13), 4 (19 + 3 x 13)
    quantities)
        data=(data.toy --terse 0.5) base=data/toy_base sft=(--epochs 2 --lr 2e-3 --batch_size 64)
        limits=(--max_plan_tokens 48 --max_completion_tokens 128)
        steps=${STEPS:-100} tree_steps=$((steps * 534 / 426)) ;;  # 12 (13.5 + 31), 4 (13.5 + 93)
    walk)
        data=(data.walk --train 8000) base="$RUN/data/model" sft=(--epochs 1 --lr 3e-3 --batch_size 32)
        limits=(--max_plan_tokens 30 --max_completion_tokens 72) lr=3e-4
        steps=${STEPS:-30} tree_steps=$((steps * 592 / 440)) ;;  # 12 (19 + 30.3), 4 (19 + 3 x 30.3)
    pictures)  # quantities, read from a picture: recipes/demo_images.sh
        data=(data.toy_pictures) base="$RUN/data/model" sft=(--epochs 1 --lr 2e-3 --batch_size 64)
        limits=(--max_plan_tokens 48 --max_completion_tokens 128)
        steps=${STEPS:-100} tree_steps=$((steps * 534 / 426)) ;;
    *) echo "error: no task $TASK: doors, quantities, walk or pictures" >&2; exit 1 ;;
esac
stage() { python -m recipes.demo_tools stage "$RUN" "$@"; }

rm -f "$RUN/stages.jsonl"
stage data python -m "${data[@]}" --out "$RUN/data" --sft 12000 --test 600 --overwrite
stage distill python distill.py --teacher rule --data "$RUN/data/sft.jsonl" --limit 0 \
    --out "$RUN/plans.jsonl" --overwrite
stage sft python sft.py --model "$base" --data "$RUN/plans.jsonl" --out "$RUN/sft" --limit 0 \
    --overwrite "${sft[@]}" --tokens_per_micro_batch 4000 --eval_every 50 --save_every 0 \
    --activation_checkpointing false

rl=(--model "$RUN/sft/model" --data "$RUN/data/train.jsonl" --overwrite
    --eval_data "$RUN/data/validation.jsonl" --eval_every 20 --show_every 20 --save_every 0
    --questions 16 --lr "$lr" --warmup_steps 5 --kl_coef 0.01 "${limits[@]}"
    --tokens_per_micro_batch 4000 --activation_checkpointing false)
stage grpo python grpo.py "${rl[@]}" --out "$RUN/grpo" --plans 12 --cots 1 --beta 0 \
    --steps "$steps"
stage pta python grpo.py "${rl[@]}" --out "$RUN/pta" --plans 4 --cots 3 --beta 0.5 \
    --steps "$tree_steps"

# Temperature 1, without top-p: the policies as they were trained. A lower one hides differences.
for name in base sft grpo pta; do
    model="$RUN/$name/model"; [ "$name" = base ] && model="$base"
    stage "eval_$name" python eval.py --model "$model" --data "$RUN/data/test.jsonl" --overwrite \
        --out "$RUN/eval_$name" --n 4 --temperature 1 --top_p 1 "${limits[@]}"
done
python -m recipes.demo_tools summary "$RUN"
python -m report "$RUN" --out "$RUN/report.html"
echo "Open $RUN/report.html in a browser: curves, plan trees, the same question before and after."
