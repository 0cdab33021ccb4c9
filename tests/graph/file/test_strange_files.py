"""Refuse strange files, foreign folders and impossible configs at once, with a typed error and without harm.

The case numbers are those of the faults in docs/reliability.md."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from typer.testing import CliRunner

import ranvier
from ranvier.actors.checkpoint import gguf_file, open_checkpoint, safetensors_file
from ranvier.actors.checkpoint.json_file import read_json
from ranvier.actors.errors import CheckpointError, RecordingError
from ranvier.actors.trace.recording_reader import Recorded
from ranvier.graph.commands import cli
from ranvier.graph.commands.command_line import say
from ranvier.graph.file import load
from ranvier.graph.file.errors import GraphError, RequestError
from ranvier.graph.run import chaos
from ranvier.graph.run.paths import folder_of_runs, writable
from ranvier.graph.sessions.printable import printable
from ranvier.graph.sessions.text_process import TextProcess
from ranvier.graph.sessions.tokenizer import TextCodec, of
from ranvier.graph.trace import summary
from ranvier.graph.trace.trace_lines import TraceError
from ranvier.graph.training import checkpoints
from ranvier.transport.format.errors import AddressError, RanvierError
from ranvier.transport.wires import curve
from ranvier.transport.wires.opening import open_wire

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SMOLLM2 = str(EXAMPLES / "smollm2.yaml")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


# -- case 61: something else at the output's path ---------------------------------------------------------------------


def in_the_way(path: Path, what: str) -> None:
    """Create a `what` at `path`."""
    if what == "a folder":
        path.mkdir()
    elif what == "a link":
        (path.parent / "precious").write_text("precious")
        path.symlink_to(path.parent / "precious")
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a socket":
        with closing(socket.socket(socket.AF_UNIX)) as made:
            made.bind(str(path))


WAYS = ("a folder", "a link", "a pipe", "a socket")


@pytest.mark.parametrize("what", WAYS)
def test_outputs_go_into_files_alone_case_61(what: str, tmp_path: Path) -> None:
    """Refuse an output path that is not a regular file, before any work, and leave it as it is."""
    path = tmp_path / "out"
    in_the_way(path, what)
    before = path.lstat()
    with pytest.raises(RequestError, match="expected a file or nothing there"):
        writable(path)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert what != "a link" or (tmp_path / "precious").read_text() == "precious"


def test_commands_look_at_their_outputs_first_case_61(tmp_path: Path) -> None:
    """Check the output paths of commands before any work."""
    (tmp_path / "out").mkdir()
    for arguments in (["trace", str(tmp_path), "--perfetto"], ["trace", str(tmp_path), "--plot"]):
        done = invoke(*arguments, str(tmp_path / "out"))
        assert isinstance(done.exception, RequestError), done.exception
    with pytest.raises(RequestError, match="there is no such folder"):
        writable(tmp_path / "nowhere" / "out")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="expected a folder, found a file"):
        folder_of_runs(tmp_path / "file")


@pytest.mark.parametrize("scheme", ["ipc", "local"])
@pytest.mark.parametrize("what", ["a file", *WAYS])
def test_an_endpoint_never_replaces_what_is_not_its_own_case_61(what: str, scheme: str, tmp_path: Path) -> None:
    """A socket that no run of ours left is not replaced either."""
    path = tmp_path / "inbox"
    if what == "a file":
        path.write_text("precious")
    else:
        in_the_way(path, what)
    before = path.lstat()
    with pytest.raises(AddressError, match=r"expected nothing there|is not a socket|no run of ours left"):
        open_wire("a.0.1", f"{scheme}://{tmp_path}/inbox", max_frame_bytes=1 << 20)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert what != "a file" or path.read_text() == "precious"


# -- case 70: not a regular file --------------------------------------------------------------------------------------


def tokenizer_file(folder: Path) -> None:
    of(open_checkpoint(folder))


READERS: dict[str, tuple[str, Callable[[Path], Any], type[RanvierError]]] = {
    "graph": ("x.yaml", load.read, GraphError),
    "chaos": ("x.yaml", chaos.read, GraphError),
    "config": ("config.json", read_json, CheckpointError),
    "safetensors": ("x.safetensors", safetensors_file.read_header, CheckpointError),
    "gguf": ("x.gguf", gguf_file.read_header, CheckpointError),
    "key": ("a.key", lambda path: curve.read(path.parent, "a"), RanvierError),
    "recording": ("host.json", lambda path: Recorded(path.parent), RecordingError),
    "checkpoint": ("latest", lambda path: checkpoints.latest(path.parent, None), RanvierError),  # type: ignore[arg-type]
    "input": ("x", lambda path: raised(invoke("score", SMOLLM2, "--text", str(path))), RanvierError),
    "prompt": ("x", lambda path: raised(invoke("run", SMOLLM2, "--prompt-file", str(path))), RanvierError),
}


def raised(done: Any) -> None:
    """Raise the exception that the command ended with."""
    assert done.exception is not None
    raise done.exception


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", ["a pipe", "zeros", "a folder"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_before_it_is_read_case_70(reader: str, what: str, tmp_path: Path) -> None:
    """Refuse a pipe without a writer, an endless device and a folder before reading from them."""
    name, read, kind = READERS[reader]
    path = tmp_path / name
    if what == "zeros":
        path.symlink_to("/dev/zero")
    else:
        in_the_way(path, what)
    with pytest.raises(kind) as caught:
        read(path)
    assert str(path) in str(caught.value) or path.name in str(caught.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_tokenizers_files_that_are_none_case_70(name: str, tiny: Any, tmp_path: Path) -> None:
    """Refuse a pipe among the tokenizer's files, and name it."""
    folder, _ = tiny("llama")
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    if name != "tokenizer.json":
        Tokenizer(models.BPE({"a": 0}, [])).save(str(own / "tokenizer.json"))
    (own / name).unlink(missing_ok=True)
    os.mkfifo(own / name)
    with pytest.raises(CheckpointError, match=name):
        tokenizer_file(own)


