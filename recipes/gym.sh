#!/usr/bin/env bash
# A task of the package reasoning-gym, from a base model to its evaluation. The package's generator
# writes the problems, and its scorer is the verifier (data/gym.py). There is no cold start: the
# model must be able to follow the template, as instruct models are.
#   pip install -r recipes/requirements.txt
#   recipes/gym.sh                                          TASK=shortest_path, Qwen2.5-1.5B
#   TASK=jugs MODEL=some/model GPUS=8 recipes/gym.sh --lr 2e-6
# Flags go to grpo.py. CONFIG holds settings of the task as JSON, RUN names the folder, TRAIN and
# TEST are numbers of problems, N is that of samples per problem, TOKENS limits a completion.
set -euo pipefail
cd "$(dirname "$0")/.."
TASK=${TASK:-shortest_path}
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
RUN=${RUN:-runs/gym_$TASK}
limits=(--max_completion_tokens "${TOKENS:-1024}")
# Without `--`, torchrun would read eval.py's --n as a shortened flag of its own.
launch() {
    if [ "${GPUS:-1}" = 1 ]; then python "$@"; else torchrun --nproc_per_node="$GPUS" -- "$@"; fi
}
evaluate() {
    launch eval.py --model "$1" --data "$RUN/data/test.jsonl" --out "$2" --n "${N:-8}" --resume \
        "${limits[@]}"
}

[ -f "$RUN/data/test.jsonl" ] || python -m data.gym --out "$RUN/data" --task "$TASK" \
    --config "${CONFIG:-{\}}" --train "${TRAIN:-4000}" --validation "${TEST:-200}" \
    --test "${TEST:-200}"
evaluate "$MODEL" "$RUN/eval_base"
launch grpo.py --model "$MODEL" --data "$RUN/data/train.jsonl" --out "$RUN/pta" --steps 100 \
    --eval_data "$RUN/data/validation.jsonl" --questions 32 "${limits[@]}" --resume "$@"
evaluate "$RUN/pta/model" "$RUN/eval_pta"
python eval.py --compare "$RUN/eval_base/records.jsonl" "$RUN/eval_pta/records.jsonl"
python -m report "$RUN" --out "$RUN/report.html"
