"""Compile the C files. All else about the package stands in pyproject.toml.

A C file whose first line is `// flags: ...` becomes an extension of its own, compiled with these flags: one file for each
instruction set. The files that it includes have no such line. The functions are called through ctypes. If a file cannot be
compiled, the package installs without it, and torch does the work.
"""

from pathlib import Path

from setuptools import Extension, setup

FLAGS = "// flags: "
PACKAGE = Path("src/ranvier")


def extensions() -> list[Extension]:
    """Return an extension for each C file that names its flags, like `ranvier.actors.training._fused_avx2`."""
    included = [
        str(path) for folder in ("model/kernels", "training") for path in (PACKAGE / "actors" / folder).glob("*.[ch]")
    ]
    made = []
    for source in sorted(included):
        with open(source, encoding="utf-8") as file:
            first = file.readline()
        if first.startswith(FLAGS):
            module = Path(source).relative_to("src").with_name(f"_{Path(source).stem}")
            flags = ["-O3", "-pthread", *first.removeprefix(FLAGS).split()]
            name = ".".join(module.parts)
            made.append(Extension(name, [source], depends=sorted(included), extra_compile_args=flags, optional=True))
    return made


setup(ext_modules=extensions())
