"""`whence.lock`: what every stage of a run was made from, and which files came of it.

Nothing here needs torch, so that a run where nothing changed is over at once.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whence.store.digest import canonical_json, digest
from whence.store.files import write_json
from whence.store.intact import RUN_LOCK, Listed, file_digest, read_json, reading


@dataclass(frozen=True)
class Record:
    """One stage: what it was made from, and, once it is finished, its files with their bytes and digests."""

    made_from: dict[str, Any]
    files: dict[str, int] | None = None
    seconds: float = 0.0
    digests: dict[str, str] | None = None
    """None in locks that were written before digests were kept."""

    @classmethod
    def of(cls, made_from: dict[str, Any], folder: Path, places: Iterable[str], seconds: float = 0.0) -> Record:
        """The record of a stage that is finished, whose files are below these places of the run."""
        below = (file for place in places for file in sorted((folder / place).rglob("*")) if file.is_file())
        names = [
            file.relative_to(folder).as_posix() for file in below if not file.name.startswith(".") and file.suffix != ".tmp"
        ]
        sizes = {name: (folder / name).stat().st_size for name in names}
        return cls(made_from, sizes, seconds, {name: file_digest(folder / name) for name in names})

    @property
    def identity(self) -> str:
        """Hash of what it was made from."""
        return digest(canonical_json(self.made_from))

    def faults(self, folder: Path) -> list[str]:
        """What is wrong with the files of a finished stage, a line each."""
        digests = self.digests or {}
        listed = {name: Listed(size, (digests[name],) if name in digests else ()) for name, size in (self.files or {}).items()}
        return [f"{name} {fault}" for name, file in listed.items() if (fault := file.fault(folder / name))]


@dataclass
class Lock:
    """The records of a run's stages, and hashes of files by their size and time of change, so that big ones are read once."""

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)
    hashes: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Files that no stage makes, with their bytes: the settings of the run."""
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Lock:
        """Read the lock of a run's folder; an empty one where there is none. Raises StaleArtifact for a damaged one."""
        path = folder / RUN_LOCK
        if not path.exists():
            return cls(folder)
        found = read_json(path)
        with reading(path):
            records = {name: Record(**record) for name, record in found["stages"].items()}
            hashes = {name: tuple(entry) for name, entry in found["hashes"].items()}
            return cls(folder, records, hashes, found.get("files", {}), found.get("digests", {}))

    def write(self) -> None:
        """Write the lock, whole or not at all."""
        stages = {name: asdict(record) for name, record in self.records.items()}
        content = {"stages": stages, "hashes": self.hashes, "files": self.files, "digests": self.digests}
        write_json(self.folder / RUN_LOCK, content, indent=1)

    def keep(self, name: str) -> None:
        """List a file that no stage makes."""
        path = self.folder / name
        self.files[name], self.digests[name] = path.stat().st_size, file_digest(path)

    def lists(self, name: str) -> bool:
        """Whether the file is listed and what was written."""
        return name in self.digests and not Listed(self.files[name], (self.digests[name],)).fault(self.folder / name)

    def hash_of(self, name: str) -> str:
        """Hash the contents of a file or folder; what is not a path here, such as a name on the hub, stands for itself."""
        path = Path(name)
        if not path.exists():
            files = [Path(file) for file in sorted(glob.glob(name, recursive=True))] if glob.has_magic(name) else []
            return digest(*(part for file in files for part in (file.name, self._file(file)))) if files else name
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
