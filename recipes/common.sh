# Sourced by the recipes, never run. GPUS: processes of this machine; RUNS: where everything is written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs}
BENCHMARKS="math500 aime24 aime25 amc23"  # the columns of Table 1

model_settings() {  # name -> ID, STEPS and TOKENS (completion limit) of the paper's run (A.10)
    case "$1" in
        qwen2.5_7b)  ID=Qwen/Qwen2.5-7B-Instruct          STEPS=350 TOKENS=3584 ;;
        llama3.2_3b) ID=meta-llama/Llama-3.2-3B-Instruct  STEPS=350 TOKENS=3584 ;;  # limit: the paper gives none, Qwen2.5's
        qwen3_8b)    ID=Qwen/Qwen3-8B                     STEPS=150 TOKENS=4608 ;;
        qwen3_14b)   ID=Qwen/Qwen3-14B                    STEPS=50  TOKENS=4608 ;;  # limit: the paper gives none, Qwen3-8B's
        *) echo "error: no model $1: qwen2.5_7b, llama3.2_3b, qwen3_8b or qwen3_14b" >&2; exit 1 ;;
    esac
}

method_settings() {  # equal numbers of completions (12) and, but for what each method is, equal settings
    case "$1" in
        grpo)     METHOD=(--plans 12 --cots 1 --beta 0) ;;
        dapo)     METHOD=(--plans 12 --cots 1 --beta 0 --clip_high 0.28 --dynamic_sampling --overlong_buffer 512 --kl_coef 0) ;;
        dr_grpo)  METHOD=(--plans 12 --cots 1 --beta 0 --std_norm false --loss_agg constant --kl_coef 0) ;;
        pta_grpo) METHOD=(--plans 4 --cots 3 --beta 0.5) ;;
        *) echo "error: no method $1: grpo, dapo, dr_grpo or pta_grpo" >&2; exit 1 ;;
    esac
}

given() {  # flag, words: is it among them, and not as false?
    local flag=$1; shift
    [[ " $* " =~ \ $flag[\ =] && ! " $* " =~ \ $flag[\ =](false|0|no|off)\  ]]
}
dry() { given --dry_run "$@"; }
out_of() {  # default, words: the folder that the last --out among the words names, else the default
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
# `--` keeps torchrun from reading eval.py's --n as a shortened flag of its own.
launch() { torchrun --nproc_per_node="$GPUS" -- "$@"; }
# A dry run asks only for shapes: one process that counts as all of them.
launch_dry() { WORLD_SIZE=$GPUS RANK=0 python "$@"; }

prepare() {  # name, file, flags: a data set once, without what overlaps with the benchmarks
    [ -f "$2" ] || python -m data.sources "$1" --out "$2" --decontaminate $BENCHMARKS "${@:3}"
}

evaluate() {  # model, output folder, flags: 64 samples at temperature 0.6 and top-p 0.95 (eval.py's defaults)
    launch eval.py --model "$1" --data $BENCHMARKS --out "$2" --resume "${@:3}"
}

row() {  # model, method, flags of grpo.py: train from the cold start, then evaluate
    model_settings "$1"; method_settings "$2"
    local out flags=(--steps "$STEPS" --max_completion_tokens "$TOKENS" "${METHOD[@]}" "${@:3}")
    out=$(out_of "$RUNS/$1_$2" "${@:3}")  # --out stands among the flags too; both say the same
    if dry "$@"; then
        launch_dry grpo.py --model "recipes/shapes/$1" --data "$RUNS/data/deepmath.jsonl" --out "$out" "${flags[@]}"
        echo "(--model stands for $RUNS/$1_sft/model: recipes/shapes holds its shapes without weights)"
        return
    fi
    given --model "$@" || [ -d "$RUNS/$1_sft/model" ] || { echo "error: no cold start in $RUNS/$1_sft/model: run recipes/cold_start.sh $1 first" >&2; exit 1; }
    prepare deepmath "$RUNS/data/deepmath.jsonl" --limit 60000
    launch grpo.py --model "$RUNS/$1_sft/model" --data "$RUNS/data/deepmath.jsonl" --out "$out" "${flags[@]}"
    evaluate "$out/model" "$out/eval" --max_completion_tokens "$TOKENS"  # --overwrite has removed the old results there
}
