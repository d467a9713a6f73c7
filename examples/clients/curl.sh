#!/bin/sh
# Asks a server with sparse attention densely and sparsely, with nothing but curl.
#
# sh curl.sh [BASE_URL] [MODEL]; left out: $OPENAI_BASE_URL and $OPENAI_MODEL.
# OPENAI_API_KEY, if the server wants a key.
set -eu
base_url=${1:-${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}}
model=${2:-${OPENAI_MODEL:?"usage: sh curl.sh BASE_URL MODEL"}}
tag=curl-$$-$(date +%s)

complete() { # vllm_xargs as JSON
    curl --silent --show-error --fail-with-body "$base_url/completions" \
        --header "Content-Type: application/json" \
        --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
        --data @- <<JSON
{
  "model": "$model",
  "prompt": "Alice has a red hat, Bob has a blue hat, Carol has a green hat and Dave has a yellow hat. They go for a walk along the river, and the wind takes Bob's hat away. The hat that the wind took away is",
  "max_tokens": 16,
  "temperature": 0,
  "vllm_xargs": $1
}
JSON
    echo
}

echo "dense:"
complete '{"sparse_attention": "off"}'
echo "sparse, prompt and answer (with so few keys it is slower: else the server would stay dense):"
complete '{"sparse_attention": "on", "sparse_attention_dense_prefix": 0, "sparse_attention_min_keys": 0,
           "sparse_attention_tag": "'"$tag"'"}'
echo "what the sparse one read:"
curl --silent --show-error --fail-with-body "${base_url%/v1}/sparse_attention/stats?tag=$tag"
echo
