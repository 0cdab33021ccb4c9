#!/usr/bin/env bash
# random and systematic requests from the schema; usage, under with_server.py: run.sh BIN [st's options]
# BIN is the folder of the environment's commands
set -eu
here=$(cd "$(dirname "$0")" && pwd)
bin=$(cd "$1" && pwd)
shift
place=$(mktemp -d)
trap 'rm -r "$place"' EXIT
"$bin/python" "$here/schema.py" "${RANVIER_MODELS%%,*}" >"$place/schema.json"
cd "$place"
"$bin/st" run schema.json --url "$OPENAI_BASE_URL" --phases coverage,fuzzing --max-examples 60 --seed 1 --max-time 120 \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method \
    --request-timeout 30 --continue-on-failure --no-color "$@"
