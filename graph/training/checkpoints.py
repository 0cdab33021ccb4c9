"""Read and complete training checkpoints. A checkpoint is complete once its index exists, which is written last.

OUT/round-00000100/   one shard per actor; index.json with the plan's hash and the finished rounds; for a model also
                      config.json, the tokenizer and model.safetensors.index.json, for transformers and `ranvier run`
OUT/latest            the name of the newest complete checkpoint
OUT/lock              locked by the training that writes there; the kernel unlocks it when the process ends
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranvier.actors.checkpoint.json_file import read_json
from ranvier.actors.checkpoint.quant_methods import settings_of
from ranvier.actors.protocol.training_spec import folder_of
from ranvier.transport.files import locked, read_text

from ..file.errors import RequestError
from ..sessions import tokenizer
from .plan import TrainingPlan

MOST_BYTES = 1 << 30
"""Size limit of an index, which has the history of all steps."""
INDEX, LATEST, LOCK = "index.json", "latest", "lock"
CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel", "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
"""Classes of transformers for models that come from GGUF, by family; other programs choose their code by them."""
BROUGHT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class TrainingCheckpoint:
    """Describe a complete checkpoint: its folder, the number of finished rounds, the steps so far with their losses."""

    folder: Path
    rounds: int
    history: list[dict[str, Any]]


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Reserve `out` for one training while in the context. No other training may write there meanwhile.

    Raises:
        RequestError: another training writes there, or `out` cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = locked(out / LOCK)
    except BlockingIOError:
        raise RequestError(f"{out}: another training writes there; wait for its end, or give another --out") from None
    except OSError as error:
        raise RequestError(f"{out}: cannot be written to: {error.strerror}; give another --out") from None
    try:
        yield
    finally:
        os.close(lock)


def latest(out: Path, plan: TrainingPlan) -> TrainingCheckpoint | None:
    """Return the newest complete checkpoint under `out`, or None if there is none.

    Raises:
        RequestError: the checkpoint belongs to another graph, or is damaged.
    """
    try:
        name = read_text(out / LATEST, 4096).strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RequestError(f"{out / LATEST}: {error}; remove it, or give another --out") from None
    if Path(name).name != name:
        raise RequestError(f"{out / LATEST}: expected a folder of {out}, got {name!r:.80}; remove it")
    folder = out / name
    try:
        content = json.loads(read_text(folder / INDEX, MOST_BYTES))
        rounds, history, ours = int(content["rounds"]), list(content["history"]), content["hash"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{folder}: damaged: {error}; remove it, or give another --out") from None
    if ours != plan.resumable:
        raise RequestError(
            f"{folder}: a checkpoint of another graph (expected {plan.resumable}, got {ours}): nothing was overwritten; give "
            "another --out"
        )
    return TrainingCheckpoint(folder, rounds, history)


def finish(out: Path, plan: TrainingPlan, rounds: int, history: Sequence[dict[str, Any]], keep: int) -> Path:
    """Complete a checkpoint whose shards are all there, and remove all except the newest `keep` complete checkpoints.

    A folder without an index is incomplete: an attempt was lost before all shards were written. Such folders of earlier
    rounds are removed, too. Those of later rounds may be in use: hosts write them while the training continues.
    """
    folder = folder_of(out, rounds)
    checkpoint = plan.graph.checkpoint
    if checkpoint is not None:
        _as_model(folder, plan)
    content = {"hash": plan.resumable, "rounds": rounds, "graph": plan.graph.name, "history": list(history)}
    _write(folder / INDEX, json.dumps(content) + "\n")
    _write(out / LATEST, folder.name + "\n")
    earlier = sorted(each for each in out.glob("round-*") if each.name <= folder.name)
    complete = [each for each in earlier if (each / INDEX).exists()]
    for old in earlier:
        if old not in complete[-keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _as_model(folder: Path, plan: TrainingPlan) -> None:
    """Write the files that let transformers and `ranvier run` open the shards as one model."""
    from safetensors import safe_open

    checkpoint = plan.graph.checkpoint
    assert checkpoint is not None
    file_of: dict[str, str] = {}
    for actor in plan.graph.actors.values():
        if actor.kind.uses_model:
            file = folder / f"{actor.name}.safetensors"
            with safe_open(file, "pt") as opened:
                file_of |= {name: file_of.get(name, file.name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    if checkpoint.config.tied:
        file_of.pop("lm_head.weight", None)
    sizes = sum((folder / name).stat().st_size for name in set(file_of.values()))
    index = {"metadata": {"total_size": sizes}, "weight_map": file_of}
    _write(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    if checkpoint.gguf is not None:
        _out_of_gguf(folder, plan)
        return
    source = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for name in BROUGHT:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if plan.graph.file.model is not None and settings_of(read_json(source / "config.json"), source) is not None:
        config = {**checkpoint.hf, "dtype": plan.graph.file.model.dtype}  # what is trained is not quantised
        _write(folder / "config.json", json.dumps(config, indent=1) + "\n")


def _out_of_gguf(folder: Path, plan: TrainingPlan) -> None:
    """Write the config and the tokenizer of a GGUF file in the format of transformers."""
    checkpoint, model = plan.graph.checkpoint, plan.graph.file.model
    assert checkpoint is not None and model is not None
    config = {"architectures": [CLASSES[checkpoint.config.family]], **checkpoint.hf, "dtype": model.dtype}
    _write(folder / "config.json", json.dumps(config, indent=1) + "\n")
    if tokenizer.brought_by(checkpoint):
        codec = tokenizer.of(checkpoint)
        codec.tokenizer.save(str(folder / "tokenizer.json"))
        content = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": codec.bos_token,
            "eos_token": codec.eos_token,
        }
        if codec.chat_template is not None:
            content["chat_template"] = codec.chat_template
        _write(folder / "tokenizer_config.json", json.dumps(content, indent=1) + "\n")


def _write(file: Path, text: str) -> None:
    part = file.with_suffix(file.suffix + ".part")
    part.write_text(text)
    part.replace(file)
