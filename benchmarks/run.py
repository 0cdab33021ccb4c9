"""Ask the questions of this folder, each of which is a file.

`python benchmarks/run.py one_stream hop --rounds 5` prints a table for each question, with the bounds that should hold,
and writes results/<kind of processor>/<question>.json. Without names it asks all questions.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback

import report

QUESTIONS = (
    "hop", "large", "one_stream", "sixteen_streams", "cut_one_stream", "cut_sixteen_streams", "four_or_one", "two_cores",
    "split_or_threads", "more_streams", "long_prompt", "depth", "memory_rate", "parent", "serve", "serve_slow",
    "serve_peer", "page", "held_up", "tracing", "top", "inside",
    "start", "memory", "products", "hedge", "recovery", "armed", "train",
)  # fmt: skip


def main() -> None:
    listed = "\n".join(f"  {name:20} {importlib.import_module(name).__doc__.splitlines()[0]}" for name in QUESTIONS)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"questions:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="all if no name is given")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (%(default)s)")
    options = parser.parse_args()
    if wrong := set(options.questions) - set(QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(wrong))}; there are {', '.join(QUESTIONS)}")
    failed = []
    for name in options.questions or QUESTIONS:
        question = importlib.import_module(name)
        try:
            report.tell(name, question.__doc__ or "", question.ask(options.rounds))
        except Exception:  # the other questions can still be asked
            failed.append(name)
            traceback.print_exc()
    if failed:
        sys.exit(f"no answer: {', '.join(failed)}")


if __name__ == "__main__":
    main()
