"""Describe the tables of a trace for SQL, and questions with names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ranvier.actors.protocol.host_spec import GATEWAY

from .summary import PARTS


class Table(NamedTuple):
    """Describe a table: what one row is, and its columns with type and meaning."""

    about: str
    columns: Mapping[str, tuple[str, str]]


TEXT, WHOLE, REAL = "TEXT", "INTEGER", "REAL"
_EDGE = {"edge": (TEXT, "name of the edge")}
_ENDS = {"source": (TEXT, "sender, actor.replica"), "target": (TEXT, "receiver, actor.replica")}
_AT = "milliseconds since the first record"
TABLES: dict[str, Table] = {
    "messages": Table(
        "a message",
        {
            "id": (WHOLE, "number of the message"),
            **_EDGE,
            **_ENDS,
            "wire": (TEXT, "kind of wire"),
            "sequence": (WHOLE, "number on its link"),
            "session": (WHOLE, "session of its first row"),
            "rows": (WHOLE, "rows"),
            "tokens": (WHOLE, "tokens"),
            "bytes": (WHOLE, "bytes on the wire"),
            "bytes_before": (WHOLE, "bytes before the codec"),
            "codec": (TEXT, "codec"),
            "ready_ms": (REAL, f"when the actor had it, {_AT}"),
            "sent_ms": (REAL, f"when the wire got it, {_AT}"),
            "received_ms": (REAL, f"when it was received, {_AT}"),
            "started_ms": (REAL, f"when its step began, {_AT}"),
            "finished_ms": (REAL, f"when its step ended, {_AT}"),
            "batch": (WHOLE, "messages in its step; 0: it went into none"),
            **{f"{part}_us": (REAL, f"microseconds: {part}") for part in PARTS},
            "total_us": (REAL, "microseconds: all of them"),
        },
    ),
    "rows": Table(
        "a session's share of a message",
        {
            "message": (WHOLE, "id of the message"),
            **_EDGE,
            "session": (WHOLE, "session"),
            "epoch": (WHOLE, "epoch"),
            "position": (WHOLE, "first position"),
            "tokens": (WHOLE, "tokens"),
        },
    ),
    "steps": Table(
        "a step of an actor",
        {
            "actor": (TEXT, "actor.replica"),
            "started_ms": (REAL, _AT),
            "finished_ms": (REAL, _AT),
            "compute_us": (REAL, "microseconds"),
            "idle_us": (REAL, "microseconds since the step before"),
            "messages": (WHOLE, "messages that it took"),
            "rows": (WHOLE, "rows"),
            "tokens": (WHOLE, "tokens"),
        },
    ),
    "sessions": Table(
        "a session",
        {
            "session": (WHOLE, "session"),
            "epochs": (WHOLE, "epochs: more than 1 after a recovery"),
            "started_ms": (REAL, f"its first message, {_AT}"),
            "finished_ms": (REAL, f"its last answer, {_AT}"),
            "ms": (REAL, "milliseconds in all"),
            "first_token_ms": (REAL, "milliseconds to the first answer"),
            "answers": (WHOLE, "answers that came back"),
            "tokens_per_second": (REAL, "answers per second after the first"),
        },
    ),
    "edges": Table(
        "an edge of the plan",
        {
            "number": (WHOLE, "number of the edge"),
            **_EDGE,
            "wire": (TEXT, "kind of wire"),
            "feedback": (WHOLE, "1 if it goes back"),
            "credits": (WHOLE, "messages that may be on their way"),
            "messages": (WHOLE, "messages"),
            "bytes": (WHOLE, "bytes"),
        },
    ),
    "waits": Table(
        "a message that waited for credit",
        {
            **_EDGE,
            **_ENDS,
            "ready_ms": (REAL, _AT),
            "us": (REAL, "microseconds"),
            "sent": (WHOLE, "0 if it was never sent"),
        },
    ),
    "taps": Table(
        "what a tap saw of a message",
        {
            **_EDGE,
            "actor": (TEXT, "actor.replica"),
            "at_ms": (REAL, _AT),
            "norm": (REAL, "Euclidean norm"),
            "mean": (REAL, "mean"),
            "largest": (REAL, "largest magnitude"),
            "not_finite": (REAL, "share of NaN and infinity"),
            "session": (WHOLE, "session"),
            "position": (WHOLE, "position"),
        },
    ),
    "control": Table(
        "a control message of a link, at one end",
        {
            **_EDGE,
            "actor": (TEXT, "actor.replica"),
            "peer": (TEXT, "the other end"),
            "verb": (TEXT, "what it says"),
            "at_ms": (REAL, _AT),
            "sent": (WHOLE, "1 at the sending end"),
        },
    ),
    "commands": Table(
        "a command of the supervisor",
        {
            "actor": (TEXT, "actor.replica"),
            "verb": (TEXT, "the command"),
            "session": (WHOLE, "session, or 0"),
            "epoch": (WHOLE, "epoch, or 0"),
            "sent_ms": (REAL, _AT),
            "wire_us": (REAL, "microseconds to the host"),
            "queue_us": (REAL, "microseconds until it was obeyed"),
            "obey_us": (REAL, "microseconds that it took"),
        },
    ),
}
RECIPES: dict[str, tuple[str, str]] = {
    "slowest-edges": (
        "edges by the time that their messages took",
        """SELECT edge, count(*) AS messages, round(avg(total_us)) AS mean_us, round(max(total_us)) AS most_us
           FROM messages GROUP BY edge ORDER BY sum(total_us) DESC""",
    ),
    "busy": (
        "the share of time in which each actor computes",
        """SELECT actor, count(*) AS steps, round(sum(compute_us) / 1000 / (max(finished_ms) - min(started_ms)), 3) AS busy,
                  round(avg(tokens), 1) AS tokens_a_step
           FROM steps GROUP BY actor ORDER BY busy DESC""",
    ),
    "slowest-sessions": ("the sessions that took longest", "SELECT * FROM sessions ORDER BY ms DESC LIMIT 10"),
    "gaps": (
        "the longest gaps between two tokens of a session",
        f"""SELECT session, position, round(received_ms - before_ms, 2) AS gap_ms
            FROM (SELECT rows.session, rows.position, received_ms,
                         lag(received_ms) OVER (PARTITION BY rows.session ORDER BY received_ms) AS before_ms
                  FROM rows JOIN messages ON id = message
                  WHERE target LIKE '{GATEWAY}.%' AND messages.edge LIKE '%.sampled -> %')
            WHERE before_ms IS NOT NULL ORDER BY gap_ms DESC LIMIT 10""",
    ),
    "batches": (
        "how many tokens the steps of each actor take",
        f"""SELECT actor, tokens, count(*) AS steps, round(avg(compute_us)) AS mean_us
            FROM steps WHERE actor NOT LIKE '{GATEWAY}.%' GROUP BY actor, tokens ORDER BY actor, tokens""",
    ),
    "back-pressure": (
        "who waited for whose credit",
        """SELECT source, target, count(*) AS messages, round(sum(us) / 1000, 1) AS ms, sum(1 - sent) AS never_sent
           FROM waits GROUP BY source, target ORDER BY ms DESC""",
    ),
    "bytes": (
        "what went over each edge, and what its codec saved",
        """SELECT edge, wire, count(*) AS messages, sum(bytes) AS bytes,
                  round(1.0 * sum(bytes_before) / max(1, sum(bytes)), 2) AS ratio
           FROM messages GROUP BY edge ORDER BY bytes DESC""",
    ),
    "prompts": (
        "what a token of a prompt costs each actor",
        f"""SELECT actor, count(*) AS steps, sum(tokens) AS tokens, round(sum(compute_us) / sum(tokens), 1) AS us_a_token
            FROM steps WHERE tokens > rows AND actor NOT LIKE '{GATEWAY}.%' GROUP BY actor""",
    ),
    "recoveries": ("sessions that began again", "SELECT * FROM sessions WHERE epochs > 1 ORDER BY started_ms"),
    "not-finite": (
        "where NaN or infinity was first seen",
        "SELECT * FROM taps WHERE not_finite > 0 ORDER BY at_ms LIMIT 10",
    ),
}
"""Questions with names: what each finds, and its SQL."""
