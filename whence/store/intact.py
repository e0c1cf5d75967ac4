"""Whether files are still what was written: their BLAKE3 digests, in the records that lie beside them.

| record | lists |
|---|---|
| `manifest.json` | the files of a finished folder |
| `.digests` | those of an unfinished one, a line for each before it appears, as `b3sum` prints it |
| `checkpoint.json` | the files of a checkpoint |
| `whence.lock` | the files of the finished stages of a run |

A JSON document that no record lists, such as a record, holds the digest of its own content. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from whence.errors import StaleArtifact, UsageError, WhenceError
from whence.store.digest import canonical_json

CONFIG, MANIFEST, JOURNAL, SEAL, RUN_LOCK, LOCK = (
    "config.json",
    "manifest.json",
    ".digests",
    "checkpoint.json",
    "whence.lock",
    ".lock",
)
RECORDS = (MANIFEST, JOURNAL, SEAL, RUN_LOCK)
OPENED = "opened.json"
"""How a run was opened (`whence.opened`), with the digest of its own content."""

ITS_OWN = {SEAL: {"files", "step", "learning_rate"}, RUN_LOCK: {"stages", "hashes"}}
"""What tells these from files of others that have the same name."""

OWN = "blake3"
"""Where a JSON document has the digest of its own content."""

FORMAT = 2
"""Of folders that are written; those of format 1 have no digests."""

CHUNK = 16 * 2**20
"""Bytes of a file that are hashed at a time; files with more of them by several threads."""

SHOWN = 5
"""Damaged files that a message lists."""

LINE = re.compile(r"([0-9a-f]{64})  (.+)\n")


@dataclass(frozen=True)
class Listed:
    """What a record says of a file."""

    size: int | None
    digests: tuple[str, ...]
    """Any of them is right: of a file that is written again the old one stays until the new one is there. None: not known."""

    def fault(self, path: Path, digest_of: Callable[[Path], str] | None = None) -> str:
        """What is wrong with the file, in words; nothing where it is what was written, as far as that is known."""
        if not path.is_file():
            return "is missing"
        if self.size is not None and (found := path.stat().st_size) != self.size:
            return f"has {found:,} bytes instead of {self.size:,}"
        return (
            "has changed since it was written" if self.digests and (digest_of or file_digest)(path) not in self.digests else ""
        )


@dataclass(frozen=True)
class Checked:
    """A record, and what became of the files that it lists."""

    record: Path
    files: Mapping[str, Listed]
    size: int
    """Bytes of the files that are there."""
    faults: dict[str, str]
    """What is wrong, by the name of the file."""


@dataclass(frozen=True)
class Verified:
    """All records of a folder, compared with its files."""

    folder: Path
    records: list[Checked]

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong with any file, by its name below the folder."""
        found = {each.record.parent / name: fault for each in self.records for name, fault in each.faults.items()}
        return {os.path.relpath(path, self.folder): fault for path, fault in found.items()}

    @property
    def files(self) -> dict[Path, bool]:
        """The files that records list, and whether there is a digest: none of what was written before digests were kept."""
        found: dict[Path, bool] = {}
        for each in self.records:
            for name, listed in each.files.items():
                path = each.record.parent / name
                found[path] = bool(listed.digests) or found.get(path, False)
        return found

    @property
    def unlisted(self) -> list[Path]:
        """Files below the folder that no record lists."""
        listed = self.files.keys()
        found = sorted(file for file in self.folder.rglob("*") if file.is_file() and file.name not in (*RECORDS, LOCK))
        return [file for file in found if file not in listed]


def file_digest(path: Path) -> str:
    """BLAKE3 of a file, in 64 hex digits."""
    with path.open("rb") as file:
        large = os.fstat(file.fileno()).st_size > CHUNK
        state = blake3(max_threads=blake3.AUTO if large else 1)
        while content := file.read(CHUNK):
            state.update(content)
    return state.hexdigest()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the digest of its content."""
    return {**document, OWN: _content_digest(document)}


def _content_digest(document: Mapping[str, Any]) -> str:
    return blake3(canonical_json(document).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file that whence wrote, without the digest of its own content where it has one.

    Raises StaleArtifact where it is damaged.
    """
    with reading(path):
        document = json.loads(path.read_text(encoding="utf-8"))
        return unsealed(document, path)


