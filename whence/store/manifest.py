"""A run folder: config first, shards one by one, `manifest.json` last.

    with Folder.claim("runs/a/factors", provenance) as folder:
        if not folder.finished:
            if not folder.has("covariance"):
                folder.save("covariance", tensors)
            folder.finish()

A file appears under its name only when it is complete and on disk, so after a kill at any moment the same call finds
the shards that were done and resumes. A folder made from something else is refused with what changed, never overwritten.
What is read is compared with the digests that were kept of it (`whence.store.intact`).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whence import dist
from whence.errors import StaleArtifact, UsageError, WhenceError
from whence.progress import note
from whence.shortage import shortage, shortages
from whence.show.numbers import size
from whence.store.digest import canonical_json, digest, plain
from whence.store.files import aside, atomic, locked, take_lock, temporary_for
from whence.store.intact import (
    CONFIG,
    FORMAT,
    JOURNAL,
    LOCK,
    MANIFEST,
    Listed,
    check,
    file_digest,
    is_run_folder,
    listing,
    note_digest,
    read_config,
    read_json,
    reading,
    refuse_faults,
    refuse_loop,
    sealed,
)

if TYPE_CHECKING:
    import pandas

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
    writes, and says what exists; all read for themselves.
    """

    shared = False
    """Whether several processes claimed it."""

    def __init__(self, path: Path, config: dict[str, Any], lock: int | None = None):
        self.path, self.config = path, config
        self._read: tuple[Any, dict[str, Listed]] | None = None
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
        refuse_loop(path)
        wanted: dict[str, Any] = plain(provenance)
        other = path.exists() and not is_run_folder(path)
        # a run that was killed before its config was written leaves no more than these
        if other and not (
            path.is_dir() and all(file.name in (LOCK, JOURNAL) or file.suffix == ".tmp" for file in path.iterdir())
        ):
            raise StaleArtifact(
                f"{path} exists and is not a whence run folder.",
                accepted="a new or an empty folder",
                fix="choose a different --out (Python: out=...)",
            )
        if rerun and is_run_folder(path):
            with locked(path), shortages(path):  # no other process may be writing to it
                path.rename(aside(path))
        if (path / MANIFEST).exists():
            folder = cls.open(path)
            folder._refuse_if_changed(wanted, folder.provenance)
            refuse_faults(path, check(path / MANIFEST).faults)
            (path / JOURNAL).unlink(missing_ok=True)  # where a kill came between the manifest and this
            return folder
        with shortages(path):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except (NotADirectoryError, FileExistsError, FileNotFoundError) as error:
                above = next(each for each in path.absolute().parents if each.exists())
                raise UsageError(
                    f"No folder can be made at {path}.",
                    given=f"{above} is a file" if above.is_file() else f"{above} takes no folder",
                    fix="choose a different --out (Python: out=...)",
                ) from error
            lock = take_lock(path)
        if (path / CONFIG).exists():
            try:
                folder = cls(path, read_config(path), lock)
            except StaleArtifact:
                os.close(lock)
                raise
            versions = {"versions": _versions()}
            folder._refuse_if_changed(wanted | versions, folder.provenance | {"versions": folder.config["versions"]})
            for leftover in sorted(path.rglob("*.tmp"), reverse=True):  # of folders what is in them first
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            folder._refuse_damaged_shards()
            return folder
        folder = cls(path, {"whence": FORMAT, "created": _now(), "versions": _versions(), "provenance": wanted}, lock)
        try:
            folder.write_json(CONFIG, folder.config)
        except WhenceError:
            folder.close()
            raise
        return folder

    @classmethod
    def _claim_together(cls, path: str | os.PathLike, provenance: Mapping[str, Any], rerun: bool) -> Folder:
        """The folder that the first process claims, on all of them; all have to do the same work."""
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
            if not os.path.lexists(path):
                raise StaleArtifact(f"There is no {path}.", fix="check its name, or run the command that makes it")
            state = "is unfinished" if ours else "is not a whence run folder"
            raise StaleArtifact(f"{path} {state}.", fix="run the command that makes it (again): finished shards are kept")
        folder = cls(path, read_config(path))
        files = folder._listed
        refuse_faults(path, {name: Listed(file.size, ()).fault(path / name) for name, file in files.items()})
        folder.intact(CONFIG)
        if not all(file.digests for file in files.values()):
            note(f"{path} has no digests (an older version made it): only the sizes of its files are checked")
        return folder

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, Exception) and (said := shortage(error, self.path)) not in (None, error):
            raise said from error

    def close(self) -> None:
        """Let another process write to the folder."""
        if self._release is not None:
            self._release()

    @property
    @_by_first
    def finished(self) -> bool:
        """Whether the manifest is written: nothing is left to do, and nothing will change any more."""
        return (self.path / MANIFEST).exists()

    @_by_first
    def warn_if_no_room(self, most: int) -> None:
        """Note that the disk may not hold the `most` bytes that will be written; the shards that are there count."""
        left = most - sum(file.stat().st_size for file in self.path.rglob("*.safetensors"))
        free = shutil.disk_usage(self.path).free
        if left > free:
            note(
                f"warning: {self.provenance['stage']} may write up to {size(left)} to {self.path}, where {size(free)} "
                "are free: it stops where the disk is full, and resumes once there is room [WHENCE-13]"
            )

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
        """What `finish` wrote: `files` with their bytes, `digests` of them, and its `extra`."""
        return read_json(self.path / MANIFEST)

    @property
    def _listed(self) -> dict[str, Listed]:
        """What is known of the files: from the manifest, or while there is none from the lines written with each."""
        record = next((file for name in (MANIFEST, JOURNAL) if (file := self.path / name).exists()), None)
        if record is None:
            return {}
        state = record.stat()
        version = (record, state.st_ino, state.st_size, state.st_mtime_ns)
        if self._read is None or self._read[0] != version:
            self._read = version, listing(record)
        return self._read[1]

    def intact(self, name: str) -> Path:
        """The path of a file of the folder that is about to be read; raises StaleArtifact unless it is what was written."""
        path, listed = self.path / name, self._listed.get(name)
        if listed is not None:
            refuse_faults(self.path, {name: listed.fault(path)})
        elif self.config["whence"] > 1:
            refuse_faults(self.path, {name: "is not listed in the folder's records" if path.exists() else "is missing"})
        return path

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
        with self.writing(f"{name}.safetensors") as temporary:
            save_file({key: _own(tensor) for key, tensor in tensors.items()}, temporary)

    def load(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Load the tensors of a shard; raises StaleArtifact where they are not those that were saved."""
        return load_tensors(self.intact(f"{name}.safetensors"), device)

    @_by_first
    def save_table(self, name: str, table: pandas.DataFrame) -> None:
        """Write a table as the Parquet file `name`, whole or not at all."""
        with self.writing(name) as temporary:
            table.to_parquet(temporary, index=False)

    def read_table(self, name: str) -> pandas.DataFrame:
        """Read a table; raises StaleArtifact where it is not the one that was written."""
        import pandas

        path = self.intact(name)
        with reading(path):
            return pandas.read_parquet(path)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path, as `atomic`; the file's digest is kept before it appears."""
        with atomic(self.path / name) as temporary:
            yield temporary
            note_digest(self.path, name, file_digest(temporary))

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
        inner = self.child(name)
        for known, listed in inner._listed.items():
            for found in listed.digests:
                note_digest(self.path, known, found)
        for file in sorted(inner.path.glob("*")):
            if file.name != JOURNAL:
                file.replace(self.path / file.name)
        self.discard(name)

    @_by_first
    def discard(self, name: str) -> None:
        """Delete a child with all that is in it; out of sight at once, since half of one would pass for a damaged one."""
        gone = temporary_for(self.path / name)
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @_by_first
    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        with self.writing(name) as temporary:
            temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @_by_first
    def has_json(self, name: str) -> bool:
        """Whether the JSON file was written."""
        return (self.path / name).exists()

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the folder; raises StaleArtifact where it has changed since it was written."""
        return read_json(self.intact(name))

    @_by_first
    def finish(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write the manifest, with `extra` in it, and release the folder: it is complete."""
        there = (file for file in sorted(self.path.rglob("*")) if file.is_file() and file.suffix != ".tmp")
        files = {file.relative_to(self.path).as_posix(): file for file in there if file.name not in (LOCK, JOURNAL)}
        known = self._listed
        digests = {name: self._digest_of(name, known.get(name)) for name in files}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        content = {"finished": _now(), "identity": self.identity, "files": sizes, "digests": digests}
        self.write_json(MANIFEST, sealed(plain({**content, **(extra or {})})))
        (self.path / JOURNAL).unlink(missing_ok=True)
        self.close()

    def _digest_of(self, name: str, listed: Listed | None) -> str:
        """The digest of a file that is finished: the one it was written with, else that of what is there."""
        if listed is not None and len(listed.digests) == 1:
            return listed.digests[0]
        return file_digest(self.intact(name) if listed else self.path / name)

    def _shard(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _refuse_damaged_shards(self) -> None:
        """Raise StaleArtifact where anything that was saved so far, here or in a child, has changed since it was written."""
        try:
            self.intact(CONFIG)
            for record in sorted(self.path.rglob(JOURNAL)):
                refuse_faults(record.parent, check(record).faults)
        except StaleArtifact:
            self.close()
            raise

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
            fix=f"a different --out (Python: out=...), or --rerun (rerun=True): {stage} and what was made from it run again, "
            f"and the old folder stays as {aside(self.path).name}",
        )


def refuse_other_work(first: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise WhenceError, in all processes, where one is doing different work from the first: their shares would not fit."""
    with dist.agreeing():
        if changes := differences(first, plain(own)):
            raise WhenceError(
                f"Process {dist.rank()} of {dist.world()} is doing different work from the first one.",
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


def within(path: str | os.PathLike, name: str) -> Path:
    """The folder `name` of the run at `path`, where that is what was meant; else the path as it is."""
    path = Path(path).expanduser()
    return path / name if not is_run_folder(path) and is_run_folder(path / name) else path


def refuse_other_kind(folder: Folder, is_kind: bool, kind: str, made_by: str) -> None:
    """Raise StaleArtifact unless a finished folder is of the kind that was meant."""
    if not is_kind:
        raise StaleArtifact(
            f"{folder.path} holds no {kind}.",
            given=f"a folder of the stage {folder.provenance.get('stage', '(unknown)')}",
            accepted=f"a folder that {made_by} made, or a run with one in it",
        )


def _own(tensor: Tensor) -> Tensor:
    """Bring a tensor to the host, in memory that is contiguous and that no other tensor shares."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Load a safetensors file; raises StaleArtifact with its name where it is damaged."""
    with reading(path):
        return load_file(path, device=str(device))


@functools.cache
def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("torch", "transformers")}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
