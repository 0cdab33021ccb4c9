#!/usr/bin/env bash
# openai's own tests of its API resources, in a folder unpacked from its source package
# usage, under with_server.py: run.sh PYTHON FOLDER [pytest's options]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$1 folder=$2
shift 2
resources=tests/api_resources
cd "$folder"
# kept completions and responses, deleted models: nothing is stored; path_params ask no server
PYTHONPATH=$here exec "$python" -m pytest -c "$here/pytest.ini" --rootdir . -p served_here \
    "$resources/chat/test_completions.py" "$resources/test_completions.py" "$resources/test_models.py" "$resources/test_responses.py" "$resources/test_embeddings.py" \
    -k "create or path_params or (Models and (retrieve or list))" "$@"
