#!/usr/bin/env bash
# Run suites that others wrote against our server, each in an environment of its own.
# usage: run.sh PLACE BIN [SUITE...]; PLACE keeps environments and sources, BIN is the folder of our commands
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
place=$(cd "$1" && pwd) ours=$(realpath -s "$2")
shift 2
[ $# -gt 0 ] || set -- langchain openai_own litellm_llm schemathesis llama_cpp lm_eval
examples=$here/../../examples
one=$examples/smollm2.yaml
embed=$examples/embed/embed.yaml

environment() { # make the environment of a suite, again when what it needs has changed
    bin=$place/$1/bin
    if ! cmp -s "$here/$1/requirements.txt" "$place/$1/installed"; then
        python3 -m venv --clear "$place/$1"
        "$bin/pip" install --quiet -r "$here/$1/requirements.txt"
        cp "$here/$1/requirements.txt" "$place/$1/installed"
    fi
}

source_of() { # unpack the source package of a release: source_of NAME VERSION [FOLDERS]
    sources=$place/sources/$1-$2
    [ -e "$sources/done" ] && return
    mkdir -p "$sources"
    "$bin/pip" download --quiet --no-deps --no-binary "$1" --dest "$sources" "$1==$2"
    tar xzf "$sources"/*.tar.gz --directory "$sources" --strip-components 1 --wildcards "${3:-*}"
    rm "$sources"/*.tar.gz
    touch "$sources/done"
}

serving() { # serving GRAPHS and options -- COMMAND
    python3 "$here/with_server.py" "$ours/ranvier" "$@" || failed+=" $suite"
}

cd "$place"
failed=
for suite; do
    echo "== $suite"
    environment "$suite"
    case $suite in
    langchain)
        serving "$one" "$examples/smollm2-one.yaml" "$embed" --allow-code -- "$bin/python" -m pytest -c "$here/langchain/pytest.ini" "$here/langchain"
        ;;
    openai_own)
        source_of openai 3.57.0
        serving "$one" "$embed" --allow-code -- bash "$here/openai_own/run.sh" "$bin/python" "$sources"
        ;;
    litellm_llm)
        serving "$one" -- "$bin/python" -m pytest -c "$here/litellm_llm/pytest.ini" "$here/litellm_llm"
        ;;
    schemathesis)
        serving "$one" --deadline 10 -- bash "$here/schemathesis/run.sh" "$bin" # a body that names no bound is answered for so long
        ;;
    llama_cpp)
        source_of llama-cpp-python 0.3.36 '*/vendor/llama.cpp/tools/server/tests/*'
        tests=$sources/vendor/llama.cpp/tools/server/tests
        serving "$one" -- bash "$here/llama_cpp/run.sh" "$bin/python" "$tests" selected.txt
        echo sk-this-is-the-secret-key >keys
        OPENAI_API_KEY=$(cat keys) serving "$one" --api-key-file keys -- \
            bash "$here/llama_cpp/run.sh" "$bin/python" "$tests" locked.txt
        ;;
    lm_eval)
        [ -d tokenizer ] || "$ours/python" "$here/lm_eval/save_tokenizer.py" tokenizer
        serving "$one" -- bash "$here/lm_eval/run.sh" "$bin" tokenizer
        ;;
    esac
done
[ -z "$failed" ] || {
    echo "failed:$failed"
    exit 1
}
