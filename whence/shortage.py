"""Too little memory, and full disks: recognised from the errors of all the libraries that meet them.

Each library says it in its own way, and in another with its next version: by a number (`errno`), in the text of an exception
of any kind, or only in the cause of an exception that speaks of something else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from whence.errors import DiskFull, OutOfMemory, WhenceError

MEMORY = re.compile(
    r"can(?:no|')t allocate|unable to allocate|failed to allocate|not enough memory|insufficient memory|out of memory"
    r"|bad.alloc|can't start new thread|memory allocation .*failed|alloc_failed|\(os error 12\)|failed to map segment",
    re.IGNORECASE,
)
"""How libraries say that memory ran out: Linux, torch, numpy, C++, CUDA and its libraries, Rust, the dynamic linker."""

DISK = {
    errno.ENOSPC: ("The disk is full", r"no space left|StorageFull|PytorchStreamWriter failed|unexpected pos \d+ vs"),
    errno.EDQUOT: ("The disk quota is used up", r"quota exceeded|QuotaExceeded"),
    errno.EFBIG: ("A file can't become as large here (ulimit -f)", r"file too large|FileTooLarge"),
    errno.EROFS: ("The disk is read-only", r"read-only file ?system"),
    errno.EACCES: ("Permission denied", r"permission denied"),
    errno.EPERM: ("Permission denied", r"operation not permitted"),
}
"""Why nothing can be written: in our words, and in those of libraries."""

DENIED = (errno.EACCES, errno.EPERM)
"""Numbers that an unreadable file has, too."""

OTHERS = (WhenceError, AssertionError, LookupError, TypeError, ValueError)
"""Errors whose text, which may be a user's, says nothing of the machine."""


@contextlib.contextmanager
def shortages(path: Path | None = None) -> Iterator[None]:
    """Work, of which `path` is written; raises OutOfMemory or DiskFull where what it raises is that in other words."""
    try:
        yield
    except Exception as error:
        said = shortage(error, path)
        if said is None or said is error:
            raise
        raise said from error


def shortage(error: BaseException, path: Path | None = None) -> WhenceError | None:
    """The error as OutOfMemory or DiskFull (of `path`, unless it names another file); None where it is neither."""
    for cause in _causes(error):
        if isinstance(cause, OutOfMemory | DiskFull):
            return cause
        if isinstance(cause, WhenceError):
            continue
        if _no_memory(cause):
            return OutOfMemory(
                "There is not enough memory.",
                given=first_line(cause),
                fix="less at a time (--batch-tokens, --batch-size), fewer modules (--modules last-8), or more groups of them "
                "(--groups 4); whence plan estimates how much a run takes",
            )
        number = _disk(cause)
        if number is not None and (number not in DENIED or cause is error and _written(cause, path)):
            return _disk_full(number, cause, path)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, and this was not reported yet."""
    return not isinstance(error, WhenceError) and any(_no_memory(cause) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it; of our own, what they were raised from."""
    while error is not None:
        yield error
        hidden = error.__suppress_context__ or isinstance(error, WhenceError)
        error = error.__cause__ or (None if hidden else error.__context__)


def _no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    if getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return not isinstance(error, OTHERS) and bool(MEMORY.search(str(error)))


def _disk(error: BaseException) -> int | None:
    """The number of what the disk refuses."""
    number = getattr(error, "errno", None)
    if number in DISK:
        return number
    said = "" if isinstance(error, OTHERS) else str(error)
    return next((number for number, (_, words) in DISK.items() if re.search(words, said, re.IGNORECASE)), None)


def _written(error: BaseException, path: Path | None) -> bool:
    """Whether a file that is not ours to touch was to be written: one that is there can be read, or not even be seen."""
    file = getattr(error, "filename", None)
    return path is not None if file is None else not os.path.exists(file) or os.access(file, os.R_OK)


def _disk_full(number: int, error: BaseException, path: Path | None) -> DiskFull:
    named = getattr(error, "filename", None)
    file = path if path is not None or not isinstance(named, str) else Path(named)
    what = f"{DISK[number][0]}: {'a file, or the output,' if file is None else file.name or file} could not be written."
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(
            what,
            given=str(file or first_line(error)),
            fix="a different --out (Python: out=...) where files can be written, or write access to this one; what was "
            "finished is kept",
        )
    return DiskFull(
        what,
        given=first_line(error) if file is None else _free(file.absolute()),
        fix="make room, then run the same command again: it resumes, and what was finished is kept; whence plan estimates "
        "how much a run takes",
    )


def _free(file: Path) -> str:
    """How much room there is where a file was to be written."""
    place = next(folder for folder in (file, *file.parents) if folder.is_dir())
    full = os.statvfs(place)
    files = " (and no more files)" if full.f_files and not full.f_favail else ""
    return f"{shutil.disk_usage(place).free / 1e9:.1f} GB free{files} where {place} is"


def first_line(error: BaseException) -> str:
    """Of what an error says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
