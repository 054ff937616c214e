#!/usr/bin/env bash
# Sends requests to a running server (`make serve`) with curl: examples/ask.sh [URL]
set -euo pipefail
URL=${1:-http://127.0.0.1:8000}

post() {
  echo "== $1"
  curl -sS --fail-with-body "$URL$1" -H 'Content-Type: application/json' -d "$2"
  echo
}

curl -sS --fail-with-body "$URL/v1/models"
echo

# A chat completion, and one that is streamed.
post /v1/chat/completions '{"model": "chat", "max_tokens": 32, "temperature": 0,
  "messages": [{"role": "user", "content": "Name three rivers."}]}'
post /v1/chat/completions '{"model": "chat", "max_tokens": 8, "stream": true,
  "stream_options": {"include_usage": true},
  "messages": [{"role": "user", "content": "Say hello."}]}'

# Log-probabilities of the tokens of a text, without generating any.
post /v1/completions '{"model": "base", "prompt": "The capital of France is Paris",
  "echo": true, "logprobs": 0, "max_tokens": 0}'

# JSON that conforms to a schema.
post /v1/chat/completions '{"model": "chat", "max_tokens": 80, "temperature": 0,
  "messages": [{"role": "user", "content": "A river, its length in km, and its continent, as JSON."}],
  "response_format": {"type": "json_schema", "json_schema": {"name": "river", "schema": {
    "type": "object", "required": ["name", "km", "continent"], "additionalProperties": false,
    "properties": {"name": {"type": "string", "maxLength": 30},
                   "km": {"type": "integer", "minimum": 1, "maximum": 7000},
                   "continent": {"enum": ["Africa", "America", "Asia", "Europe"]}}}}}}'

# Tokenize and detokenize.
post /tokenize '{"model": "chat", "prompt": "Hello, world", "return_token_strs": true}'
post /detokenize '{"model": "chat", "tokens": [19556, 28, 905]}'
