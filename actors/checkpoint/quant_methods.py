"""Find the quantised matrices of a checkpoint by its `quantization_config`.

The tensors of a file decide which matrices are quantised; the config says how. A config that does not fit its tensors, and a
method that is not read here, are refused by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, describe
from .json_file import read_json
from .quant_bitsandbytes import EightBits, FourBits
from .quant_floats import ExpertsFloat4, ExpertsFloat8, Float4, Float8
from .quant_forms import AWQ, GPTQ, AWQRows, Bytes, PackedRows
from .quantised import Form, Quantised
from .tensors import Entry, TensorEntry

Settings = Mapping[str, Any]
Found = Mapping[str, TensorEntry]
FormOf = Callable[[str, Mapping[str, TensorEntry]], "Form | None"]
"""Returns the form of a module by its name and its tensors; None if it is not quantised."""
_ACTIVATIONS = (
    "input_scale", "activation_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale",
    "k_scale", "v_scale", "q_scale", "activation_scale_ub", "input_scale_ub",
)  # fmt: skip
"""Tensors that quantise activations or the KV cache, which is not done here."""
_WEIGHTS = (
    "weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_shape",
    "weight_g_idx", "weight_global_scale", "qweight", "qzeros", "scales", "g_idx",
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "SCB", "weight_format",
)  # fmt: skip
FLOATS = ("float32", "float16", "bfloat16", "float64")


_BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files with the settings, and the method that writes them."""


