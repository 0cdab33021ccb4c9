#!/usr/bin/env bash
# Install what ours is compared with, each in its best form, in a separate environment (.bench-venv):
# Ray, llama.cpp with its server for a cut over processes, OpenVINO GenAI, and CTranslate2, and the model in the forms that
# each of them takes. transformers runs in the project's own environment, and gets the model as safetensors.
#
# What was done already is not done again. A peer that fails leaves the others working: a line says so, its log stays, and
# the next call tries it again. llama.cpp is compiled for this processor, which takes some minutes.
set -euo pipefail
home=$(realpath -m "${1:?the folder to install into}")
model=$(realpath "${2:?the GGUF file of the model}")
main=${3:-$(dirname "$0")/../.venv/bin/python} # a Python that has torch and transformers
jobs=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
python=$home/bin/python forms=$home/models llama=$home/llama
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1
missing=()

step() { # run a function once, with its output in a log; tell if it fails
    local name=$1 result
    [ -e "$home/.done-$name" ] && return
    echo "peers.sh: $name"
    set +e # here, and not in a condition: there, `set -e` would not hold within the function
    (set -e && "$name") >"$home/$name.log" 2>&1
    result=$?
    set -e
    if [ "$result" = 0 ]; then
        touch "$home/.done-$name"
    else
        echo "peers.sh: $name failed, the others go on; see $home/$name.log"
        missing+=("$name")
    fi
}

ray() { "$python" -m pip install --quiet "ray>=2.40,<3"; }

# --- llama.cpp -------------------------------------------------------------------------------------------------------

build() { # with these flags of the compiler
    cmake=$home/bin/cmake
    "$cmake" -S "$llama/vendor/llama.cpp" -B "$llama/build" -DCMAKE_C_FLAGS="$1" -DCMAKE_CXX_FLAGS="$1" \
        -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_RPC=ON -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    "$cmake" --build "$llama/build" --parallel "$jobs" --target llama ggml-rpc-server llama-quantize llama-server
}

works() { # the products with and without the special layouts (AMX, repacked) must be the same, but for what is rounded
    LLAMA_CPP_LIB_PATH=$llama/build/bin PYTHONPATH=$llama "$python" - "$model" <<'PYTHON'
import sys, numpy, llama_cpp as l
TEXT = [1, 4093, 198, 13443, 314, 260, 6376, 4461, 47, 2, 198] * 6  # more rows than two tiles have
def logits(special):
    options = l.llama_model_default_params()
    options.use_extra_bufts = special
    model = l.llama_model_load_from_file(sys.argv[1].encode(), options)
    options = l.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 256, 2, 2
    context = l.llama_init_from_model(model, options)
    vocab = l.llama_vocab_n_tokens(l.llama_model_get_vocab(model))
    batch = l.llama_batch_init(len(TEXT), 0, 1)
    batch.n_tokens = len(TEXT)
    for i, token in enumerate(TEXT):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    assert l.llama_decode(context, batch) == 0
    return numpy.stack([numpy.ctypeslib.as_array(l.llama_get_logits_ith(context, i), (vocab,)).copy() for i in range(len(TEXT))])
with_them, without = logits(True), logits(False)
off = float(numpy.linalg.norm(with_them - without) / numpy.linalg.norm(without))
same = float((with_them.argmax(1) == without.argmax(1)).mean())
print(l.llama_print_system_info().decode())
print(f"the special layouts change the logits by {off:.4f} of their norm; {same:.0%} of the tokens are the same")
sys.exit(not (off < 0.05 and same > 0.9))
PYTHON
}

llama_cpp() {
    "$python" -m pip install --quiet typing_extensions diskcache jinja2 cmake
    if [ ! -e "$llama/.unpacked" ]; then
        "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$home/src"
        rm -rf "$llama" && mkdir -p "$llama"
        tar xzf "$home"/src/llama_cpp_python-0.3.36.tar.gz -C "$llama" --strip-components=1
        touch "$llama/.unpacked"
    fi
    # gcc 12 takes the tile configuration for eight bytes and drops the stores to the rest of it; -fno-dse keeps them
    build "-fno-dse"
    if ! works; then
        echo "its products with AMX do not work; it is built without AMX"
        build "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        works
    fi
}

gguf() { # Q4_0, which llama.cpp repacks on any processor; and 8 and 16 bits
    for form in Q4_0 Q8_0 F16 BF16; do
        "$llama/build/bin/llama-quantize" --allow-requantize "$model" "$forms/$form.gguf" "$form" 2
    done
}

# --- transformers ----------------------------------------------------------------------------------------------------

safetensors() { # in bfloat16
    "$main" - "$model" "$forms/safetensors" <<'PYTHON'
import pathlib, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, folder = pathlib.Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
model.hf_quantizer = None  # its weights are dequantized already, but it would refuse to save them
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
PYTHON
}

# --- OpenVINO GenAI --------------------------------------------------------------------------------------------------

openvino() { # its own form of the file with 16 bits, which it computes in bfloat16, and from that the forms with 8 and 4 bits
    "$python" -m pip install --quiet openvino-genai==2026.4.1.0 nncf==3.4.0
    rm -rf "$forms"/openvino-*
    "$python" - "$forms/F16.gguf" "$forms" <<'PYTHON'
import pathlib, shutil, sys
import nncf, openvino, openvino_genai
file, forms = map(pathlib.Path, sys.argv[1:])
base = forms / "openvino-bfloat16"
base.mkdir()
link = base / file.name  # it saves beside the file that it reads
link.symlink_to(file)
openvino_genai.LLMPipeline(link, "CPU", enable_save_ov_model=True)
link.unlink()
modes = nncf.CompressWeightsMode
for name, options in {
    "int8": {"mode": modes.INT8_SYM},
    "int4": {"mode": modes.INT4_SYM, "group_size": 64, "ratio": 1.0},
}.items():
    folder = forms / f"openvino-{name}"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("openvino_model.*"))
    model = openvino.Core().read_model(base / "openvino_model.xml")
    openvino.save_model(nncf.compress_weights(model, **options), folder / "openvino_model.xml")
PYTHON
}

# --- CTranslate2 -----------------------------------------------------------------------------------------------------

ctranslate2() { # int8: on a CPU it computes in nothing smaller than float32 otherwise
    "$python" -m pip install --quiet ctranslate2==4.8.5
    rm -rf "$forms"/ctranslate2-*
    "$main" - "$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" "$forms" <<'PYTHON'
import sys
sys.path.append(sys.argv[1])  # last: all but ctranslate2 itself comes from the environment of transformers
from ctranslate2.converters import TransformersConverter
forms = sys.argv[2]
TransformersConverter(f"{forms}/safetensors").convert(f"{forms}/ctranslate2-int8", quantization="int8")
PYTHON
}

[ -x "$python" ] || python3 -m venv "$home"
mkdir -p "$forms"
"$python" -m pip install --quiet numpy
for peer in llama_cpp gguf safetensors openvino ctranslate2 ray; do
    step "$peer"
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "peers.sh: not there: ${missing[*]}; the next call tries again"
else
    touch "$home/.installed"
fi
