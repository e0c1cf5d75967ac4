"""What the page asks for, as the server reads it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from whence.store.digest import fingerprint_settings

Text = Annotated[str, Field(max_length=200_000)]
Name = Annotated[str, Field(max_length=1000)]
Key = Annotated[str, Field(max_length=300)]
Top = Annotated[int, Field(ge=1, le=200)]
Where = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=20)]


class Body(BaseModel):
    """The body of a request, without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class Complete(Body):
    """A prompt, and what to say of it."""

    prompt: Text
    completion: Text | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] = 64


class Question(Body):
    """What is asked about which answer."""

    prompt: Text = ""
    completion: Text | None = None
    span: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    """First, and one past the last character of the completion."""
    contrast: Text | None = None
    row: Name | None = None
    """A training row that is asked about instead of a prompt."""
    method: Name = "auto"
    measurement: Literal["logprob", "margin", "loss"] = "logprob"
    damping: Annotated[float, Field(ge=0, le=1e9)] = 0.1
    top: Top = 20
    where: Where = []
    """Conditions on the rows that are shown, as `whence.filter.where` reads them."""

    @property
    def key(self) -> str:
        """What the question is called; which rows are shown, and how many, does not matter."""
        return fingerprint_settings(self.model_dump(exclude={"top", "where"}))[:12]


class Pair(Body):
    """A row of an answer."""

    key: Key
    row: Name


class Map(Body):
    """Rows of an answer; those that raise it most where none are named."""

    key: Key
    rows: Annotated[list[Name], Field(min_length=1, max_length=200)] | None = None


class Cell(Body):
    """A cell of the map of layers and modules, by which rows are put in order."""

    key: Key
    layer: Name
    module: Name
    top: Top = 20
    where: Where = []


class WhatIf(Body):
    """Another text, instead of a row or besides all."""

    key: Key
    row: Name | None = None
    text: Text | None = None
    prompt: Text | None = None
    completion: Text | None = None


class Compare(Body):
    """Two answers."""

    a: Key
    b: Key
    top: Top = 20


class PinnedRow(Body):
    """A row that somebody wants to find again."""

    id: Name
    note: Text = ""


class Pin(Body):
    """What is kept beside a question."""

    pinned: bool = True
    note: Text = ""
    rows: Annotated[list[PinnedRow], Field(max_length=1000)] = []


class Decision(Body):
    """A person's verdict on a row."""

    id: Name
    verdict: Literal["drop", "keep", "fix", "unsure"]
    why: Text = ""
    who: Name = ""


class Export(Body):
    """What goes into a file."""

    keys: Annotated[list[Key], Field(min_length=1, max_length=50)]
    pairs: Annotated[list[Pair], Field(max_length=500)] = []
    redact: bool = False
    title: Name | None = None


class Demo(Body):
    """What the demo of the TinyStories project took."""

    prompt: Text
    completion: Text | None = None
    top: Top = 10


class NewJob(Body):
    """Work that takes longer than a question."""

    kind: Literal["fit", "index", "self", "score", "validate", "run"]
    settings: dict[str, Any] = {}
    stages: list[Name] = []
