"""Kill an actor in the middle of an answer: another one replaces it, and the text is the one of an undisturbed run."""

from __future__ import annotations

import os
import signal

import ranvier

PROMPT = "Tell me about the sea."


def main() -> None:
    with ranvier.start(ranvier.load("smollm2")) as run:
        undisturbed = "".join(token.text for token in run.generate(PROMPT, max_tokens=40))
        text = ""
        for number, token in enumerate(run.generate(PROMPT, max_tokens=40), 1):
            print(token.text, end="", flush=True)
            text += token.text
            if number == 16:
                [pid] = [pid for name, pid in run.pids.items() if name.startswith("lower.")]
                os.kill(pid, signal.SIGKILL)
                print("\n[killed lower]", flush=True)
        print(f"\n\nthe same text as undisturbed: {text == undisturbed}")
        for lost in run.recoveries:
            print(f"{lost.actor} was lost, and replaced within {lost.seconds:.2f} s")


if __name__ == "__main__":
    main()
