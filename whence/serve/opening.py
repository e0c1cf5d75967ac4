"""Which run is served, in words that another process can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.errors import UsageError
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

    def open(self) -> Run:
        """The run, with the factors that it has."""
        import whence
        from whence.run import Run

        if self.file is not None:
            from whence.config import read_config

            return Run.of(read_config(self.file))
        given = {"data": self.data, "out": self.out, **self.settings}
        run = whence.open(self.model, **given)
        if run.out is None:
            raise UsageError("To be served, a run needs a folder.", fix="--out FOLDER")
        factors = run.out / "factors"
        return whence.open(self.model, **given, factors=factors) if (factors / MANIFEST).is_file() and not run.resolved else run

    @property
    def file(self) -> Path | None:
        """The `whence.yaml`, if it is one."""
        path = Path(self.model)
        return path if path.suffix in (".yaml", ".yml") and path.is_file() else None

    @property
    def words(self) -> list[str]:
        """How the commands of the terminal are told the same."""
        return [self.model, *(["--data", self.data] if self.data else [])]