def unsealed(document: Any, path: Path) -> Any:
    """A document without the digest of its content; raises StaleArtifact where the content differs."""
    if not isinstance(document, dict) or OWN not in document:
        return document
    content = {key: value for key, value in document.items() if key != OWN}
    if document[OWN] != _content_digest(content):
        edited = "" if path.name in RECORDS else f'; if you changed it yourself, remove its "{OWN}"'
        raise damaged(path, "its content has changed since it was written", edited)
    return content


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Raise StaleArtifact with the name of the file where what is read is damaged: libraries raise dozens of types for that."""
    try:
        yield path
    except (WhenceError, MemoryError):
        raise
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise damaged(path, f"{type(error).__name__}: {reason[:200]}") from error


def damaged(path: Path, reason: str, also: str = "") -> StaleArtifact:
    """The error of a damaged file."""
    return StaleArtifact(f"{path} is damaged.", given=reason, fix=_mend(path) + also)


def _mend(path: Path) -> str:
    """How to get a file back."""
    ours = (place for place in path.parents if (place / JOURNAL).exists() or is_run_folder(place))
    folder = path.parent if path.name in RECORDS else next(ours, path.parent)
    remove, aside = f"rm {shlex.quote(str(path))}", f"mv {shlex.quote(str(folder))} {shlex.quote(f'{folder}.damaged')}"
    if path.name == RUN_LOCK:
        return f"{remove}, then the same whence run again: finished stages are recognised"
    if (path.parent / SEAL).exists():
        return f"restore it from a copy, or mv {shlex.quote(str(path.parent))} {shlex.quote(f'{path.parent}.damaged')}"
    if (folder / JOURNAL).exists() and path.name != CONFIG and not (folder / MANIFEST).exists():
        return f"{remove}, then the same command again: this file is made again, the rest is kept"
    return f"restore it from a copy, or {aside} and make it again; to check the rest: whence verify {shlex.quote(str(folder))}"


def listing(record: Path) -> dict[str, Listed]:
    """What a record says, by the names of files below its folder; raises StaleArtifact where it is damaged itself.

    Empty for files that have the name of a record and are not one.
    """
    if record.name == JOURNAL:
        return _journal(record)
    if record.name == MANIFEST and not is_run_folder(record.parent):
        return {}
    if record.name == MANIFEST:
        read_config(record.parent)
    found = read_json(record)
    if record.name != MANIFEST and not (isinstance(found, dict) and found.keys() >= ITS_OWN[record.name]):
        return {}
    with reading(record):
        if record.name == RUN_LOCK:
            parts = [stage for stage in found["stages"].values() if stage["files"] is not None]
            parts.append({"files": found.get("files", {}), "digests": found.get("digests", {})})
        else:
            parts = [found]
        return {
            name: Listed(size, tuple([each] if (each := (part.get("digests") or {}).get(name)) else []))
            for part in parts
            for name, size in part["files"].items()
        }


def _journal(record: Path) -> dict[str, Listed]:
    """Lines that a kill cut short say nothing: the file that they were to be of did not appear."""
    found: dict[str, Listed] = {}
    with reading(record):
        for line in record.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if parts := LINE.fullmatch(line):
                digest, name = parts.groups()
                before = found[name].digests if name in found else ()
                found[name] = Listed(None, tuple(dict.fromkeys([*before, digest])))
    return found


def note_digest(folder: Path, name: str, digest: str) -> None:
    """Add a file to the record of an unfinished folder, before it appears there."""
    record = folder / JOURNAL
    with record.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(("\n" * torn + f"{digest}  {name}\n").encode())
        file.flush()
        os.fsync(file.fileno())


def is_run_folder(path: Path) -> bool:
    """Whether whence made the folder, finished or not, whole or damaged; a model's folder has a `config.json` too."""
    config = path / CONFIG
    if not config.is_file():
        return False
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return (path / LOCK).exists()
    return isinstance(content, dict) and ("whence" in content or content.keys() >= {"versions", "provenance"})


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder of ours; raises StaleArtifact where it is damaged, or of an unknown format."""
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or not {"whence", "versions", "provenance"} <= config.keys():
        raise damaged(path, "it does not say what the folder was made from")
    if config["whence"] not in range(1, FORMAT + 1):
        raise StaleArtifact(
            f"{folder} has a format that this version of whence does not know.",
            given=f'"whence": {json.dumps(config["whence"])} in {path}',
            accepted=f"1 to {FORMAT}",
            fix="pip install --upgrade whence, where a newer version made it; else restore the file from a copy",
        )
    return config


def refuse_loop(path: Path) -> None:
    """Raise UsageError where the path, or a folder above it, is a link that leads nowhere."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise UsageError(
                f"{place} is a dangling or circular link.",
                given=f"-> {os.readlink(place)}",
                accepted="a file or folder, or a link to one",
            )


