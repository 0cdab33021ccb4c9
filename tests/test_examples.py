"""Run everything in examples/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from linux import only_linux

import ranvier
from ranvier.graph.plan import show

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TESTED = {
    "smollm2.yaml",
    "smollm2-one.yaml",
    "smollm2-tcp.yaml",
    "smollm2-local.yaml",
    "smollm2-shared.yaml",
    "three_sessions.py",
    "lose_an_actor.py",
    "digits",
    "refine",
    "classify",
    "experts",
    "hedge",
    "backwards",
    "layers",
    "bytes",
    "lora",
    "slow",
    "embed",
    "inside",
}
LONG = [pytest.mark.slow, pytest.mark.timeout(450)]
TRAINED = r"397 pictures that were not trained on: [89]\d\.\d% right; off the single process by (0|0e\+00|\de-0[67])\n"
PICTURES = (EXAMPLES.parent / "docs" / "graphs.md").read_text()


def test_every_example_is_tested() -> None:
    """List every file and folder of examples/ in TESTED."""
    assert {path.name for path in EXAMPLES.iterdir() if path.name != "ranvier-runs"} == TESTED


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("digits", TRAINED, marks=LONG),
        pytest.param("experts", TRAINED, marks=LONG),
        pytest.param(
            "backwards",
            r"1[2-6] of 16 words that were not trained on are right; 16 as transformers alone spells them",
            marks=LONG,
        ),
        pytest.param("hedge", r"the answers are the same\n", marks=LONG),
        pytest.param("refine", r"   2  1\.414213562\n", marks=LONG),
        pytest.param(
            "classify",
            r"pieces that were not trained on: 9\d\.\d% right",
            marks=LONG,
        ),
    ],
)
def test_a_folder_runs_and_its_picture_is_true(name: str, words: str, runs: Path) -> None:
    """Run the script in a copy of its folder, and find the drawing that `show` makes in docs/graphs.md."""
    folder = copied(name, runs)
    done = ran(folder, f"{name}.py")
    assert re.search(words, done), done
    graph = ranvier.load(folder / f"{name}.yaml", allow_code=True)
    assert show.mermaid(ranvier.plan(graph)) in PICTURES


def ran(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run Python with these arguments in `folder`, and return its standard output.

    Its exit status must be `code`."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def copied(name: str, runs: Path) -> Path:
    """Copy a folder of examples/ as it is after a clone, and return the copy."""
    folder = runs / name
    left_out = ("ranvier-runs", "*.safetensors", "model", "trained", "corpus.txt", "__pycache__")
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns(*left_out))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_layers_learn(runs: Path) -> None:
    """Classify at least 95 % of the held-out pictures correctly after 300 steps."""
    done = ran(copied("layers", runs), "layers.py")
    assert re.search(r"359 pictures that were not trained on: 9[5-9]\.\d% right after 300 steps", done), done


@pytest.mark.slow
def test_bytes_learn_and_run(runs: Path) -> None:
    """Train for 6 steps, and generate from the checkpoint that training saved."""
    folder = copied("bytes", runs)
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, timeout=60)
    command = ("-m", "ranvier")
    short = [
        "--set",
        "training.steps=6",
        "--set",
        "training.validate={every: 3, batches: 4}",
        "--set",
        "training.batch=8",
    ]
    done = ran(folder, *command, "train", "bytes.yaml", "--json", "--plot", "bytes.png", *short)
    told = json.loads(done)
    assert told["steps"] == 6
    assert told["validation"] < 5.6, "less than of bytes at random, log 256"
    assert all(0 < told["bubble"][share] < 1 for share in ("computed", "measured", "messages"))
    picture = (folder / "bytes.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    said = ran(
        folder,
        *command,
        "run",
        "bytes.yaml",
        "--json",
        "--raw",
        "--prompt",
        "The ",
        "--max-tokens",
        "8",
        "--set",
        f"model.source={told['checkpoint']}",
    )
    assert len(json.loads(said)["token_ids"]) == 8


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_smollm2_learns_facts_by_lora(runs: Path) -> None:
    """Halve the loss in 6 steps, and generate the same text with transformers from the saved checkpoint.

    The model comes from a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = copied("lora", runs)
    done = ran(folder, "lora.py", "6")
    found = re.search(r"loss (\S+) -> (\S+)\n", done)
    assert found is not None, done
    assert float(found[2]) < 0.5 * float(found[1])
    [checkpoint] = (folder / "trained").glob("round-*")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("Semaphore the parrot can say three words:", return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=12, do_sample=False)
    said = tokenizer.decode(made[0][ids.input_ids.shape[1] :])
    assert f"after: {said!r}" in done, (said, done)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("smollm2-one.yaml", marks=pytest.mark.slow),
        pytest.param("smollm2-tcp.yaml", marks=pytest.mark.slow),
        pytest.param("smollm2-local.yaml", marks=only_linux),
        "smollm2-shared.yaml",
    ],
)
def test_a_graph_answers(name: str, runs: Path) -> None:
    """Answer from one process, and over TCP.

    The tests of the command run smollm2.yaml itself."""
    done = ran(
        runs,
        "-m",
        "ranvier",
        "run",
        str(EXAMPLES / name),
        "--json",
        "--runs",
        str(runs),
        "--prompt",
        "What is the capital of France?",
    )
    told = json.loads(done)
    assert told["text"] == "The capital of France is Paris."
    wires = {edge["edge"]: edge["wire"] for edge in told["trace"]["edges"]}
    between = {"smollm2-tcp.yaml": "tcp", "smollm2-local.yaml": "local", "smollm2-shared.yaml": "memory"}.get(name)
    assert wires.get("lower.hidden -> upper.hidden") == between


