#!/usr/bin/env bash
# Install what ours is compared with, in a separate environment (.bench-venv): Ray, and llama.cpp with its server for a cut over
# processes. llama.cpp is compiled for this processor from the source package of llama-cpp-python, which takes some minutes.
set -euo pipefail
home=$(realpath -m "${1:?the folder to install into}")
model=${2:?a GGUF file to try llama.cpp with}
python3 -m venv "$home"
"$home/bin/python" -m pip install --quiet numpy typing_extensions diskcache jinja2 cmake "ray>=2.40,<3"
"$home/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$home/src"
rm -rf "$home/llama" && mkdir -p "$home/llama"
tar xzf "$home"/src/llama_cpp_python-*.tar.gz -C "$home/llama" --strip-components=1

build() { # with these further flags of the compiler
    "$home/bin/cmake" -S "$home/llama/vendor/llama.cpp" -B "$home/llama/build" -DCMAKE_C_FLAGS="$1" -DCMAKE_CXX_FLAGS="$1" \
        -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=ON -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF >"$home/llama/configure.log"
    "$home/bin/cmake" --build "$home/llama/build" --parallel "$(nproc)" --target llama ggml-rpc-server >"$home/llama/build.log" 2>&1
}

works() {
    LLAMA_CPP_LIB_PATH="$home/llama/build/bin" PYTHONPATH="$home/llama" "$home/bin/python" -c \
        "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False)('Name a colour.', max_tokens=2)" "$model"
}

build ""
if ! works; then
    # compiled by gcc 12, its products with AMX end with a general protection fault
    build "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    works
fi
touch "$home/.installed"