# -- case 69: tokenizers that explode -----------------------------------------------------------------------------------

HOSTILE: dict[str, Callable[[Tokenizer], None]] = {
    "a pattern that goes back and back": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Split(pre_tokenizers_regex(r"(a+)\1+b$"), "isolated")
    ),
    "a pattern that panics": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Split(pre_tokenizers_regex(r"(a+)+$"), "isolated")
    ),
    "a normalizer that multiplies": lambda t: setattr(
        t, "normalizer", normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 4)
    ),
}


def pre_tokenizers_regex(text: str) -> Any:
    from tokenizers import Regex

    return Regex(text)


@pytest.mark.parametrize("how", HOSTILE)
def test_a_tokenizer_that_explodes_ends_one_request_case_69(how: str) -> None:
    """Stop the process of a tokenizer that explodes, and serve the next request from another one."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, [], unk_token="b"))
    HOSTILE[how](tokenizer)
    with closing(TextProcess(TextCodec(tokenizer, None, "", ""))) as process:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="tokenizer"):
                process.ids("a" * 20_000 + "c")
        assert process.ids("b") == [1]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Replace("a", "a" * 1000)] * 3),
        decoders.Strip(" ", 10**9, 0),
        decoders.Replace(pre_tokenizers_regex("(a+)+$"), "b"),
    ],
    ids=["multiplies", "strips", "a pattern"],
)
def test_a_decoder_that_explodes_is_refused_as_it_is_read_case_69(decoder: Any, tiny: Any, tmp_path: Path) -> None:
    """Refuse a decoder that explodes when the tokenizer is read.

    Tokens become text in the run's own process."""
    folder, _ = tiny("llama")
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoder
    tokenizer.save(str(own / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="decoder"):
        tokenizer_file(own)


# -- case 71: impossible configs --------------------------------------------------------------------------------------

ABSURD: Sequence[Any] = (float("nan"), float("inf"), float("-inf"), 0, -1, 10**9, 1e308, [], [1], {}, "x", True, 0.5)
FIELDS: dict[str, Sequence[Any]] = {
    "vocab_size": (), "hidden_size": (), "num_hidden_layers": (), "num_attention_heads": (), "num_key_value_heads": (),
    "head_dim": (), "intermediate_size": (), "rms_norm_eps": (), "rope_theta": (10**9,),
    "max_position_embeddings": (10**9,), "eos_token_id": (0, -1, 10**9, [], [1]), "bos_token_id": (0, -1, 10**9, [], [1]),
    "tie_word_embeddings": (True,), "attention_bias": (True,), "mlp_bias": (True,), "hidden_act": ("x",),
}  # fmt: skip
"""Fields of a llama, each with the values of `ABSURD` that it may have.

transformers decides about an activation that is not built in."""
MIXTURE: dict[str, Sequence[Any]] = {"num_local_experts": (), "num_experts_per_tok": (), "sliding_window": (0, 10**9)}


@pytest.mark.parametrize("field", FIELDS)
def test_absurd_values_are_errors_of_the_check_case_71(field: str, tiny: Any, tmp_path: Path) -> None:
    """Report an absurd value in a llama's config as an error of the check."""
    folder, _ = tiny("llama")
    check_absurd(folder, field, FIELDS[field], tmp_path)


@pytest.mark.parametrize("field", MIXTURE)
def test_absurd_values_of_a_mixture_case_71(field: str, tiny: Any, tmp_path: Path) -> None:
    """Report an absurd value in a mixture's config as an error of the check."""
    folder, _ = tiny("mixture", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    check_absurd(folder, field, MIXTURE[field], tmp_path)


def check_absurd(folder: Path, field: str, allowed: Sequence[Any], tmp_path: Path) -> None:
    """Check that every value of `ABSURD` is refused for this field, except the allowed ones."""
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    graph = tmp_path / "graph.yaml"
    graph.write_text(
        "ranvier: 1\nname: absurd\nmodel: {source: ./own, dtype: float32}\nactors:\n  all: {kind: model}\npipeline: [all]\n"
    )
    rope = config.get("rope_parameters") or {}
    for value in ABSURD:
        changed = {**config, field: value}
        if field in rope:
            changed["rope_parameters"] = {**rope, field: value}
        (own / "config.json").write_text(json.dumps(changed))
        if any(type(value) is type(each) and value == each for each in allowed):
            continue
        with pytest.raises(GraphError) as caught:
            ranvier.load(graph)
        assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": float("nan")}, {"rope_type": "linear", "factor": "x"},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": float("inf")},
        {"rope_type": []},
    ],
)  # fmt: skip
def test_absurd_rotary_scaling_case_71(scaling: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    """Refuse absurd parameters of rotary scaling."""
    folder, _ = tiny("llama")
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **scaling}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        open_checkpoint(own)


