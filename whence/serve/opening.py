"""Which run is served, in words that another process can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from whence.errors import UsageError
from whence.opened import is_settings, remembered
from whence.store.intact import MANIFEST

if TYPE_CHECKING:
    from whence.run import Run


@dataclass(frozen=True)
class Opening:
    """A model with its data, the folder of a run, or a `whence.yaml`; `settings` are further ones of `whence.open`."""

    model: str
    data: str | None = None
    out: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: str, data: str | None = None, out: str | None = None, settings: Mapping[str, Any] | None = None) -> Self:
        """The same, where a folder may itself say how its run was opened (`whence.opened`)."""
        known = remembered(run) if not data else None
        if known is None:
            return cls(run, data, out, settings or {})
        return cls(known.pop("model"), known.pop("data", None), out or run, {**known, **(settings or {})})

    def open(self) -> Run:
        """The run, with the factors that it has."""
        import whence

        given: dict[str, Any] = {"data": self.data, "out": self.out, **self.settings}
        run = whence.open(self.model, **given)
        if run.out is None:
            raise UsageError("To be served, a run needs a folder.", fix="--out FOLDER")
        factors = run.out / "factors"
        if (factors / MANIFEST).is_file() and not run.resolved:
            return whence.open(self.model, **{"factors": factors, **given})
        return run

    @property
    def name(self) -> str:
        """What pages call it."""
        return Path(self.out or self.model).name

    @property
    def file(self) -> Path | None:
        """The `whence.yaml`, if it is one."""
        return Path(self.model) if is_settings(self.model) else None

    @property
    def words(self) -> list[str]:
        """How the commands of the terminal are told the same."""
        return [self.model, *(["--data", self.data] if self.data else [])]
