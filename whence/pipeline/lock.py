"""`whence.lock`: what every stage of a run was made from, and which files came of it.

Nothing here needs torch, so that a run where nothing changed is over at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whence.store.digest import canonical_json, digest

NAME = "whence.lock"


@dataclass(frozen=True)
class Record:
    """One stage: what it was made from, and, once it is finished, its files with their bytes."""

    made_from: dict[str, Any]
    files: dict[str, int] | None = None
    seconds: float = 0.0

    @property
    def identity(self) -> str:
        """Hash of what it was made from."""
        return digest(canonical_json(self.made_from))

    def whole(self, folder: Path) -> bool:
        """Whether the stage was finished and all its files are there."""
        if self.files is None:
            return False
        return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in self.files.items())


@dataclass
class Lock:
    """The records of a run's stages, and hashes of files by their size and time of change, so that big ones are read once."""

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)
    hashes: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Lock:
        """Read the lock of a run's folder; an empty one where there is none."""
        path = folder / NAME
        if not path.exists():
            return cls(folder)
        found = json.loads(path.read_text(encoding="utf-8"))
        records = {name: Record(**record) for name, record in found["stages"].items()}
        return cls(folder, records, {name: tuple(entry) for name, entry in found["hashes"].items()})

    def write(self) -> None:
        """Write the lock, whole or not at all."""
        from whence.store.manifest import atomic

        content = {"stages": {name: asdict(record) for name, record in self.records.items()}, "hashes": self.hashes}
        with atomic(self.folder / NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def hash_of(self, name: str) -> str:
        """Hash the contents of a file or folder; what is no path here, such as a name of the hub, stands for itself."""
        path = Path(name)
        if not path.exists():
            return name
        if path.is_file():
            return self._file(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return digest(*(part for file in files for part in (file.relative_to(path).as_posix(), self._file(file))))

    def hashes_of(self, names: Iterable[str]) -> dict[str, str]:
        """The hashes of files and folders, by the last part of their names: it does not matter where they lie."""
        found: dict[str, str] = {}
        for name in dict.fromkeys(names):
            short = Path(name).name
            found[short if short not in found else f"{short} ({len(found)})"] = self.hash_of(name)
        return found

    def _file(self, path: Path) -> str:
        state, name = path.stat(), str(path.resolve())
        known = self.hashes.get(name)
        if known is None or known[:2] != (state.st_size, state.st_mtime_ns):
            with path.open("rb") as file:
                known = (state.st_size, state.st_mtime_ns, hashlib.file_digest(file, "blake2b").hexdigest()[:16])
            self.hashes[name] = known
        return known[2]


def files_below(folder: Path, places: Iterable[str]) -> dict[str, int]:
    """All files of a stage with their bytes."""
    found = (
        file
        for place in places
        for file in sorted((folder / place).rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".tmp"
    )
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in found}


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs, one dotted name a line: `settings.damping 0.1 -> 0.2`."""
    lines = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += changes(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name} {_short(before)} -> {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = "nothing" if value is None else canonical_json(value).strip('"')
    return text if len(text) <= 40 else f"{text[:30]}... ({digest(text)[:6]})"
