# The recipes of Table 5 (Qwen2.5-VL-7B) source this file. DATA names what RL trains on: mmk12,
# geometry3k, or SRPO's own data in a folder with its pictures, DATA=srpo_rl=FOLDER.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-mmk12}
NAME=qwen2.5_vl_7b ID=Qwen/Qwen2.5-VL-7B-Instruct
# One evaluation each: the mean over its names is the figure of the table. MMK12 has one per subject.
declare -A SETS=(
    [mmmu]="mmmu"
    [mmmu_pro]="mmmu_pro mmmu_pro_vision"
    [emma]="emma_math emma_physics emma_chemistry emma_coding"
    [mmk12]="mmk12_physics mmk12_chemistry mmk12_biology mmk12_math"
)
ROWS="mmmu mmmu_pro emma mmk12"
BENCHMARKS=$(for set in $ROWS; do echo ${SETS[$set]}; done)  # no training data from these
PIXELS=(--max_pixels 401408)  # 512 tokens per picture

# evaluate_vision MODEL OUT FLAGS: greedily, as SRPO does, with up to seven pictures per question
evaluate_vision() {
    local set
    for set in $ROWS; do
        launch eval.py --model "$1" --data ${SETS[$set]} --out "$2/$set" --resume --n 1 \
            --temperature 0 --top_p 1 --max_prompt_tokens 6144 --max_completion_tokens 4096 \
            "${PIXELS[@]}" "${@:3}"
    done
}

# row_vision METHOD FLAGS: train from the cold start with these flags of grpo.py, then evaluate
row_vision() {
    method_settings "$1"
    local out start=$RUNS/${NAME}_sft/model data=$RUNS/data/${DATA%%=*}.jsonl
    # Steps and lengths are our choice: the paper gives none for this model.
    local flags=(--steps 350 --limit 0 --max_completion_tokens 2560 "${PIXELS[@]}" "${METHOD[@]}" "${@:2}")
    out=$(out_of "$RUNS/${NAME}_$1" "${@:2}")
    if dry "${@:2}"; then
        launch_dry grpo.py --model "recipes/shapes/$NAME" --data "$data" --out "$out" "${flags[@]}"
        echo "(the run itself uses --model $start; recipes/shapes holds its shapes without weights)"
        return
    fi
    given --model "${@:2}" || [ -d "$start" ] \
        || fail "no cold start in $start: run recipes/${NAME}_cold_start.sh first"
    prepare "$DATA" "$data"
    launch grpo.py --model "$start" --data "$data" --out "$out" "${flags[@]}"
    evaluate_vision "$out/model" "$out/eval"
}
