"""Make and load the actor of a host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..checkpoint import known_checkpoint
from ..component.actor import Actor, Context
from ..component.devices import CPU, own_name, place, wait_for_memory
from ..component.kinds import make
from ..component.module import held, read_state
from ..protocol.host_spec import HostSpec


def load(spec: HostSpec, progress: Callable[[float], None], *, stays: bool = False) -> Actor:
    """Make the actor of a host, and load its weights.

    `stays`: its outputs may stay on its device, because other actors share the process. If nothing is traced, its steps then
    need not wait for the device.

    Raises:
        NoDevice: its GPU does not answer.
        Exception: whatever the actor or its files raised. The actor cannot be used then.
    """
    actor = make(spec.implementation, spec.folder)
    context = context_of(spec, progress)
    actor.stays = stays and context.device != CPU
    actor.ahead = actor.stays and not spec.trace
    if context.device != CPU:
        wait_for_memory(context.device, spec.device_bytes)
    place(actor, context.device)
    actor.load(context)
    if context.weights is not None:
        read_state(held(actor), context.weights, spec.actor)
    return actor


def context_of(spec: HostSpec, progress: Callable[[float], None]) -> Context:
    """Return what the actor may use while it loads."""
    return Context(
        name=spec.label,
        args=spec.args,
        progress=progress,
        checkpoint=known_checkpoint(Path(spec.model)) if spec.model is not None else None,
        dtype=spec.dtype,
        layers=spec.layers,
        cache_tokens=spec.cache_tokens,
        experts=spec.experts,
        weights=Path(spec.weights) if spec.weights is not None else None,
        replica=spec.replica,
        precision=spec.precision,
        fast=spec.fast,
        own_autograd=spec.own_autograd,
        device=own_name(spec.device),
    )
