"""Write what bytes.yaml needs: Python's help pages as text, a tokenizer of bytes, and a llama with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import ranvier

HERE = Path(__file__).parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def main() -> None:
    (HERE / "corpus.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    folder = HERE / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # each letter stands for one byte
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").unlink(missing_ok=True)
    ranvier.initialise(folder, seed=1)


if __name__ == "__main__":
    main()
