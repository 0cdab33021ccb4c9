#!/usr/bin/env bash
# lm-eval's harness on small tasks; usage, under with_server.py: run.sh BIN TOKENIZER
# BIN is the folder of the environment's commands, TOKENIZER a folder with the model's tokenizer.json
set -eu
here=$(cd "$(dirname "$0")" && pwd)
bin=$(cd "$1" && pwd) tokenizer=$(cd "$2" && pwd)
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=${TMPDIR:-/tmp}/lm-eval-data TOKENIZERS_PARALLELISM=false
model=${RANVIER_MODELS%%,*}
there="model=$model,tokenizer=$tokenizer,tokenizer_backend=huggingface,max_retries=1,base_url=$OPENAI_BASE_URL"
cd "$here"
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT
evaluate() {
    "$bin/lm_eval" run --include_path tasks --seed 1 --log_samples --output_path "$out/$1" "${@:2}" >"$out/$1.log" 2>&1 || {
        tail -20 "$out/$1.log"
        exit 1
    }
}
# token ids and texts, one prompt and many in a request, one request and many at once: the same scores
evaluate ids --model local-completions --tasks capitals,prose --model_args "$there/completions,tokenized_requests=True" --batch_size 1
evaluate texts --model local-completions --tasks capitals,prose --model_args "$there/completions,tokenized_requests=False" --batch_size 1
evaluate many --model local-completions --tasks capitals,prose,capitals_said \
    --model_args "$there/completions,tokenized_requests=True,num_concurrent=4" --batch_size 4
evaluate chat --model local-chat-completions --tasks capitals_said --apply_chat_template \
    --model_args "model=$model,max_retries=1,base_url=$OPENAI_BASE_URL/chat/completions"
"$bin/python" check.py "$out"
