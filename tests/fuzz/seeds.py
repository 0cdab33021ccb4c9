"""Write the first inputs of each corpus: valid ones, and ones that are wrong on purpose.

Run it with `python tests/fuzz/seeds.py`."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save

from ranvier.actors.component.session import SessionInfo
from ranvier.actors.protocol.control_protocol import Heartbeat, Link, Open, Scale, Stop
from ranvier.actors.protocol.control_protocol import encode as encode_control
from ranvier.transport.format.codec import parse
from ranvier.transport.format.header import Ack, Header, Row, TracedHeader, Verb, control
from ranvier.transport.format.message import Buffer
from ranvier.transport.format.tensors import encode, to_buffer
from ranvier.transport.wires import lending, packets
from ranvier.transport.wires.shared_memory import Lender

CORPUS = Path(__file__).parent / "corpus"
CASES = Path(__file__).parent.parent / "graph" / "cases"


def packet(header: bytes, *tensors: Buffer) -> bytes:
    [parts] = packets.packets_of((header, *tensors), 1 << 20)
    assert parts is not None
    return b"".join(parts)


def seeds() -> dict[str, list[bytes]]:
    """Return the first inputs of each target."""
    row, ack = Row(3, 2, 17, 2), Ack(1, 5, 12, 1 << 20)
    tensor = torch.linspace(-1, 1, 128).view(2, 64)
    messages = []
    for codec in ("raw", "bfloat16", "float16", "int8", "topk:0.1", "int8+lz4", "bfloat16+zstd"):
        if codec == "raw":
            meta, data = to_buffer("hidden", tensor)
        else:
            meta, data, _ = encode("hidden", tensor, parse(codec), look=False)
        messages.append((Header(1, 0, 4, 9, (row,), (meta,), 10, 20, 0, (ack,)).encode(), data))
    verbs = [
        control(1, Verb.HELLO, "hash", "a.x -> b.x", (("x", "float32[tokens]"),), "a.0.1", "b.0.1"),
        control(1, Verb.WELCOME, 8, 1 << 20), control(1, Verb.REFUSE, "no"), control(1, Verb.ACK, 3, 8, 1 << 20),
        control(1, Verb.AGAIN, 4), control(1, Verb.PROBE, 9), control(1, Verb.SPEED, 1 << 20, 5000),
    ]  # fmt: skip
    traced = TracedHeader(1, 0, 4, 9, (row,), (), 10, 20, 0, (ack,), (bytes(range(25)),))
    headers = [message[0] for message in messages] + [verb.encode() for verb in verbs] + [traced.encode()]
    lender = Lender()
    offer = lender.offer("peer.0.1")
    assert offer is not None
    own = [
        lending._encode(lending._Offer(offer[0])), lending._encode(lending._Answer(b"nonce")),
        lending._encode(lending._Returned([1, 2])), lending._encode(lending._Lent([(0, offer[0])])),
        lending._encode(lending._Dropped([7])),
    ]  # fmt: skip
    lender.close()
    said = [
        encode_control(Heartbeat(1, 0.5, 2, {"refused": 1})), encode_control(Open(SessionInfo(1, 2, 9, log=(3, 4)), sent_ns=5)),
        encode_control(Stop(sent_ns=6)), encode_control(Link("a.0.2", "ipc:///x", (), sent_ns=7)), encode_control(Scale("a", 2)),
    ]  # fmt: skip
    text = b"\x05\x00\x00\x00\x00\x00\x00\x00llama"
    gguf = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    gguf += struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8) + text
    gguf += struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 32, 2, 0, 0)
    gguf += bytes(-len(gguf) % 32) + bytes(256)
    return {
        "header": headers,
        "packet": [packet(*message) for message in messages] + [packet(b"x"), packet(b"x", b"1", b"2")],
        "own_frame": own,
        "control": said,
        "graph": [path.read_bytes() for path in sorted(CASES.glob("*.yaml")) if path.stat().st_size < 2000],
        "safetensors": [save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int64)}),
                        struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 1 << 62) + b"{}",
                        _safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}})],
        "gguf": [gguf, gguf[:40], gguf.replace(b"llama", b"gpt-2")],
    }  # fmt: skip


def _safetensors(entries: object) -> bytes:
    """Return a safetensors file with this header and 4 bytes of data."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


if __name__ == "__main__":
    for name, contents in seeds().items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, content in enumerate(contents):
            (folder / f"seed-{index:02}").write_bytes(content)
