"""Write the tables of docs/models.md from the code, and check that the page has them.

`RANVIER_WRITE_DOCS=1 pytest tests/docs/test_models_page.py` writes the page."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ranvier.actors.checkpoint.config import ModelConfig
from ranvier.actors.checkpoint.gguf_config import ARCHITECTURES
from ranvier.actors.checkpoint.hf_config import FAMILIES, from_hf
from ranvier.actors.checkpoint.hf_foreign import DRAFTERS, ROUNDED
from ranvier.actors.checkpoint.hf_seq2seq import FAMILIES as SEQ2SEQ
from ranvier.actors.checkpoint.quant_methods import METHODS, entries
from ranvier.actors.checkpoint.quantised import Quantised
from ranvier.actors.errors import CheckpointError
from ranvier.graph.sessions.pre_tokenizers import SPLITS
from ranvier.graph.sessions.tokenizer_classes import CLASSES
from ranvier.graph.sessions.tokenizer_folder import OTHER_FILES
from ranvier.graph.sessions.tokenizer_gguf import KINDS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "models.md"
REFUSED = ("hqq", "aqlm", "quip", "vptq", "eetq", "quanto", "torchao", "spqr", "higgs", "bitnet", "fp_quant",
           "exl3", "quark", "marlin")  # fmt: skip
"""Methods that are not read yet."""


def loaded(path: str) -> Any:
    """Import a test module by its path: its tables say what has been tried."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / "tests" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)]


def config_of(name: str, changes: dict[str, Any]) -> ModelConfig:
    from transformers import AutoConfig

    return from_hf(AutoConfig.for_model(name, **changes).to_dict(), name)


def families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as OF_TWO

    tried = {name: config_of(name, changes) for name, changes in loaded("graph/run/test_model_types.py").CAUSAL.items()}
    foreign = {name: config for name, config in tried.items() if not config.native and not config.experts}
    sound = ("audio", "speech", "voxtral", "asr", "m4t", "moss", "music")
    other = {name for name in OF_TWO if name == "encoder-decoder" or any(part in name for part in sound)}
    return table(
        ("how", "types (`model_type`)"),
        [
            ("native", named(name for name in FAMILIES if tried[name].native)),
            ("native if cut into experts, else through transformers", named(n for n, c in tried.items() if c.experts)),
            ("native, encoder and decoder", named(SEQ2SEQ)),
            (
                "through transformers, tried in our tests, can be cut",
                named(n for n, c in foreign.items() if not c.uncut),
            ),
            ("through transformers, tried in our tests, in one actor", named(n for n, c in foreign.items() if c.uncut)),
            ("through transformers, not tried in our tests", "every other causal model that the library knows"),
            ("not yet: encoder and decoder", named(set(OF_TWO) - set(SEQ2SEQ) - other)),
            (
                "refused: they generate nothing by themselves, or not the same with a cache",
                named({*DRAFTERS, *ROUNDED}),
            ),
        ],
    )


def gguf() -> list[str]:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    families_of: dict[str, set[str]] = {arch: set() for arch in ARCHITECTURES}
    for arch, family, _, _ in loaded("actors/checkpoint/test_gguf_architectures.py").CASES.values():
        families_of.get(arch, set()).add(family)
    families_of["t5"].add("t5")
    cut = "native if cut into experts, else through transformers"
    how = {
        **dict.fromkeys((*FAMILIES, *SEQ2SEQ), "native"),
        **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), cut),
    }
    of_library = {name.replace("_moe", "moe").replace("gpt_oss", "gpt-oss").replace("minimax_m2", "minimax-m2")
                  for name in (*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS)}  # fmt: skip
    ours = {*ARCHITECTURES, "mistral", "umt5", "general", "tokenizer"}
    rows = [
        (f"`{arch}`", "; ".join(f"{family}: {how.get(family, 'through transformers')}" for family in sorted(found)))
        for arch, found in families_of.items()
    ]
    return table(
        ("architecture", "model"),
        [*rows, (named(f"`{name}`" for name in of_library - ours), "transformers' reader")],
    )


def blocks() -> list[str]:
    from gguf.quants import _type_traits

    return [named(kind.name for kind in _type_traits) + "."]


def quantised(folder: Path) -> list[str]:
    """Say for each method what its matrices hold, and in which tiles; the forms are those of the tests' data."""
    module = loaded("actors/checkpoint/test_quantised.py")
    found: dict[str, dict[str, set[str]]] = {method: {} for method in METHODS if method != "sparseml"}
    for number, (form, told) in enumerate(module.FORMS.items()):
        place = folder / str(number)
        place.mkdir()
        method = str(told["config"].get("quant_method", "modelopt"))
        for entry in module.entries_of(place, form).values():
            if isinstance(entry, Quantised):
                held = found.setdefault(method, {}).setdefault(entry.stored, set())
                held.add(entry.tile or "`dtype`" if len(entry.shape) == 2 else "`dtype`")
    return table(
        ("method (`quant_method`)", "what it stores, and what holds it with `weights: stored`"),
        [(f"`{method}`", "; ".join(f"{stored}: {' or '.join(sorted(held))}" for stored, held in sorted(each.items())))
         for method, each in found.items()],
    )  # fmt: skip


def tokenizers() -> list[str]:
    return table(
        ("tokenizer", "how"),
        [
            ("`tokenizer.json`", f"native; classes that change it and are built in: {named(CLASSES)}"),
            ("`tokenizer.json` of other classes that change it", "through transformers"),
            (named(f"`{name}`" for name in OTHER_FILES), "through transformers"),
            ("GGUF", f"native; kinds {named(KINDS)}; {len(SPLITS)} names of pre-tokenizers"),
            ("code that a checkpoint brings", "refused"),
        ],
    )


def test_the_page_has_what_the_code_says(tmp_path: Path) -> None:
    """Compare every table of the page with the one that is made from the code."""
    made = {
        "families": families(), "gguf": gguf(), "blocks": blocks(), "quantised": quantised(tmp_path),
        "refused": [named(f"`{name}`" for name in REFUSED) + "."], "tokenizers": tokenizers(),
    }  # fmt: skip
    text = PAGE.read_text()
    expected = text
    for name, lines in made.items():
        block = "\n".join(["<!-- " + name + " -->", *lines, "<!-- end -->"])
        expected, count = re.subn(
            rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, block=block: block, expected, flags=re.S
        )
        assert count == 1, name
    if os.environ.get("RANVIER_WRITE_DOCS"):
        PAGE.write_text(expected)
    assert PAGE.read_text() == expected


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_is_not_read_is_refused_by_its_name(method: str) -> None:
    """Name the method."""
    with pytest.raises(CheckpointError, match=f"the weights are quantised by '{method}', which is not built in"):
        entries({}, {"quant_method": method}, Path("model"))


@pytest.mark.parametrize("name", [*DRAFTERS, *ROUNDED])
def test_a_model_that_cannot_generate_is_refused(name: str) -> None:
    """Say why."""
    with pytest.raises(CheckpointError, match=f"{name} (is no model by itself|attends to other tokens)"):
        from_hf({"model_type": name, "is_decoder": True}, "config.json")
