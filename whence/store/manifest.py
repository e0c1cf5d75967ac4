"""A run folder: config first, shards one by one, `manifest.json` last.

    with Folder.claim("runs/a/factors", provenance) as folder:
        if not folder.finished:
            if not folder.has("covariance"):
                folder.save("covariance", tensors)
            folder.finish()

A file appears under its name only when it is complete and on disk, so after a kill at any moment the same call finds
the shards that were done and goes on. A folder made from something else is refused with what changed, never overwritten.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whence import dist
from whence.errors import DiskFull, StaleArtifact, WhenceError
from whence.store.digest import canonical_json, digest, plain

FORMAT = 1
CONFIG, MANIFEST, LOCK = "config.json", "manifest.json", ".lock"
SHOWN = 5
"""Differences that a refusal lists."""

P = ParamSpec("P")
T = TypeVar("T")


def _by_first(method: Callable[Concatenate[Folder, P], T]) -> Callable[Concatenate[Folder, P], T]:
    """Of a folder that several processes claimed: the first one does it, and all get the same answer once it is done."""

    @functools.wraps(method)
    def once(folder: Folder, *arguments: P.args, **options: P.kwargs) -> T:
        if not folder.shared:
            return method(folder, *arguments, **options)
        return dist.on_first(method, folder, *arguments, **options)

    return once


class Folder:
    """A folder of ours: `claim` one to write, `open` a finished one to read.

    Where several processes claim it (`whence.dist`), all of them call the same methods in the same order: the first one
    writes, and says what there is; all read for themselves.
    """

    shared = False
    """Whether several processes claimed it."""

    def __init__(self, path: Path, config: dict[str, Any], lock: int | None = None):
        self.path, self.config = path, config
        self._release = weakref.finalize(self, os.close, lock) if lock is not None else None

    @classmethod
    def claim(cls, path: str | os.PathLike, provenance: Mapping[str, Any], *, rerun: bool = False) -> Folder:
        """Take the folder for work described by `provenance` (JSON values: stage, model, data, settings, code, ...).

        A new folder, an unfinished one of the same provenance (resume it) and a finished one (`finished` is True: read
        it) are given out. With `rerun` a folder in the way is moved aside to `NAME.1`; nothing is ever deleted.

        Raises StaleArtifact when the folder holds anything else, WhenceError when another process writes to it.
        """
        if dist.world() > 1:
            return cls._claim_together(path, provenance, rerun)
        path = Path(path).expanduser()
        wanted: dict[str, Any] = plain(provenance)
        other = path.exists() and not is_run_folder(path)
        # a run that was killed before its config was written leaves no more than these
        if other and not (path.is_dir() and all(file.name == LOCK or file.suffix == ".tmp" for file in path.iterdir())):
            raise StaleArtifact(
                f"{path} exists and is not a whence run folder.",
                accepted="a new or an empty folder",
                fix="choose another --out (Python: out=...)",
            )
        if rerun and is_run_folder(path):
            lock = _lock(path)  # nobody may be writing to it
            try:
                path.rename(_aside(path))
            finally:
                os.close(lock)
        if (path / MANIFEST).exists():
            folder = cls.open(path)
            folder._refuse_if_changed(wanted, folder.provenance)
            return folder
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        if (path / CONFIG).exists():
            folder = cls(path, _read_json(path / CONFIG), lock)
            versions = {"versions": _versions()}
            folder._refuse_if_changed(wanted | versions, folder.provenance | {"versions": folder.config["versions"]})
            for leftover in path.rglob("*.tmp"):
                leftover.unlink()
            return folder
        folder = cls(path, {"whence": FORMAT, "created": _now(), "versions": _versions(), "provenance": wanted}, lock)
        folder.write_json(CONFIG, folder.config)
        return folder

    @classmethod
    def _claim_together(cls, path: str | os.PathLike, provenance: Mapping[str, Any], rerun: bool) -> Folder:
        """The folder that the first process claims, on all of them; all have to be at the same work."""
        claimed: list[Folder] = []

        def claim() -> tuple[Path, dict[str, Any], dict[str, Any]]:
            claimed.append(cls.claim(path, provenance, rerun=rerun))
            return claimed[0].path, claimed[0].config, plain(provenance)

        place, config, wanted = dist.on_first(claim)
        folder = claimed[0] if claimed else cls(place, config)
        folder.shared = True
        refuse_other_work(wanted, provenance)
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike) -> Folder:
        """Open a finished folder to read it; raises StaleArtifact when it is unfinished or damaged."""
        path = Path(path).expanduser()
        ours = is_run_folder(path)
        if not ours or not (path / MANIFEST).exists():
            state = "is unfinished" if ours else "is not a whence run folder"
            raise StaleArtifact(f"{path} {state}.", fix="run the command that makes it (again): finished shards are kept")
        folder = cls(path, _read_json(path / CONFIG))
        files = ((name, path / name, size) for name, size in folder.manifest["files"].items())
        damaged = [name for name, file, size in files if not file.exists() or file.stat().st_size != size]
        if damaged:
            raise StaleArtifact(
                f"{path} was finished, but files are gone or cut short since.",
                given=", ".join(damaged[:SHOWN]),
                fix="restore them, or --rerun (the old folder is kept aside)",
            )
        return folder

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write to the folder."""
        if self._release is not None:
            self._release()

    @property
    @_by_first
    def finished(self) -> bool:
        """Whether the manifest is written: nothing is left to do, and nothing will change any more."""
        return (self.path / MANIFEST).exists()

    @property
    def provenance(self) -> dict[str, Any]:
        """What the folder is made from, as it was claimed."""
        return self.config["provenance"]

    @property
    def identity(self) -> str:
        """Hash of the provenance: what a folder made from this one names in its own."""
        return digest(canonical_json(self.provenance))

    @property
    def manifest(self) -> dict[str, Any]:
        """What `finish` wrote: `files` with their bytes, and its `extra`."""
        return self.read_json(MANIFEST)

    @_by_first
    def has(self, name: str) -> bool:
        """Whether the shard was saved: then it is complete."""
        return self._shard(name).exists()

    @_by_first
    def shards(self) -> list[str]:
        """Names of the saved shards, sorted."""
        return sorted(file.relative_to(self.path).with_suffix("").as_posix() for file in self.path.rglob("*.safetensors"))

    @_by_first
    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors as the shard `name` ("covariance", "eigen/0003"), whole or not at all."""
        with atomic(self._shard(name)) as temporary:
            save_file({key: _own(tensor) for key, tensor in tensors.items()}, temporary)

    def load(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Load the tensors of a shard."""
        return load_file(self._shard(name), device=str(device))

    @_by_first
    def drop(self, name: str) -> None:
        """Delete a shard that was only needed on the way."""
        self._shard(name).unlink(missing_ok=True)

    def child(self, name: str) -> Folder:
        """A folder in this one, for work whose files may not stay; it belongs to the same processes."""
        inner = Folder(self.path / name, self.config)
        inner.shared = self.shared
        return inner

    @_by_first
    def adopt(self, name: str) -> None:
        """Take a child's files for its own, or those of them that a killed run left there."""
        for file in sorted((self.path / name).glob("*")):
            file.replace(self.path / file.name)
        self.discard(name)

    @_by_first
    def discard(self, name: str) -> None:
        """Delete a child with all that is in it."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    @_by_first
    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        with atomic(self.path / name) as temporary:
            temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @_by_first
    def has_json(self, name: str) -> bool:
        """Whether the JSON file was written."""
        return (self.path / name).exists()

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the folder."""
        return _read_json(self.path / name)

    @_by_first
    def finish(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write the manifest, with `extra` in it, and let the folder go: it is complete."""
        files = {
            file.relative_to(self.path).as_posix(): file.stat().st_size
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and file.name != LOCK and file.suffix != ".tmp"
        }
        self.write_json(MANIFEST, {"finished": _now(), "identity": self.identity, "files": files, **(extra or {})})
        self.close()

    def _shard(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _refuse_if_changed(self, wanted: dict[str, Any], found: dict[str, Any]) -> None:
        changes = differences(found, wanted)
        if not changes:
            return
        self.close()
        stage = found.get("stage", "run")
        if len(changes) > SHOWN:
            changes = [*changes[: SHOWN - 1], f"and {len(changes) - SHOWN + 1} more"]
        raise StaleArtifact(
            f"{self.path} holds {'a finished' if self.finished else 'an unfinished'} {stage} made from something else.",
            given=("\n" + " " * 11).join(changes),
            accepted="what it was made from; nothing was overwritten",
            fix=f"another --out (Python: out=...), or --rerun (rerun=True): {stage} and what was made from it run again, "
            f"and the old folder stays as {_aside(self.path).name}",
        )


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there appears as `path` once complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except Exception as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "StorageFull" not in str(error):
            raise  # safetensors says in words only that a disk is full
        raise DiskFull(
            f"The disk is full: {path.name} could not be written.",
            given=f"{shutil.disk_usage(path.parent).free / 1e9:.1f} GB free where {path.parent} is",
            fix="make room, then the same command goes on: what was finished is kept; whence plan says how much a run takes",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def refuse_other_work(first: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise WhenceError, in all processes, where one of them is at other work than the first: their shares would not fit."""
    with dist.agreeing():
        if changes := differences(first, plain(own)):
            raise WhenceError(
                f"Process {dist.rank()} of {dist.world()} is at other work than the first one.",
                given=("\n" + " " * 11).join(changes[:SHOWN]),
                accepted="the same model, data, settings and code for all processes",
            )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List what differs between two nested settings, one dotted name a line: `settings.damping 0.1 -> 0.2`."""
    before, after = _flatten(old), _flatten(new)
    names = dict.fromkeys([*before, *after])
    pairs = ((name, before.get(name, "nothing"), after.get(name, "nothing")) for name in names)
    return [f"{name} {was} -> {now}" for name, was, now in pairs if was != now]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            text = canonical_json(value).strip('"')
            flat[prefix + key] = text if len(text) <= 48 else f"{text[:32]}... ({digest(text)[:6]})"  # two long ones differ
    return flat


def is_run_folder(path: Path) -> bool:
    """Whether whence made the folder, finished or not; a model's folder has a `config.json` too."""
    config = path / CONFIG
    if not config.is_file():
        return False
    try:
        content = _read_json(config)
    except ValueError:
        return False
    return isinstance(content, dict) and "whence" in content


def _lock(path: Path) -> int:
    """Lock the folder for this process; the system lets go of it when the process ends, however it ends."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode().strip()
        os.close(lock)
        raise WhenceError(
            f"another run (process {holder}) is writing to {path}.",
            fix="wait for it, stop it, or choose another --out (Python: out=...)",
        ) from None
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _aside(path: Path) -> Path:
    """Give the first of NAME.1, NAME.2, ... that is free."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


def _own(tensor: Tensor) -> Tensor:
    """Bring a tensor to the host, in memory that is contiguous and that no other tensor shares."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("torch", "transformers")}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
