"""Measure what cutting a training over two cores gains, and what its messages cost: steps per second of a small llama.

The model, the batch and its eight micro-batches are those of examples/bytes: 2.8 million parameters, 24 sequences of
128 bytes, AdamW with clipping, 1F1B. The peers are one actor on one core, transformers' model in one process on one
core, and `torch.distributed.pipelining` over gloo with the same schedule and one process per core. The last one runs
with transformers' layers, and with the modules that the actors run. Each figure is the median of about twenty steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from contestants import Contestant, Makers, in_turn
from report import Answer, Goal

STEPS, BATCH, MICRO, CONTEXT = 24, 24, 8, 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ADAMW = {"kind": "adamw", "lr": 0.002, "clip": 1.0}

DATA = """
import torch
class Tokens:
    def __call__(self, step, validation):
        ids = torch.randint(256, (24, 129), generator=torch.Generator().manual_seed(step))
        return {"token": ids[:, :-1].flatten(), "target": ids[:, 1:].flatten()}
"""

OURS = """
import json, pathlib, statistics, sys, tempfile, trio, ranvier
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
file.with_name("data.py").write_text(sys.argv[2])
graph = ranvier.load(file, allow_code=True, overrides={"model.source": sys.argv[3]})
for _ in sys.stdin:
    with tempfile.TemporaryDirectory() as out:
        trained = trio.run(lambda: ranvier.train(graph, pathlib.Path(out), allow_code=True, runs=file.parent))
    if len(graph.actors) > 1:
        from ranvier.graph.training.bubbles import Bubbles
        from ranvier.graph.training.planner import training_plan
        plan = training_plan(graph)
        bubbles = Bubbles(plan.schedule, plan.stages, trained.counters)
        with pathlib.Path(sys.argv[4]).open("a") as told:
            print(json.dumps([bubbles.measured, bubbles.computed, bubbles.messages]), file=told)
    print(1 / statistics.median(step["seconds"] for step in trained.history[4:]), flush=True)
"""

TRANSFORMERS = (
    DATA
    + """
import os, statistics, sys, time, transformers
os.sched_setaffinity(0, {0})
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), 0.002, weight_decay=0.0, fused=True)
data = Tokens()
for _ in sys.stdin:
    times = []
    for step in range(20):
        began = time.perf_counter()
        batch = data(step, False)
        for ids, target in zip(batch["token"].view(8, 3, 128), batch["target"].chunk(8)):
            logits = model(ids, use_cache=False).logits.flatten(0, 1)
            (torch.nn.functional.cross_entropy(logits, target) / 8).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    print(1 / statistics.median(times), flush=True)
"""
)

PIPELINING = (
    DATA
    + """
import os, pathlib, statistics, sys, time, torch.distributed as dist, torch.multiprocessing
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from ranvier import Batch, Context
from ranvier.actors.checkpoint import known_checkpoint
from ranvier.actors.component.kinds import BUILT_IN
from ranvier.actors.training.layers import NativeStage
folder = pathlib.Path(__file__).parent
class Half(torch.nn.Module):
    def __init__(self, rank):
        super().__init__()
        layers, kind = [((0, 2), "first_stage"), ((3, 5), "last_stage")][rank]
        context = Context("half", {}, lambda _: None, known_checkpoint(pathlib.Path(sys.argv[1])), "float32", layers)
        self.stage, self.port = NativeStage(BUILT_IN[kind], context, 128), "token" if rank == 0 else "hidden"
    def forward(self, x):
        [made] = self.stage(Batch((), {self.port: x})).values()
        return made
class Theirs(torch.nn.Module):
    def __init__(self, rank):
        super().__init__()
        import transformers
        whole = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
        self.first, self.turns = rank == 0, whole.model.rotary_emb
        self.layers = whole.model.layers[:3] if self.first else whole.model.layers[3:]
        self.embed = whole.model.embed_tokens if self.first else None
        self.norm, self.head = (None, None) if self.first else (whole.model.norm, whole.lm_head)
    def forward(self, x):
        hidden = self.embed(x.view(-1, 128)) if self.first else x.view(-1, 128, 192)
        turns = self.turns(hidden, torch.arange(128)[None])
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
        return (hidden if self.first else self.head(self.norm(hidden))).flatten(0, 1)
