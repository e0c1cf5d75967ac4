"""Retraining banks: what queries measure after training on many subsets of the rows, made once and kept in kilobytes.

Three kinds, which answer different questions. `halves` train on a random half at a time, its rows counting twice, so that a
step's objective stays a mean over the rows that are kept: training differs a lot. `alone` train on a random half as if there
were no other rows: in another order and in half as many steps, as most published protocols do. `removals` leave a few per cent
out, with the order of the rows, what stands in which batch and the number of steps unchanged: first-order theory must hold.

A file holds the subsets, the measurements as changes from the model trained on all rows (16 bits each, on a scale of their
own per seed and query), where they come from, and a hash of all this. `S` seeds, `K` subsets, `N` rows, `Q` queries.
"""

from __future__ import annotations

import io
import json
import shlex
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from whence.errors import StaleArtifact, UsageError
from whence.progress import stage
from whence.store.digest import canonical_json, digest, fingerprint_sources
from whence.store.files import atomic
from whence.store.manifest import differences
from whence.validate.settings import Setting
from whence.validate.trainer import Replicas, retrain

LEVELS = 32767
"""Of a change, on either side of zero."""

SAVED = 32
"""Retrainings between two saves."""

SOURCES = ("validate/trainer", "validate/settings", "validate/bank", "engine/stream", "tasks")


@dataclass(frozen=True)
class Spec:
    """Which subsets are trained on, and with which seeds."""

    kind: Literal["halves", "alone", "removals"]
    subsets: int = 128
    seeds: tuple[int, ...] = (0, 1)
    """Of the first weights and of the order of the rows; the first is that of the model whose scores are asked about."""
    share: float = 0.03
    """Of the rows that a removal leaves out."""
    seed: int = 0
    """Of the subsets."""

    def masks(self, rows: int) -> np.ndarray:
        """Which rows each subset keeps, bool `[K, N]`."""
        draw = np.random.default_rng([self.seed, self.subsets, rows])
        removed = max(1, round(self.share * rows)) if self.kind == "removals" else rows - rows // 2
        kept = np.ones((self.subsets, rows), bool)
        for mask in kept:
            mask[draw.choice(rows, removed, replace=False)] = False
        return kept

    def weights(self, kept_KN: np.ndarray) -> np.ndarray:
        """How often each row's loss counts, `[K, N]`."""
        scale = kept_KN.shape[1] / kept_KN.sum(1, keepdims=True) if self.kind == "halves" else 1.0
        return kept_KN * scale


@dataclass(frozen=True)
class Bank:
    """Measurements after retraining."""

    kept: np.ndarray
    """Which rows each subset keeps, bool `[K, N]`."""
    changes: np.ndarray
    """Measurement after training on the subset minus that after training on all rows, `[S, K, Q]`, float32."""
    whole: np.ndarray
    """Measurements of the models trained on all rows, `[S, Q]`."""
    about: dict[str, Any]
    """Where it comes from: spec, setting, code, seconds."""

    @property
    def spec(self) -> Spec:
        """Which subsets, which seeds."""
        return spec_of(self.about)

    @property
    def seconds(self) -> float:
        """Processor time that the retrainings took."""
        return float(self.about["seconds"])

    def of(self, seeds: int | slice = 0) -> np.ndarray:
        """Changes `[K, Q]` of one seed by its place, or the mean over several."""
        chosen = self.changes[seeds]
        return chosen if chosen.ndim == 2 else chosen.mean(0)


def make_bank(setting: Setting, spec: Spec, path: str | Path) -> Bank:
    """The bank of the setting in the file `path`: opened where it is finished, else made, resuming where a killed run stopped.

    Raises StaleArtifact where the file is of another setting or spec, UsageError where it is damaged.
    """
    path = Path(path)
    wanted = {"spec": plain_spec(spec), "setting": setting.describe()}
    unfinished = path.with_suffix(".unfinished.npz")
    if path.exists():
        bank = open_bank(path)
        refuse_other(path, bank.about, wanted)
        unfinished.unlink(missing_ok=True)  # of a run that was killed between the two
        return bank
    kept_KN = spec.masks(len(setting.train))
    found, seconds = np.full((len(spec.seeds), spec.subsets + 1, len(setting.queries)), np.nan), 0.0  # NaN: not yet measured
    if unfinished.exists():
        arrays, about = read_arrays(unfinished)
        refuse_other(unfinished, about, wanted)
        found, seconds = arrays["measured"], float(about["seconds"])
    todo = [
        (s, list(range(first, min(first + SAVED, spec.subsets + 1))))
        for s in range(len(spec.seeds))
        for first in range(0, spec.subsets + 1, SAVED)
    ]
    # the model of all rows is one more subset, the last
    weights_KN = np.concatenate([spec.weights(kept_KN), np.ones((1, len(setting.train)))])
    behind = int((~np.isnan(found).any(2)).sum())
    trained = measured_alone if spec.kind == "alone" else measured
    with stage(f"bank {setting.name} {spec.kind}", found.shape[0] * found.shape[1], "retrainings", done=behind) as advance:
        for s, members in todo:
            if not np.isnan(found[s, members]).any():
                continue
            measured_KQ, took = trained(setting, weights_KN[members], spec.seeds[s])
            found[s, members], seconds = measured_KQ, seconds + took
            write_arrays(unfinished, {"measured": found}, wanted | {"seconds": seconds})
            advance(len(members))
    about = wanted | {"seconds": round(seconds, 2), "code": fingerprint_sources(SOURCES)}
    bank = Bank(kept_KN, (found[:, :-1] - found[:, -1:]).astype(np.float32), found[:, -1].astype(np.float32), about)
    save_bank(bank, path)
    unfinished.unlink(missing_ok=True)
    return open_bank(path)


