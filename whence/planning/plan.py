"""What fitting and scoring will take, before anything is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from whence.cost import Choice
from whence.escapes import command
from whence.settings import Fit
from whence.show.markup import facts, framed, line, table
from whence.show.numbers import many, size

SURE = {"batches": (0.8, 1.3), "rates": (0.6, 1.7), "assumed": (0.3, 3.0), "elsewhere": (0.3, 3.0)}
"""How far the seconds may be off, as factors: with real batches, with this machine's rates, with those of a usual machine."""


@dataclass(frozen=True)
class Settings:
    """What a plan is for: settings of `fit`, and those of `score` that decide about time and memory."""

    fit: Fit = Fit()
    rank: int | None | Literal["auto"] = "auto"

    @property
    def batch_tokens(self) -> int | None:
        """Positions per batch, if the user says."""
        return self.fit.batch_tokens

    def changed(self, **values: Any) -> Settings:
        """The same with other values, of `fit` or the rank."""
        return Settings(rank=values.pop("rank", self.rank), fit=self.fit.changed(**values))

    def differences(self, other: Settings) -> dict[str, Any]:
        """What the other has that this has not, by name."""
        mine, theirs = self.flat(), other.flat()
        return {key: value for key, value in theirs.items() if mine[key] != value}

    def flat(self) -> dict[str, Any]:
        """All values by name."""
        return {**vars(self.fit), "rank": self.rank}


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage at its peak, without the model: what the engine holds, and what comes on top."""

    libraries: int
    tensors: int
    heap: int
    comes: int
    """Of the tensors, those that come and go with a batch."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.libraries + self.tensors + self.heap


