"""llm, the command and the library, as a client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAME = os.environ["RANVIER_MODELS"].split(",")[0]
MODELS = f"""
- {{model_id: chat, model_name: {NAME}, api_base: {os.environ["OPENAI_BASE_URL"]}, supports_tools: true, supports_schema: true}}
- {{model_id: text, model_name: {NAME}, api_base: {os.environ["OPENAI_BASE_URL"]}, completion: true}}
"""
BOUNDED = ("-o", "max_tokens", "24", "-o", "temperature", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    (folder / "extra-openai-models.yaml").write_text(MODELS)
    (folder / "add.py").write_text('def add(a: int, b: int) -> int:\n    "Adds two numbers."\n    return a + b\n')
    return folder


def said(place: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LLM_USER_PATH": str(place)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stream_is_the_same_answer(place: Path) -> None:
    streamed = said(place, "-m", "chat", "Name three colours.", *BOUNDED)
    assert streamed.strip() and streamed == said(place, "-m", "chat", "Name three colours.", *BOUNDED, "--no-stream")


def test_usage_is_noted(place: Path) -> None:
    said(place, "-m", "chat", "Name three colours.", "-s", "Be brief.", *BOUNDED)
    (entry,) = json.loads(said(place, "logs", "-n", "1", "--json"))
    assert 0 < entry["output_tokens"] <= 24 and entry["input_tokens"] > 5


def test_a_conversation_goes_on(place: Path) -> None:
    said(place, "-m", "chat", "Name three colours.", *BOUNDED)
    assert said(place, "-c", "And one more.", *BOUNDED).strip()


@pytest.mark.parametrize("mode", [(), ("--no-stream",)])
def test_a_schema(place: Path, mode: tuple[str, ...]) -> None:
    text = said(
        place,
        "-m",
        "chat",
        "A dog.",
        "--schema",
        "kind, legs int",
        "-o",
        "temperature",
        "0",
        "-o",
        "max_tokens",
        "200",
        *mode,
    )
    assert set(json.loads(text)) == {"kind", "legs"}


@pytest.mark.parametrize("mode", [(), ("--no-stream",)])
def test_tools_are_sent(place: Path, mode: tuple[str, ...]) -> None:
    assert said(place, "-m", "chat", "Add 2 and 3.", "--functions", str(place / "add.py"), *BOUNDED, *mode).strip()


def test_completions(place: Path) -> None:
    streamed = said(place, "-m", "text", "Once upon a time", *BOUNDED)
    assert streamed.strip() and streamed == said(place, "-m", "text", "Once upon a time", *BOUNDED, "--no-stream")


async def test_the_library_asks_asynchronously(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(place))
    import llm  # reads its folder when it is asked for models

    answer = llm.get_async_model("chat").prompt("Name three colours.", temperature=0, max_tokens=24)
    pieces = [piece async for piece in answer]
    assert len(pieces) > 5
    assert (await answer.usage()).output == 24
    whole = (
        await llm.get_async_model("chat")
        .prompt("Name three colours.", temperature=0, max_tokens=24, stream=False)
        .text()
    )
    assert "".join(pieces) == whole