# -- case 72: foreign folders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(streamed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run."""
    return streamed(tmp_path_factory.mktemp("made"), [[1, 2, 3], [4, 5, 6, 7]], 5)


def first_line(file: Path, change: Callable[[list[Any]], Any]) -> None:
    """Change the first message that a trace records as received."""
    head, *lines = file.read_text().splitlines()
    index = next(number for number, line in enumerate(lines) if line.startswith('["done"'))
    lines[index] = json.dumps(change(json.loads(lines[index])))
    file.write_text("\n".join([head, *lines]) + "\n")


def plan(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the plan in a run folder."""
    file = folder / "plan.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


HURT: dict[str, Callable[[Path], Any]] = {
    "no plan": lambda folder: (folder / "plan.json").write_text("{"),
    "a deep plan": lambda folder: (folder / "plan.json").write_text("[" * 1_000_000),
    "a plan of numbers": lambda folder: plan(folder, lambda _: [1, 2]),
    "edges of numbers": lambda folder: plan(folder, lambda told: {**told, "edges": [1]}),
    "a plan that is a pipe": lambda folder: ((folder / "plan.json").unlink(), os.mkfifo(folder / "plan.json")),
    "a record of nothing": lambda folder: first_line(folder / "trace" / "lower.0.jsonl", lambda _: []),
    "a record of another kind": lambda folder: first_line(folder / "trace" / "lower.0.jsonl", lambda line: ["evil", *line[1:]]),
    "words for numbers": lambda folder: first_line(folder / "trace" / "lower.0.jsonl", lambda line: [line[0], *["x"] * (len(line) - 1)]),
    "a huge number": lambda folder: first_line(folder / "trace" / "lower.0.jsonl", lambda line: [line[0], 10**400, *line[2:]]),
    "a negative time": lambda folder: first_line(folder / "trace" / "lower.0.jsonl", lambda line: [*line[:4], -5, *line[5:]]),
    "no rows": lambda folder: first_line(folder / "trace" / "lower.0.jsonl", lambda line: [[] if isinstance(each, list) else each for each in line]),
    "a trace that is a pipe": lambda folder: os.mkfifo(folder / "trace" / "evil.jsonl"),
    "a head that steers": lambda folder: (folder / "trace" / "evil.jsonl").write_text(json.dumps({"actor": "\x1b[31mred"}) + "\n"),
    "a head of a list": lambda folder: (folder / "trace" / "evil.jsonl").write_text("[1]\n"),
    "clocks of words": lambda folder: (folder / "clocks.json").write_text('{"a": ["x"]}'),
    "counters of words": lambda folder: (folder / "run.json").write_text('{"counters": {"a": {"b": "\\u001b[31m"}}}'),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", HURT)
def test_a_hostile_run_folder_is_a_typed_error_case_72(how: str, made: Path, tmp_path: Path) -> None:
    """Raise a typed error for a hostile run folder in every form of `trace`.

    There is no traceback, no endless wait, and nothing that controls a terminal."""
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    HURT[how](folder)
    for more in (
        [],
        ["--why", "1"],
        ["--idle"],
        ["--json"],
        ["--perfetto", str(tmp_path / "out.json")],
        ["--diff", str(made)],
    ):
        done = invoke("trace", str(folder), *more)
        assert done.exit_code == 1
        assert isinstance(done.exception, TraceError), (more, done.exception)
        assert "\x1b" not in done.output


def test_a_step_that_waits_for_itself_case_72(made: Path, tmp_path: Path) -> None:
    """End the search for what a step waited for, even if its times are impossible."""
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    for file in (folder / "trace").glob("*.jsonl"):
        head, *lines = file.read_text().splitlines()
        told = [json.loads(line) for line in lines]
        for line in told:
            if line[0] == "done":
                line[6:9] = [1, 1, 1]  # received, started, finished: long before it was sent
        file.write_text("\n".join([head, *map(json.dumps, told)]) + "\n")
    read = summary.read(folder)
    assert read.done
    done = invoke("trace", str(folder), "--why", "1")
    assert done.exception is None or isinstance(done.exception, TraceError)


def test_names_that_steer_a_terminal_are_spelled_out_case_72(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escape control characters in an error message, a key of a graph file, and a model's text."""
    say("a\x1b[31mb\x07\u202ec\nd\te", error=True)
    assert capsys.readouterr().err == "a\\x1b[31mb\\x07\\x202ec\nd\te\n"
    assert printable("ordinary é 日本 🙂") == "ordinary é 日本 🙂"
    bad = tmp_path / "bad.yaml"
    bad.write_text('ranvier: 1\nname: x\nactors: {"\\e[31mred": {kind: model}}\n')
    monkeypatch.setattr(sys, "argv", ["ranvier", "check", str(bad)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "\x1b" not in capsys.readouterr().err


def test_a_recording_of_others_case_72(made: Path, tmp_path: Path) -> None:
    """Refuse a host file that is nested too deep, or that does not describe an actor."""
    for text in ("[" * 100_000, "[1]", "{}", "null"):
        (tmp_path / "host.json").write_text(text)
        with pytest.raises(RecordingError, match="no recording of an actor"):
            Recorded(tmp_path)