def work(rank):
    os.sched_setaffinity(0, {rank})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half, data = (Theirs if sys.argv[2] == "transformers" else Half)(rank), Tokens()
    optimizer = torch.optim.AdamW(half.parameters(), 0.002, weight_decay=0.0, fused=True)
    loss = lambda made, target: torch.nn.functional.cross_entropy(made, target)
    schedule = Schedule1F1B(PipelineStage(half, rank, 2, torch.device("cpu")), 8, loss_fn=loss)
    go = torch.zeros(1)
    while True:
        if rank == 0 and not sys.stdin.readline():
            os._exit(0)
        dist.broadcast(go, 0)
        times = []
        for step in range(20):
            began = time.perf_counter()
            batch = data(step, False)
            if rank == 0:
                schedule.step(batch["token"])
            else:
                schedule.step(target=batch["target"], losses=[])
            squares = sum(weight.grad.pow(2).sum() for weight in half.parameters()).view(1)
            dist.all_reduce(squares)
            scale = min(1.0, 1.0 / (float(squares) ** 0.5 + 1e-6))
            for weight in half.parameters():
                weight.grad.mul_(scale)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - began)
        if rank == 0:
            print(1 / statistics.median(times), flush=True)
if __name__ == "__main__":
    torch.multiprocessing.get_context("spawn").Process(target=work, args=(1,), daemon=True).start()
    work(0)
"""
)


def ask(rounds: int) -> Answer:
    import ranvier

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        ranvier.initialise(folder, seed=1)
        two = {"first": {"kind": "first_stage", "layers": "0-2", "cpus": [0]},
               "last": {"kind": "last_stage", "layers": "3-5", "cpus": [1]}}  # fmt: skip
        one = {"model": {"kind": "model", "cpus": [0]}}
        makers: Makers = {
            "two stages, two cores": partial(_ours, two, folder),
            "two stages, two cores, eager": partial(_ours, two, folder, "eager"),
            "one actor, one core": partial(_ours, one, folder),
            "transformers, one core": partial(Contestant, sys.executable, TRANSFORMERS, str(folder)),
            **{
                f"torch.distributed.pipelining, {whose} layers": partial(
                    Contestant, sys.executable, PIPELINING, str(folder), whose
                )
                for whose in ("transformers", "our")
            },
        }
        figures = in_turn(makers, rounds)
        notes = [_bubble(schedule, folder / schedule) for schedule in ("1f1b", "eager")]
    goals = [
        Goal("two stages, two cores", "one actor, one core", 1.7),
        Goal("two stages, two cores", "transformers, one core"),
        Goal("two stages, two cores", "torch.distributed.pipelining, transformers layers", 1.1),
        Goal("two stages, two cores", "torch.distributed.pipelining, our layers"),
    ]
    return Answer("steps/s", figures, goals, notes)


def _bubble(schedule: str, file: Path) -> str:
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    measured, computed, messages = map(statistics.median, zip(*runs, strict=True))
    ratio = statistics.median(one / other for one, other, _ in runs)
    return (
        f"bubble of {schedule}: {measured:.1%} measured, {computed:.1%} by the schedule with the measured costs, ratio "
        f"{ratio:.2f} (1.10: {'holds' if ratio <= 1.1 else 'MISSED'}); messages {messages:.1%}"
    )


def _ours(actors: Mapping[str, Any], folder: Path, schedule: str = "1f1b") -> Contestant:
    names = list(actors)
    edges = [f"{names[0]}.hidden -> {names[1]}.hidden"] if len(names) == 2 else []
    graph = {
        "ranvier": 1, "name": "bench", "model": {"source": ".", "dtype": "float32"},
        "actors": {name: {**actor, "threads": 1} for name, actor in actors.items()},
        "edges": [*edges, {"from": f"{names[-1]}.token", "to": f"{names[0]}.token", "feedback": True}],
        "training": {
            "data": {"source": "./data.py:Tokens", "context": CONTEXT}, "batch": BATCH, "micro_batches": MICRO, "steps": STEPS,
            "optimizer": ADAMW, "schedule": schedule,
        },
    }  # fmt: skip
    return Contestant(sys.executable, OURS, json.dumps(graph), DATA, str(folder), str(folder / schedule))
