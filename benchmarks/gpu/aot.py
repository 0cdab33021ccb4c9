"""Compile every kernel of the steps for sm_90 without a GPU; print registers, spills, and what is loaded before the wait."""

import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BENCHMARKS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [BENCHMARKS, os.path.join(os.path.dirname(BENCHMARKS), "tests", "support")]
from gpu.check import MODELS, everything

KINDS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_BYTES = {89: 99 << 10, 90: 227 << 10}
"""Most shared memory of a block."""
TOOL = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")


def compile_for(launch, target):
    """Return the compiled kernel of a launch (`triton.compiler.CompiledKernel`, never loaded)."""
    kernel = launch.kernel
    signature, attributes, constants = {}, {}, {}
    for index, (name, kind) in enumerate(zip(kernel.arg_names, launch.kinds())):
        if isinstance(kind, torch.dtype):
            signature[name] = KINDS[kind]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


def report(launch, target):
    """Return (line, machine code, whether registers were spilled or shared memory is too small)."""
    made = compile_for(launch, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([TOOL, "-sass", file.name], capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    before = sass.split("ACQBULK")[0] if "ACQBULK" in sass else ""
    wide = len(re.findall(r"LDG\.E[^;]*128|LDGSTS[^;]*128", sass))
    early = len(re.findall(r"LDG\.E[^;]*128|LDGSTS[^;]*128", before)), before.count("CCTL")
    c = launch.constants
    what = {k: c[k] for k in ("EPILOGUE", "T", "R", "C", "BR", "BC", "SPLITS", "D", "G") if k in c}
    line = f"{launch.kernel.__name__} {what} {dict(launch.options)} regs {registers} stack {stack} local {local} shared {made.metadata.shared} 128-bit loads {wide}, before the wait {early[0]} loads {early[1]} prefetches; HGMMA {sass.count('HGMMA')} HMMA {sass.count('HMMA')} LDL {sass.count('LDL')} STL {sass.count('STL')}"
    return line, sass, bool(stack + local) or made.metadata.shared > SHARED_BYTES[target.arch]


if __name__ == "__main__":
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else list(MODELS)
    tokens = [int(t) for t in sys.argv[1].split(",")] if len(sys.argv) > 1 else [1, 32]
    spilled = 0
    desktop = "desktop" in sys.argv  # a GPU with less shared memory, such as an RTX 4090
    target = GPUTarget("cuda", 89 if desktop else 90, 32)
    for launch in everything(names, tokens, tried="all" in sys.argv, coded=True, desktop=desktop):
        line, sass, bad = report(launch, target)
        spilled += bool(bad)
        print(line, flush=True)
        if os.environ.get("SASS"):
            open(
                os.path.join(os.environ["SASS"], f"{launch.kernel.__name__}_{abs(hash(launch.key())) % 10**6}.sass"),
                "w",
            ).write(sass)
    print("kernels with a stack, local memory, or too much shared memory:", spilled)
