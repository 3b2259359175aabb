#!/usr/bin/env bash
# The whole method on the embedded task, on a CPU: toy data, distilled plans, SFT, GRPO and
# PTA-GRPO, evaluation. GRPO and PTA-GRPO start from the same checkpoint and sample equally many
# completions. `make demo` runs this.
set -euo pipefail
[ $# = 0 ] || { echo "error: ${0##*/} takes no flags: set RUN or STEPS before it" >&2; exit 1; }
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE  # waiting threads must not spin: there are as many as cores
RUN=${RUN:-runs/demo}
STEPS=${STEPS:-100}
stage() { python -m recipes.demo_tools stage "$RUN" "$@"; }

rm -f "$RUN/stages.jsonl"
stage data python -m data.toy --out "$RUN/data" --sft 12000 --terse 0.5 --test 600 --overwrite
stage distill python distill.py --teacher rule --data "$RUN/data/sft.jsonl" \
    --out "$RUN/plans.jsonl" --overwrite
stage sft python sft.py --model data/toy_base --data "$RUN/plans.jsonl" --out "$RUN/sft" \
    --overwrite --epochs 2 --lr 2e-3 --batch_size 64 --tokens_per_micro_batch 4000 \
    --eval_every 50 --activation_checkpointing false

rl=(--model "$RUN/sft/model" --data "$RUN/data/train.jsonl" --overwrite
    --eval_data "$RUN/data/validation.jsonl" --eval_every 40 --show_every 40 --save_every 0
    --steps "$STEPS" --questions 16 --lr 1e-4 --warmup_steps 5 --schedule linear --kl_coef 0.01
    --max_plan_tokens 48 --max_completion_tokens 128 --tokens_per_micro_batch 4000
    --activation_checkpointing false)
stage grpo python grpo.py "${rl[@]}" --out "$RUN/grpo" --plans 12 --cots 1 --beta 0
stage pta python grpo.py "${rl[@]}" --out "$RUN/pta" --plans 4 --cots 3 --beta 0.5

for name in base sft grpo pta; do
    model="$RUN/$name/model"; [ "$name" = base ] && model=data/toy_base
    stage "eval_$name" python eval.py --model "$model" --data "$RUN/data/test.jsonl" \
        --out "$RUN/eval_$name" --overwrite --n 4 --max_completion_tokens 128
done
python -m recipes.demo_tools summary "$RUN"
python -m report "$RUN" --out "$RUN/report.html"
echo "Open $RUN/report.html in a browser: curves, plan trees, the same question before and after."