@dataclass(frozen=True)
class Stage:
    """One stage: seconds, memory without the model, and the bytes of files that it leaves."""

    name: str
    seconds: float
    memory: Memory
    disk: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Memory, disk and time per stage. `str()` of it is the table, `to_dict()` is for programs."""

    model: dict[str, Any]
    data: dict[str, Any]
    coverage: str
    device: str
    settings: Settings
    stages: tuple[Stage, ...]
    disk_peak: int
    """Bytes of files on the way, with those that are deleted again."""
    sure: str
    """Where the seconds come from: "batches", "rates", "assumed", or "elsewhere" of a device that is not here."""
    free: dict[str, int]
    """Bytes of memory and of disk available, or allowed by the user; no "disk" where that of another machine is not known."""
    choices: dict[str, tuple[tuple[str, Choice], ...]] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that were changed so that it fits."""
    passing: float = 0.0
    """Seconds in which all queries go through one more operator on these modules, such as a transport."""
    factors: int = 0
    """Bytes of the factors in memory."""

    @property
    def resident(self) -> int:
        """Bytes that are there in every stage: the process and the model."""
        return self.model["process"] + self.model["bytes"]

    @property
    def memory(self) -> int:
        """Bytes at the highest peak, the model and the process included."""
        return self.resident + max(stage.memory.peak for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes of the files that are left."""
        return sum(stage.disk for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return has_room(self.free, self.memory, self.disk_peak)

    def with_changes(self, asked: Settings) -> Plan:
        """The same plan, noting what was changed unasked."""
        return dataclasses.replace(self, changes=asked.differences(self.settings))

    def range(self, seconds: float) -> tuple[float, float]:
        """Between what the seconds probably are."""
        low, high = SURE[self.sure]
        return seconds * low, seconds * high

    def to_dict(self) -> dict[str, Any]:
        """Plain values: seconds and bytes."""
        return {
            "model": self.model,
            "data": self.data,
            "coverage": self.coverage,
            "device": self.device,
            "settings": {key: _plain(value) for key, value in self.settings.flat().items()},
            "changes": {key: _plain(value) for key, value in self.changes.items()},
            "stages": [
                {
                    "name": stage.name,
                    "seconds": stage.seconds,
                    "seconds_range": self.range(stage.seconds),
                    "memory": self.resident + stage.memory.peak,
                    "memory_terms": {"resident": self.resident, **vars(stage.memory)},
                    "disk": stage.disk,
                    "note": stage.note,
                }
                for stage in self.stages
            ],
            "seconds": self.seconds,
            "seconds_range": self.range(self.seconds),
            "seconds_from": self.sure,
            "memory": self.memory,
            "disk": self.disk,
            "disk_peak": self.disk_peak,
            "free": self.free,
            "fits": self.fits,
            "hints": list(self.hints),
        }

    def __str__(self) -> str:
        table = [("stage", "time", "memory", "files", ""), *self.rows()]
        widths = [*(max(len(row[column]) for row in table) for column in range(4)), 0]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*self.heading(), *rows, *self.footing()])

    def __repr__(self) -> str:
        *_, total = self.rows()
        return f"Plan({self.model['name']}: {total[1]}, {total[2]} of memory, {total[3]} of files; {total[4]})"

    def _repr_html_(self) -> str:
        pairs = [(name, words.strip()) for name, _, words in (text.partition(" ") for text in self.heading())]
        stages = table(("stage", "time", "memory", "files", ""), self.rows(), right=(2, 3))
        return framed("", facts(pairs), stages, *(line(text, faint=True) for text in self.footing()))

    def heading(self) -> list[str]:
        """What is planned for."""
        model, data = self.model, self.data
        sampled = f" (lengths from a sample of {data['tokenised']:,})" if data["tokenised"] < data["rows"] else ""
        measured = f", eigenvalues from {data['measured']:,}" if data["measured"] else ""
        factors = f"factors from {many(data['fitted'], 'row')}{measured}; {many(data['queries'], 'query', 'queries')}"
        parameters = f"{model['parameters'] / 1e6:,.4g} M parameters, {model['format']}"
        return [
            f"model    {model['name']}  {model['kind']}, {parameters}, on {self.device}",
            f"data     {many(data['rows'], 'row')}, {many(data['tokens'], 'token')}{sampled}; {factors}",
            f"modules  {self.coverage}",
        ]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The table: stage, time with its range, peak memory, files, note; in the last row whether it fits."""
        found = []
        for stage in self.stages:
            written = size(stage.disk) if stage.disk else ""
            found.append((stage.name, duration(stage.seconds), size(self.resident + stage.memory.peak), written, stage.note))
        low, high = self.range(self.seconds)
        total = f"{duration(self.seconds)} ({duration(low)} to {duration(high)})"
        fits = "fits" if self.fits else "does NOT fit"
        verdict = f"{fits} in {room(self.free)}"
        return [*found, ("total", total, size(self.memory), size(self.disk), verdict)]

    def footing(self) -> list[str]:
        """What to know about the figures."""
        source = {
            "batches": "real batches of this model and this machine's rates",
            "rates": "this machine's measured rates",
            "assumed": "the rates of a usual machine (--calibrate measures this one's)",
            "elsewhere": "the rates of a usual GPU (none is here to measure)",
        }[self.sure]
        lines = [
            f"Time from {source}. Memory includes the model ({size(self.model['bytes'])}) and the process "
            f"({size(self.model['process'])}); on the way the files take {size(self.disk_peak)}."
        ]
        if short := [stage for stage, products in self.data["products"].items() if products == "bfloat16"]:
            checked = ", if a few rows' scores allow it" if self.settings.fit.precision.products == "auto" else ""
            lines.append(f"Matrix products of {' and '.join(short)} in bfloat16{checked}.")
        if self.changes:
            lines.append(f"To fit, changed: {options(self.changes)}")
        return [*lines, *(f"hint  {hint}" for hint in self.hints)]

    def why(self) -> list[str]:
        """How each kind of module is computed, and what the alternatives would cost (FLOPs per example)."""
        return [
            line
            for kind, choices in self.choices.items()
            for line in (kind, *(f"  {purpose:<12}{choice}" for purpose, choice in choices))
        ]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def has_room(free: Mapping[str, int], memory: int, disk: int) -> bool:
    """Whether so much fits in what is free."""
    return memory <= free["memory"] and disk <= free.get("disk", disk)


def room(free: Mapping[str, int]) -> str:
    """What is free, in words."""
    return " and ".join(f"{size(most)} of {kind}" for kind, most in free.items())


def options(values: dict[str, Any]) -> str:
    """Settings as on the command line."""
    return " ".join(command(f"--{key.replace('_', '-')}", value) for key, value in values.items())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(entry) for key, entry in vars(value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value