def test_three_sessions_at_once(runs: Path) -> None:
    """Run from another folder, as a user may, and leave the run folder there."""
    done = ran(runs, str(EXAMPLES / "three_sessions.py"))
    for prompt in ("Name three colours.", "What is two plus two?", "Say hello in French."):
        assert prompt in done
    assert "Bonjour" in done
    assert len(list((runs / "ranvier-runs").iterdir())) == 1


@pytest.mark.slow
def test_an_actor_is_lost(runs: Path) -> None:
    """Kill an actor in the middle of an answer, and print the same text as without it."""
    done = ran(runs, str(EXAMPLES / "lose_an_actor.py"))
    assert (
        "\n[killed lower]\n" in done
        and "the same text as undisturbed: True\nlower.0 was lost, and replaced within" in done
    )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("lens.py", r"hidden 0 .*\n(?s:.*)hidden 30    ' Paris' 0\.[78]\d  "),
        (
            "patching.py",
            r"hidden 10 of position 3 from France: the capital of Italy is Paris\n(?s:.*)hidden 30 of position 4 .* is Paris\n",
        ),
        ("pattern.py", r"layer 23 pattern, head 4: 0\.[89]\d of its attention\n"),
        ("steering.py", r"plain: (.{20,})\nsteered: (?!\1).{20,}\n"),
        ("ablation.py", r"whole model: 0\.[78]\d\nwithout the attention of layer 0: 0\.0\d\n"),
        ("probing.py", r"\n?(88|100)% of 8 words that were not trained on are right\n"),
        pytest.param("features.py", r"4 \['feature \d+', 'feature \d+', 'feature \d+'\]\n", marks=LONG),
        pytest.param("tracing.py", r"", marks=pytest.mark.slow),
    ],
)
def test_a_look_inside(script: str, words: str, runs: Path) -> None:
    """Find where SmolLM2 knows a capital."""
    shutil.copy(EXAMPLES / "smollm2.yaml", runs)
    folder = copied("inside", runs)
    assert re.search(words, ran(folder, script))
    assert len((folder / script).read_text().splitlines()) <= 28
    if script == "tracing.py":
        assert (folder / "tracing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_the_story_of_a_slow_pipeline(runs: Path) -> None:
    """Reproduce docs/tracing.md: the tap is the bottleneck first, then the cut.

    `diverge` names the edge that rounds."""
    folder = copied("slow", runs)

    def ranvier_(*arguments: str, code: int = 0) -> Any:
        return json.loads(ran(folder, "-m", "ranvier", *arguments, "--json", code=code))

    busy = {}
    for name, expected in (("slow", "serialise"), ("uneven", "compute"), ("mended", "compute")):
        printed = ran(folder, "streams.py", f"{name}.yaml")
        found = re.fullmatch(r"[\d.]+ tokens/s\nrun folder: (.*)\n", printed)
        assert found is not None, printed
        idle = {actor["actor"]: actor for actor in ranvier_("trace", found[1], "--idle")["actors"]}
        assert idle["upper.0"]["causes"][0]["cause"] == expected, idle["upper.0"]["causes"][:2]
        busy[name] = 1 - idle["upper.0"]["idle_ms"] / idle["upper.0"]["ms"]
    assert busy["mended"] > busy["uneven"]
    (folder / "raw.yaml").write_text((folder / "uneven.yaml").read_text().replace("codec: int8, ", ""))
    asked = ("--prompt", "Why is the sky blue?", "-n", "8")
    told = ranvier_("diverge", "raw.yaml", "uneven.yaml", *asked, "--allow-code", code=1)
    assert (told["edge"], told["actor"]) == ("lower.hidden -> upper.hidden", None)
    assert ranvier_("diverge", "mended.yaml", "reference", *asked)["differ"] is False
