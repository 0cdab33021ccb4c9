"""Train a small T5 to spell words backwards, then run it as six actors: `python backwards.py`.

The script needs transformers (`pip install 'ranvier[hf]'`) to make and train the model. The actors run without it.
"""

import pydoc_data.topics
import random
import re
from pathlib import Path

import torch
import trio
from transformers import T5Config, T5ForConditionalGeneration

import ranvier

HERE = Path(__file__).parent
PAD, END, FIRST_LETTER = 0, 1, 2
STEPS = 600


def ids(word: str) -> list[int]:
    return [FIRST_LETTER + ord(letter) - ord("a") for letter in word]


def batch(words: list[str]) -> torch.Tensor:
    rows = [torch.tensor([*ids(word), END]) for word in words]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def words() -> tuple[list[str], list[str]]:
    """Return the words of Python's documentation: those to train on, and sixteen that are held out."""
    text = " ".join(pydoc_data.topics.topics.values()).lower()
    found = sorted(set(re.findall(r"\b[a-z]{3,9}\b", text)))
    random.Random(1).shuffle(found)
    return found[16:], found[:16]


def trained(known: list[str]) -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=28, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_max_distance=16, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, STEPS)
    chance = random.Random(2)
    for step in range(STEPS):
        some = chance.sample(known, 64)
        source = batch(some)
        answer = batch([word[::-1] for word in some])
        loss = model(source, attention_mask=source != PAD, labels=answer.masked_fill(answer == PAD, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


async def spelled(graph: ranvier.Graph, asked: list[str]) -> dict[str, str]:
    """Spell all words at once, each in a separate session."""
    answers = {}

    async def spell(run: ranvier.Run, word: str) -> None:
        generation = run.generate([*ids(word), END], max_tokens=12)
        letters = [token.id async for token in generation if token.id != END]
        answers[word] = "".join(chr(letter - FIRST_LETTER + ord("a")) for letter in letters)

    async with ranvier.launch(graph) as run, trio.open_nursery() as nursery:
        for word in asked:
            nursery.start_soon(spell, run, word)
    return answers


def main() -> None:
    torch.set_num_threads(1)
    known, asked = words()
    model = trained(known)
    model.save_pretrained(HERE / "model")
    graph = ranvier.load(HERE / "backwards.yaml")
    answers = trio.run(spelled, graph, asked, restrict_keyboard_interrupt_to_checkpoints=True)
    same = 0
    for word in asked:
        print(f"{word:10} {answers[word]}")
        alone = model.generate(torch.tensor([[*ids(word), END]]), max_new_tokens=12, do_sample=False)[0, 1:].tolist()
        same += [letter for letter in alone if letter != END] == ids(answers[word])
    right = sum(answers[word] == word[::-1] for word in asked)
    print(f"{right} of {len(asked)} words that were not trained on are right; {same} as transformers alone spells them")


if __name__ == "__main__":
    main()
