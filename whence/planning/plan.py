"""What fitting and scoring will take, before anything is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from whence.cost import Choice
from whence.fitting.fit import FitSettings
from whence.planning.memory import Memory

SURE = {"batches": (0.8, 1.3), "rates": (0.6, 1.7), "assumed": (0.3, 3.0)}
"""How far the seconds may be off, as factors: with real batches, with this machine's rates, with those of a usual machine."""


@dataclass(frozen=True)
class Settings:
    """What a plan is for: settings of `fit`, and those of `score` that decide about time and memory."""

    fit: FitSettings = FitSettings()
    batch_tokens: int | None = None
    rank: int | None | Literal["auto"] = "auto"

    def changed(self, **values: Any) -> Settings:
        """The same with other values, of `fit` or of its own."""
        own = {field.name for field in dataclasses.fields(self)} - {"fit"}
        fit = dataclasses.replace(self.fit, **{key: value for key, value in values.items() if key not in own})
        return dataclasses.replace(self, fit=fit, **{key: value for key, value in values.items() if key in own})

    def differences(self, other: Settings) -> dict[str, Any]:
        """What the other has that this has not, by name."""
        mine, theirs = self.flat(), other.flat()
        return {key: value for key, value in theirs.items() if mine[key] != value}

    def flat(self) -> dict[str, Any]:
        """All values by name."""
        return {**vars(self.fit), "batch_tokens": self.batch_tokens, "rank": self.rank}


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
    """Where the seconds come from: "batches", "rates" or "assumed"."""
    free: dict[str, int]
    """Bytes of memory and of disk that there are, or that the user allows."""
    choices: dict[str, tuple[tuple[str, Choice], ...]] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that were changed so that it fits."""

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
        return self.memory <= self.free["memory"] and self.disk_peak <= self.free["disk"]

    def with_changes(self, asked: Settings) -> Plan:
        """The same plan, which says what it has that was not asked for."""
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
        from whence.planning.show import lines

        return "\n".join(lines(self))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(entry) for key, entry in vars(value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value
