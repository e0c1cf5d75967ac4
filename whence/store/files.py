"""Files that exist whole or not at all, and folders that one process at a time may write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from whence.errors import WhenceError
from whence.shortage import shortages
from whence.store.intact import LOCK, sealed

CLOCKS = 2.0
"""Seconds by which the time of a file and that of a process may be off."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there appears as `path` once complete and on disk.

    Raises DiskFull where it can't be written.
    """
    with shortages(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_for(path)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def write_json(path: Path, document: Mapping[str, Any], indent: int | None = 2, *, ensure_ascii: bool = True) -> None:
    """Write a document with the digest of its content, whole or not at all, as `whence.store.intact.read_json` reads it."""
    with atomic(path) as temporary:
        text = json.dumps(sealed(document), indent=indent, ensure_ascii=ensure_ascii)
        temporary.write_text(text + "\n", encoding="utf-8")


def temporary_for(path: Path) -> Path:
    """Where this process writes what becomes the file or folder `path`; what killed ones left there is deleted."""
    for entry in os.scandir(path.parent) if path.parent.is_dir() else ():
        if entry.name.endswith(".tmp") and entry.name.startswith(f".{path.name}.") and _abandoned(entry):
            remove = shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.unlink
            with contextlib.suppress(FileNotFoundError):
                remove(entry.path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _abandoned(temporary: os.DirEntry) -> bool:
    """Whether the process that a temporary file names has ended; one that began after it was written is another."""
    number = temporary.name.split(".")[-2]
    if not number.isdigit():
        return False
    try:
        return psutil.Process(int(number)).create_time() > temporary.stat().st_mtime + CLOCKS
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True


def take_lock(path: Path) -> int:
    """Lock the folder for this process; the system releases it when the process ends, however it ends."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode().strip()
        os.close(lock)
        raise WhenceError(
            f"another run (process {holder}) is writing to {path}.",
            fix="wait for it, stop it, or choose a different --out (whence run: --set out=...; Python: out=...)",
        ) from None
    except OSError:
        os.close(lock)
        raise
    return lock


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Work on a folder that one process at a time may do; raises WhenceError where another one does."""
    with shortages(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
    try:
        yield
    finally:
        os.close(lock)


def aside(path: Path) -> Path:
    """Give the first of NAME.1, NAME.2, ... that is free."""
    number = 1
    while (free := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return free


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
