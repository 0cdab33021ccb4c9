"""Run three sessions at once through one graph. They share batches, and each gets the text it would get alone."""

from __future__ import annotations

from pathlib import Path

import trio

import ranvier

PROMPTS = ("Name three colours.", "What is two plus two?", "Say hello in French.")


async def ask(run: ranvier.Run, prompt: str) -> None:
    generation = run.generate(prompt, max_tokens=24)
    async for _ in generation:
        pass  # a client could show each token here as soon as it arrives
    result = generation.result
    print(
        f"{prompt}\n  {result.text.strip()}\n  {len(result.token_ids)} tokens, {result.tokens_per_second:.1f} per second"
    )


async def main() -> None:
    graph = ranvier.load(Path(__file__).with_name("smollm2.yaml"))
    async with ranvier.launch(graph) as run, trio.open_nursery() as nursery:
        for prompt in PROMPTS:
            nursery.start_soon(ask, run, prompt)


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)  # Ctrl-C also ends the run cleanly