def settings_of(config: Mapping[str, Any], folder: Path) -> Settings | None:
    """Return the settings of a quantised checkpoint: of its `config.json`, or a file beside it; None if it is not quantised.

    Raises:
        CheckpointError: they are damaged.
    """
    text = config.get("text_config")
    found = config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    older = config.get("compression_config")
    if not found and isinstance(older, dict) and older:
        found = {"quant_method": "compressed-tensors", **older}
    if not found:
        name = next((name for name in _BESIDE if (folder / name).exists()), None)
        if name is None:
            return None
        read = read_json(folder / name)
        found = {"quant_method": _BESIDE[name], **(read.get("quantization", {}) if name.startswith("hf_") else read)}
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder}: quantization_config: expected an object, got {found!r:.80}")
    inner = found.get("quantization_config")
    return {**found, **inner} if isinstance(inner, dict) else found


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that does not say that the model is quantised."""
    made = {name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")}
    if isinstance(made.get("text_config"), dict):
        made["text_config"] = without(made["text_config"])
    return made


def entries(found: Found, settings: Settings | None, folder: Path) -> dict[str, Entry]:
    """Return the tensors of a checkpoint under the names that the model has without quantisation.

    Raises:
        CheckpointError: the method is not built in, or its tensors do not fit together.
    """
    if settings is None:
        scale = next(
            (name for name in found if name.endswith((".weight_scale", ".weight_scale_inv", ".qweight"))), None
        )
        if scale is not None:
            raise CheckpointError(
                f"{found[scale].file}: tensor {scale} belongs to quantised weights, but {folder / 'config.json'} has no "
                "quantization_config; copy it from the original checkpoint"
            )
        return dict(found)
    try:
        return dict(_entries(found, settings, folder))
    except (TypeError, ValueError, AttributeError, LookupError, re.error) as error:
        raise CheckpointError(f"{folder}: quantization_config: {describe(error)}") from None


def _entries(found: Found, settings: Settings, folder: Path) -> Iterator[tuple[str, Entry]]:
    form_of = _method(settings, folder)
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in found.items():
        module, _, end = name.rpartition(".")
        if ".weight." in name:  # bitsandbytes names what belongs to a weight below it
            module, _, end = name.partition(".weight.")
            end = end.partition(".")[0]
        if end in _WEIGHTS:
            modules.setdefault(module, {})[end] = entry
        elif end not in _ACTIVATIONS and not _of_experts(name, found):
            yield name, entry
    yield from _experts(found, settings, folder)  # after the plain tensors, of which some are quantised
    for module, parts in modules.items():
        for each in _of_module(module, parts, form_of):
            yield each.name, each


def _of_module(module: str, parts: dict[str, TensorEntry], form_of: FormOf) -> Iterator[Entry]:
    """Yield the weight of a module, quantised or not.

    Raises:
        CheckpointError: there are two, or its scales are missing.
    """
    plain = parts.get("weight")
    if plain is not None and len(parts) == 1 and plain.stored in FLOATS:
        yield plain
        return
    name = f"{module}.weight"
    if plain is not None and ("qweight" in parts or "weight_packed" in parts):
        other = parts.get("qweight") or parts["weight_packed"]
        raise CheckpointError(f"{plain.file}: {module} has both {plain.name} and {other.name}; expected one of them")
    form = form_of(module, parts)
    if form is None:
        first = next(iter(parts.values()))
        if plain is not None and plain.stored in FLOATS:  # scales that lie beside it mean activations
            yield plain
            return
        raise CheckpointError(
            f"{first.file}: tensor {first.name}: {first.stored}, but quantization_config does not say how {module} is quantised"
        )
    short = {end.removeprefix("weight_") if end == "weight_g_idx" else end: entry for end, entry in parts.items()}
    yield Quantised(name, form.shape(short), short, form)


def _of_experts(name: str, found: Found) -> bool:
    """Return whether a tensor has the numbers or the scales of quantised experts."""
    stem = name.removesuffix("_inv").removesuffix("_scale")
    return name.endswith(("_blocks", "_scales")) or (stem != name and stem in found)


def _experts(found: Found, settings: Settings, folder: Path) -> Iterator[tuple[str, Entry]]:
    """Yield experts that are one tensor a layer: those of gpt-oss, and of other families in FP8."""
    block = _block(settings.get("weight_block_size"), folder)
    for name, blocks in found.items():
        scale = next((end for end in ("_scale_inv", "_scale") if name + end in found), None)
        if scale is not None and blocks.stored == "float8_e4m3fn" and len(blocks.shape) == 3:
            parts = {"weight": blocks, "scale": found[name + scale]}
            yield name, Quantised(name, ExpertsFloat8(block).shape(parts), parts, ExpertsFloat8(block))
        stem = name.removesuffix("_blocks")
        if stem == name:
            continue
        scales = found.get(stem + "_scales")
        if scales is None or settings.get("quant_method") != "mxfp4":
            raise CheckpointError(
                f"{blocks.file}: tensor {name} needs a tensor {stem}_scales beside it, of the method mxfp4"
            )
        parts = {"blocks": blocks, "scales": scales}
        yield stem, Quantised(stem, ExpertsFloat4().shape(parts), parts, ExpertsFloat4())


def _method(settings: Settings, folder: Path) -> FormOf:
    old = any(settings.get(name) for name in ("load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit"))
    method = str(settings.get("quant_method", "bitsandbytes" if old else "unknown")).lower()
    if method in ("auto-round", "intel/auto-round"):
        method, settings = _auto_round(settings, folder)
    made = METHODS.get(method)
    if made is None:
        raise CheckpointError(
            f"{folder}: the weights are quantised by {method!r:.40}, which is not built in; built in: "
            f"{', '.join(METHODS)}; use the original checkpoint, or a GGUF file of the model"
        )
    return made(settings, folder)


def _refused(folder: Path, what: str, built_in: str) -> CheckpointError:
    return CheckpointError(f"{folder}: quantization_config: {what} is not built in; built in: {built_in}")


def _auto_round(settings: Settings, folder: Path) -> tuple[str, Settings]:
    packing = str(settings.get("packing_format", "auto_round")).removeprefix("auto_round:")
    if packing in ("auto_gptq", "gptq"):
        return "gptq", {**settings, "checkpoint_format": "gptq"}
    if packing in ("auto_round", "gptqmodel"):
        return "gptq", {**settings, "checkpoint_format": "gptq_v2"}
    if packing in ("auto_awq", "awq"):
        return "awq", {**settings, "version": "gemm"}
    raise _refused(folder, f"packing_format {packing!r:.40}", "auto_gptq, gptqmodel, auto_awq")


def _gptq(settings: Settings, folder: Path) -> FormOf:
    kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise _refused(folder, f"checkpoint_format {kind!r:.40}", "gptq, gptq_v2")

    def form_of(module: str, parts: Found) -> Form | None:
        own = {**settings, **_dynamic(settings, module), **_extra(settings, module)}
        if "qweight" not in parts:
            return None
        width = own.get("bits", own.get("w_bit"))
        if width not in (2, 3, 4, 8):
            raise _refused(folder, f"{module}: bits {width!r:.40}", "2, 3, 4, 8")
        return GPTQ(int(width), _group(own, folder), bool(own.get("sym", False)), kind == "gptq")

    return form_of


def _dynamic(settings: Settings, module: str) -> Settings:
    """Return what GPTQModel's `dynamic` says about a module: settings by regular expressions."""
    for pattern, own in (settings.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and _pattern(pattern.removeprefix("+:")).match(module):
            return own if isinstance(own, dict) else {}
    return {}


def _extra(settings: Settings, module: str) -> Settings:
    """Return what auto-round's `extra_config` says about a module: settings by names or regular expressions."""
    for name, own in (settings.get("extra_config") or {}).items():
        if name == module or _pattern(name).fullmatch(module):
            return own if isinstance(own, dict) else {}
    return {}


def _group(settings: Settings, folder: Path) -> int:
    """Return the columns of a group; 0: all.

    Raises:
        CheckpointError: it is no such number.
    """
    size = settings.get("group_size", settings.get("q_group_size", -1))
    if size in (None, -1):
        return 0
    if type(size) is not int or size < 1:
        raise CheckpointError(
            f"{folder}: quantization_config: group_size: expected a positive integer or -1, got {size!r:.40}"
        )
    return size


def _awq(settings: Settings, folder: Path) -> FormOf:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version not in ("gemm", "gemv", "exllama", "ipex", "marlin"):
        raise _refused(folder, f"version {version!r:.40}", "gemm, gemv")
    width = settings.get("bits", settings.get("w_bit", 4))
    if width != 4:
        raise _refused(folder, f"bits {width!r:.40}", "4")

    def form_of(module: str, parts: Found) -> Form | None:
        if "qweight" not in parts:
            return None
        form = AWQRows if version == "gemv" else AWQ
        return form(4, _group({**settings, **_extra(settings, module)}, folder), False)

    return form_of


def _fp8(settings: Settings, folder: Path) -> FormOf:
    block = _block(settings.get("weight_block_size"), folder)
    kind = settings.get("fmt", "e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise _refused(folder, f"fmt {kind!r:.40}", "e4m3")

    def form_of(module: str, parts: Found) -> Form | None:
        weight = parts.get("weight")
        if weight is None or weight.stored != "float8_e4m3fn":
            return None
        usual = "weight_scale_inv" if block is not None else "weight_scale"
        scale = next((name for name in ("weight_scale_inv", "weight_scale") if name in parts), usual)
        return Float8(block, scale)

    return form_of


def _block(block: Any, folder: Path) -> tuple[int, int] | None:
    if block is None:
        return None
    if isinstance(block, str):
        block = [int(size) if size.isdecimal() else size for size in block.split("x")]
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise CheckpointError(
            f"{folder}: quantization_config: the size of blocks: expected two positive integers, got {block!r:.40}"
        )
    return block[0], block[1]


def _modelopt(settings: Settings, folder: Path) -> FormOf:
    algorithm = str(settings.get("quant_algo", "FP8")).upper()
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        return lambda _, parts: (
            Float4(16, "weight", "weight_scale", "weight_scale_2") if "weight_scale_2" in parts else None
        )
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return _fp8({}, folder)
    if algorithm == "FP8_PB_WO":
        return _fp8({"weight_block_size": [128, 128]}, folder)
    raise _refused(folder, f"quant_algo {algorithm!r:.40}", "FP8, FP8_PB_WO, NVFP4")


def _bitsandbytes(settings: Settings, folder: Path) -> FormOf:
    def form_of(_: str, parts: Found) -> Form | None:
        return FourBits() if "quant_state" in parts else EightBits() if "SCB" in parts else None

    return form_of


def _mxfp4(settings: Settings, folder: Path) -> FormOf:
    return lambda _, __: None


def _compressed_tensors(settings: Settings, folder: Path) -> FormOf:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{folder}: quantization_config: expected an object 'config_groups', got {groups!r:.40}")
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise _refused(folder, f"sparsity_config of the format {sparse!r:.40}", "dense")
    if settings.get("transform_config"):
        raise _refused(folder, "transform_config", "none")

    def form_of(module: str, parts: Found) -> Form | None:
        if any(_meant(target, module) for target in settings.get("ignore") or ()):
            return None
        group = _group_of(groups, module)
        if group is None:
            return None
        weights = group.get("weights")
        if not isinstance(weights, dict):
            return None
        return _compressed(group.get("format") or settings.get("format"), weights, parts, folder)

    return form_of


def _group_of(groups: Settings, module: str) -> Settings | None:
    """Return the group that means a module: by its name, else by a regular expression, else because it is a linear layer."""
    targets = [(target, group) for group in groups.values() for target in group.get("targets") or ()]
    named = (group for target, group in targets if target == module)
    matching = (group for target, group in targets if _meant(target, module))
    return next(named, None) or next(matching, None) or next((g for target, g in targets if target == "Linear"), None)


MOST_REPEATS = 6


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    """Compile a regular expression of a file.

    Raises:
        ValueError: it could take very long: a group is repeated, or there are too many repetitions.
    """
    if re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > MOST_REPEATS:
        raise ValueError(
            f"expected a regular expression without repeated groups and with at most {MOST_REPEATS} repetitions, "
            f"got {text!r:.80}"
        )
    return re.compile(text)


def _meant(target: str, module: str) -> bool:
    """Return whether a target means a module: by its name, or by a regular expression that its name begins with."""
    if target.startswith("re:"):
        return _pattern(target[3:]).match(module) is not None
    return target == module


def _compressed(form: Any, weights: Settings, parts: Found, folder: Path) -> Form | None:
    """Return the form of a module that compressed-tensors has quantised.

    The tensors tell a form that a file does not name.
    """
    width, whole = weights.get("num_bits", 8), weights.get("type", "int") == "int"
    size, symmetric = weights.get("group_size"), bool(weights.get("symmetric", True))
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if form in ("dense", "fakequant", None) and not {"weight_packed", "weight_scale"} & parts.keys():
        return None
    group = _group({"group_size": size}, folder) if strategy in ("group", "tensor_group") else 0
    if form == "nvfp4-pack-quantized":
        return Float4(16, "weight_packed", "weight_scale", "weight_global_scale", divides=True)
    if form == "mxfp4-pack-quantized":
        return Float4(32, "weight_packed", "weight_scale")
    if form == "mxfp8-quantized":
        return Float8((1, 32), "weight_scale")
    if form == "pack-quantized" and whole and width in (2, 4, 8):
        return PackedRows(width, group, symmetric)
    if form in ("int-quantized", "naive-quantized") and whole:
        return Bytes(width, group, symmetric)
    if form in ("float-quantized", "naive-quantized") and not whole and width == 8:
        if strategy == "block":
            return Float8(_block(weights.get("block_structure"), folder), "weight_scale")
        return Float8((1, group) if group else None, "weight_scale")
    raise _refused(
        folder, f"the format {form!r:.40} with {width} bits of {weights.get('type', 'int')!r:.20}",
        "pack-quantized (2, 4, 8 bits), int-quantized, float-quantized (8), naive-quantized, nvfp4-pack-quantized, "
        "mxfp4-pack-quantized, mxfp8-quantized",
    )  # fmt: skip


METHODS: Mapping[str, Callable[[Settings, Path], FormOf]] = {
    "fp8": _fp8, "fbgemm_fp8": _fp8, "modelopt": _modelopt, "compressed-tensors": _compressed_tensors,
    "sparseml": _compressed_tensors, "gptq": _gptq, "awq": _awq, "mxfp4": _mxfp4, "bitsandbytes": _bitsandbytes,
}  # fmt: skip
"""Methods by the name that `quant_method` has; auto-round's files are those of GPTQ or AWQ."""