def intact(path: Path) -> Path:
    """The path of a file or folder, once it is found to be what the nearest record that lists it says.

    Raises StaleArtifact where it is not. What no record lists is taken as it is.
    """
    if (found := _nearest(path)) is not None:
        record, files = found
        refuse_faults(record.parent, {name: file.fault(record.parent / name) for name, file in files.items()})
    return path


def _nearest(path: Path) -> tuple[Path, dict[str, Listed]] | None:
    """The nearest record, in the folder or above, that lists the file or files below the folder, and what it says of them."""
    if not path.exists():
        return None
    for place in dict.fromkeys([path.absolute(), path.resolve()]):
        for folder in [*([place] if place.is_dir() else []), *place.parents]:
            below = place.relative_to(folder).as_posix()
            for record in (folder / name for name in RECORDS):
                files = listing(record) if record.is_file() else {}
                if meant := {n: file for n, file in files.items() if below in (".", n) or n.startswith(f"{below}/")}:
                    return record, meant
    return None


def refuse_faults(folder: Path, faults: Mapping[str, str]) -> None:
    """Raise StaleArtifact where anything is wrong with files of a folder."""
    found = {name: fault for name, fault in faults.items() if fault}
    if not found:
        return
    if len(found) == 1:
        ((name, fault),) = found.items()
        raise damaged(folder / name, f"it {fault}")
    lines = [f"{name} {fault}" for name, fault in found.items()]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"]
    first = folder / next(iter(found))
    raise StaleArtifact(f"{len(found)} files of {folder} are damaged.", given=("\n" + " " * 11).join(lines), fix=_mend(first))


def check(record: Path, digest_of: Callable[[Path], str] = file_digest, files: Mapping[str, Listed] | None = None) -> Checked:
    """Compare all files that a record lists, or these; `digest_of` may remember digests, for what several records list.

    Of a folder that is not finished, files that are not there were dropped, or have not appeared yet.
    """
    files = listing(record) if files is None else files
    paths = {name: record.parent / name for name in files}
    faults = {
        name: fault
        for name, listed in files.items()
        if (record.name != JOURNAL or paths[name].exists()) and (fault := listed.fault(paths[name], digest_of))
    }
    return Checked(record, files, sum(path.stat().st_size for path in paths.values() if path.is_file()), faults)


def _of_itself(file: Path) -> Checked:
    """A document compared with its own digest."""
    faults = {}
    try:
        read_json(file)
    except StaleArtifact as error:
        faults[file.name] = f"is damaged: {error.given}"
    return Checked(file, {file.name: Listed(None, (OWN,))}, file.stat().st_size, faults)


def verified(folder: Path) -> Verified:
    """Compare every file of a folder with the records in it; where there are none, with the nearest that lists its files.

    A record that is damaged itself counts as a fault. Raises UsageError where there is nothing to compare with.
    """
    if not folder.is_dir():
        raise UsageError(
            f"There is no folder {folder}.", accepted="a run, or a folder of factors, scores, an index or a training"
        )
    digest_of, records = functools.cache(file_digest), list[Checked]()
    for record in sorted(file for name in RECORDS for file in folder.rglob(name) if file.is_file()):
        if record.parent.suffix == ".tmp":  # being deleted
            continue
        read = record
        try:
            if record.name == MANIFEST and is_run_folder(record.parent):
                read = record.with_name(CONFIG)
                read_config(record.parent)
            read = record
            records.append(check(record, digest_of))
        except StaleArtifact as error:
            records.append(Checked(record, {}, 0, {read.name: f"is damaged: {error.given}"}))
    records = [each for each in records if each.files or each.faults]
    records += [_of_itself(file) for file in sorted(folder.rglob(OPENED)) if file.is_file()]
    if not records and (above := _nearest(folder)) is not None:
        records = [check(above[0], digest_of, above[1])]
    if not records:
        raise UsageError(
            f"There are no digests of the files of {folder}.",
            given="no " + ", ".join(RECORDS),
            accepted="a folder that whence made, or one below it",
        )
    return Verified(folder, records)
