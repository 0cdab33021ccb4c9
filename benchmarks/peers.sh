#!/usr/bin/env bash
# What ours is compared with, in an environment of its own (.bench-venv): Ray, and llama.cpp with its server for a cut over
# processes, compiled for this processor from the source package of llama-cpp-python (some minutes).
set -euo pipefail
home=$(realpath -m "${1:?the folder to install into}")
python3 -m venv "$home"
"$home/bin/python" -m pip install --quiet numpy typing_extensions diskcache jinja2 cmake "ray>=2.40,<3"
"$home/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$home/src"
rm -rf "$home/llama" && mkdir -p "$home/llama"
tar xzf "$home"/src/llama_cpp_python-*.tar.gz -C "$home/llama" --strip-components=1
"$home/bin/cmake" -S "$home/llama/vendor/llama.cpp" -B "$home/llama/build" \
    -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=ON -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF >"$home/llama/configure.log"
"$home/bin/cmake" --build "$home/llama/build" --parallel "$(nproc)" --target llama ggml-rpc-server >"$home/llama/build.log"
touch "$home/.installed"