def save_bank(bank: Bank, path: str | Path) -> Path:
    """Write the bank; what is read again differs by half a level at most."""
    largest_SQ = np.maximum(np.abs(bank.changes).max(1), np.finfo(np.float32).tiny).astype(np.float32)
    arrays = {
        "kept": np.packbits(bank.kept, axis=1),
        "rows": np.array(bank.kept.shape[1]),
        "levels": np.rint(bank.changes / largest_SQ[:, None] * LEVELS).astype(np.int16),
        "largest": largest_SQ,
        "whole": bank.whole.astype(np.float32),
    }
    write_arrays(Path(path), arrays, bank.about)
    return Path(path)


def open_bank(path: str | Path) -> Bank:
    """Read a bank; raises UsageError where the file is cut off, was altered, or lacks retrainings."""
    arrays, about = read_arrays(Path(path))
    if set(arrays) != {"kept", "rows", "levels", "largest", "whole"}:
        raise UsageError(
            f"{path} is not a finished bank", given=", ".join(arrays), fix="make it again: it resumes where it stopped"
        )
    rows = int(arrays["rows"])
    kept = np.unpackbits(arrays["kept"], axis=1)[:, :rows].astype(bool)
    changes = arrays["levels"].astype(np.float32) / LEVELS * arrays["largest"][:, None]
    bank = Bank(kept, changes, arrays["whole"], about)
    complete = changes.shape[:2] == (len(bank.spec.seeds), bank.spec.subsets) and len(kept) == bank.spec.subsets
    if not complete or not np.array_equal(kept, bank.spec.masks(rows)) or not np.isfinite(changes).all():
        raise UsageError(
            f"{path} lacks retrainings, or they are of other subsets",
            given=f"{changes.shape[0]} seeds of {changes.shape[1]} subsets",
            accepted=f"{len(bank.spec.seeds)} seeds of {bank.spec.subsets} subsets",
            fix="delete it and make it again",
        )
    return bank


def refuse_other(what: Any, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise StaleArtifact where something decides the numbers and is different."""
    changed = [
        line
        for key, value in wanted.items()
        for line in differences({key: json.loads(canonical_json(found.get(key)))}, {key: json.loads(canonical_json(value))})
    ]
    if changed:
        raise StaleArtifact(
            f"{what} is of something else",
            given="\n           ".join(changed[:8]),
            accepted="the setting and the subsets that it was made with; nothing was overwritten",
            fix="a different file, or delete this one and make it again",
        )


def plain_spec(spec: Spec) -> dict[str, Any]:
    """As JSON values."""
    return asdict(spec) | {"seeds": list(spec.seeds)}


def spec_of(about: dict[str, Any]) -> Spec:
    """The spec that a bank was made with."""
    return Spec(**{**about["spec"], "seeds": tuple(about["spec"]["seeds"])})


def measured(setting: Setting, weights_KN: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Measurements `[K, Q]` after training with these weights, and the processor time it took."""
    before, count = time.process_time(), len(weights_KN)
    replicas: Replicas = retrain(
        setting.model(seed),
        setting.task,
        setting.train,
        setting.recipe,
        weights_KN,
        seeds=[seed] * count,
        order_seeds=[seed] * count,
        progress="",
    )
    measured_KQ = replicas.measurements(setting.queries).double().cpu().numpy()
    if not np.isfinite(measured_KQ).all():
        raise UsageError(
            f"Training {setting.name} diverged",
            given=f"{int((~np.isfinite(measured_KQ)).any(1).sum())} of {count} retrainings with infinite losses",
            fix="a smaller learning rate in its recipe",
        )
    return measured_KQ, time.process_time() - before


def measured_alone(setting: Setting, kept_KN: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """The same after training on the rows that are kept alone."""
    subsets = [replace(setting, train=[setting.train[int(n)] for n in np.flatnonzero(kept_N)]) for kept_N in kept_KN]
    found = [measured(own, np.ones((1, len(own.train))), seed) for own in subsets]
    return np.concatenate([measured_1Q for measured_1Q, _ in found]), sum(seconds for _, seconds in found)


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write measurements and where they come from to a file, with a hash of both."""
    text = canonical_json(about)
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, about=np.array(text), hash=np.array(_hash(arrays, text)), **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_arrays` wrote; raises UsageError where the file is not there, cut off or altered."""
    if not path.is_file():
        raise UsageError("There is no bank", given=str(path))
    with path.open("rb") as opened:
        if opened.read(2) != b"PK" and not zipfile.is_zipfile(path):  # never advise deleting a file that is not ours
            raise UsageError(f"{path} is not a retraining bank", accepted="an .npz file that whence validate --lds made")
    again = f"rm {shlex.quote(str(path))}, and make it again"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text, expected = str(arrays.pop("about")), str(arrays.pop("hash"))
    except Exception as error:  # zipfile and numpy raise a dozen types for damaged files
        raise UsageError(f"{path} is cut off or not a bank", given=f"{type(error).__name__}: {error}", fix=again) from error
    if _hash(arrays, text) != expected:
        raise UsageError(f"{path} was altered: its content has changed since it was written", fix=again)
    return arrays, json.loads(text)


def _hash(arrays: dict[str, np.ndarray], text: str) -> str:
    parts = [(name, str(a.dtype), str(a.shape), np.ascontiguousarray(a).tobytes()) for name, a in sorted(arrays.items())]
    return digest(text, *(piece for part in parts for piece in part))
