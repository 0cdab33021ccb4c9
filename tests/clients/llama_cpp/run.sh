#!/usr/bin/env bash
# llama.cpp's tests of its server, in a folder unpacked from llama-cpp-python's source package
# usage, under with_server.py: run.sh PYTHON FOLDER LIST; FOLDER is .../vendor/llama.cpp/tools/server/tests
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$1 folder=$2
mapfile -t tests < <(grep -v '^#' "$here/$3")
cd "$folder"
format=unit/test_chat_completion.py::test_completion_with_response_format
tool=unit/test_tool_call.py::test_completion_without_tool_call_fast[meta-llama-Llama-3.3-70B-Instruct-128
# 0 to 2: schemas without a name, which OpenAI demands; messages7: any order of roles is taken; STREAMED: they expect a first
# chunk without content, where OpenAI sends an empty one
PYTHONPATH=$here:. exec "$python" -m pytest -c /dev/null --rootdir . -p ours -p no:cacheprovider -q --tb=short \
    --deselect "${format}[response_format0" --deselect "${format}[response_format1" --deselect "${format}[response_format2" \
    --deselect "unit/test_chat_completion.py::test_invalid_chat_completion_req[messages7" \
    --deselect "$tool-tools0-None-CompletionMode.STREAMED" --deselect "$tool-tools1-None-CompletionMode.STREAMED" \
    --deselect "$tool-tools2-none-CompletionMode.STREAMED" "${tests[@]}"
