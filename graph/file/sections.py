"""Define what all sections of a graph file share: names, ports, and the refusal of unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}$")]
Port = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}\.[a-z][a-z0-9_]{0,60}$")]


class Section(BaseModel):
    """Refuse unknown keys, and convert no value silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
