# The recipes source this file. GPUS is the number of processes on this machine, RUNS the folder
# that everything is written to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs}
BENCHMARKS="math500 aime24 aime25 amc23"  # the columns of Table 1
NAMES="qwen2.5_7b, llama3.2_3b, qwen3_8b or qwen3_14b"

fail() { echo "error: $1" >&2; exit 1; }

# model_settings NAME: set ID, STEPS and TOKENS (the completion limit) as in the paper's run (A.10).
# It gives no limit for Llama-3.2-3B and Qwen3-14B: they have those of Qwen2.5-7B and Qwen3-8B.
model_settings() {
    case "$1" in
        qwen2.5_7b)  ID=Qwen/Qwen2.5-7B-Instruct          STEPS=350 TOKENS=3584 ;;
        llama3.2_3b) ID=meta-llama/Llama-3.2-3B-Instruct  STEPS=350 TOKENS=3584 ;;
        qwen3_8b)    ID=Qwen/Qwen3-8B                     STEPS=150 TOKENS=4608 ;;
        qwen3_14b)   ID=Qwen/Qwen3-14B                    STEPS=50  TOKENS=4608 ;;
        *) fail "no model $1: choose $NAMES" ;;
    esac
}

# method_settings NAME: set METHOD, the flags of grpo.py. All methods sample 12 completions per
# question, and differ only in what defines them.
method_settings() {
    local plain="--plans 12 --cots 1 --beta 0"
    local dapo="--clip_high 0.28 --dynamic_sampling --overlong_buffer 512 --kl_coef 0"
    dapo+=" --mini_batches 4"  # with one update per step its clip range would never act
    case "$1" in
        grpo)     METHOD=($plain) ;;
        dapo)     METHOD=($plain $dapo) ;;
        dr_grpo)  METHOD=($plain --std_norm false --loss_agg constant --kl_coef 0) ;;
        pta_grpo) METHOD=(--plans 4 --cots 3 --beta 0.5) ;;
        *) fail "no method $1: choose grpo, dapo, dr_grpo or pta_grpo" ;;
    esac
}

# given FLAG WORDS: whether the flag is among the words, and not as false
given() {
    local flag=$1; shift
    [[ " $* " =~ \ $flag[\ =] && ! " $* " =~ \ $flag[\ =](false|0|no|off)\  ]]
}
dry() { given --dry_run "$@"; }

# out_of DEFAULT WORDS: the folder that the last --out among the words names, else the default
out_of() {
    local out=$1; shift
    while [ $# -gt 0 ]; do
        case "$1" in
            --out=*) out=${1#*=} ;;
            --out) out=${2:?--out wants a folder} ;;
        esac
        shift
    done
    echo "$out"
}

# KV cache and activations take turns in the same memory. Without segments that grow, what AdamW
# keeps in a part of one would pin the rest of it.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# Without `--`, torchrun would read eval.py's --n as a shortened flag of its own.
launch() { torchrun --nproc_per_node="$GPUS" -- "$@"; }
# A dry run needs only the number of ranks: one process says that it is one of so many.
launch_dry() { WORLD_SIZE=$GPUS RANK=0 python "$@"; }

# prepare NAME FILE FLAGS: write a data set, once, without what overlaps with the benchmarks
prepare() {
    [ -f "$2" ] || python -m data.sources "$1" --out "$2" --decontaminate $BENCHMARKS "${@:3}"
}

# evaluate MODEL OUT FLAGS: with eval.py's defaults, 64 samples at temperature 0.6 and top-p 0.95
evaluate() {
    launch eval.py --model "$1" --data $BENCHMARKS --out "$2" --resume "${@:3}"
}

# row MODEL METHOD FLAGS: train from the cold start with these flags of grpo.py, then evaluate
row() {
    model_settings "$1"; method_settings "$2"
    local out start=$RUNS/$1_sft/model data=$RUNS/data/deepmath.jsonl
    local flags=(--steps "$STEPS" --max_completion_tokens "$TOKENS" "${METHOD[@]}" "${@:3}")
    out=$(out_of "$RUNS/$1_$2" "${@:3}")  # an --out among the flags names the same folder
    if dry "$@"; then
        launch_dry grpo.py --model "recipes/shapes/$1" --data "$data" --out "$out" "${flags[@]}"
        echo "(the run itself uses --model $start; recipes/shapes holds its shapes without weights)"
        return
    fi
    given --model "$@" || [ -d "$start" ] \
        || fail "no cold start in $start: run recipes/cold_start.sh $1 first"
    prepare deepmath "$data" --limit 60000
    launch grpo.py --model "$start" --data "$data" --out "$out" "${flags[@]}"
    # --resume adds to no older results: --overwrite has removed them with the old run.
    evaluate "$out/model" "$out/eval" --max_completion_tokens "$TOKENS"
}
