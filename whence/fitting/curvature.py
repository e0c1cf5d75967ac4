"""The fitted curvature: an operator per module, with what it was fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whence.errors import StaleArtifact, TokenizerMismatch
from whence.fitting.covariance import Sides, rotations, sides_of
from whence.fitting.methods import method_named
from whence.operators import BlockDiagonal, EigenBlock, Identity, Operator
from whence.show.markup import facts, framed
from whence.store.compact import expand
from whence.store.fingerprint import fingerprint
from whence.store.manifest import Folder, differences, refuse_other_kind, within
from whence.store.memory import Memory
from whence.tasks.base import Task
from whence.tasks.tokens import first_difference


@dataclass(frozen=True)
class Curvature:
    """The Gauss-Newton matrix (= Fisher matrix) of the mean loss per example, one Kronecker-eigenbasis block per module.

    `about` says how it was fitted: method, modules, share of the parameters, examples and positions used, label draws.
    """

    operator: BlockDiagonal | Identity
    about: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of what it was fitted on (model, data, task, settings, code), if it came from a folder."""
    sides: dict[str, Sides] = field(default_factory=dict)
    """Eigenvalues of the covariances behind each block; only for methods that have some, and folders that kept them."""

    @property
    def blocks(self) -> dict[str, EigenBlock]:
        """The block of each module; of the identity, ones that take no memory."""
        if isinstance(self.operator, BlockDiagonal):
            return dict(self.operator.blocks)
        shapes = {name: self.about["modules"][name] for name in self.operator.names}
        return {name: EigenBlock(None, None, torch.ones(()).expand(*shape)) for name, shape in shapes.items()}

    @property
    def mean_eigenvalue(self) -> float:
        """Over all modules together: the trace over the number of weights."""
        eigenvalues = [block.lam_OI for block in self.blocks.values()]
        return sum(float(lam_OI.sum(dtype=torch.float64)) for lam_OI in eigenvalues) / sum(
            lam_OI.numel() for lam_OI in eigenvalues
        )

    def inverse(self, damping: float = 0.1, *, absolute: float | None = None) -> Operator:
        """The damped inverse, see `BlockDiagonal.inverse`; damping is `damping` times each module's mean eigenvalue."""
        return self.operator.inverse(damping, absolute=absolute)

    def check(self, model: nn.Module, task: Task) -> None:
        """Raise StaleArtifact unless `model` is what this was fitted on, TokenizerMismatch unless `task` reads text as then."""
        if changes := differences({"model": self.provenance["model"]}, {"model": fingerprint(model)}):
            raise StaleArtifact(
                "The factors were fitted on another model.",
                given=("\n" + " " * 11).join(changes),
                accepted="the model that they were fitted on, in the same dtype",
                fix="fit factors for this model: whence fit MODEL --data DATA --out ANOTHER_FOLDER",
            )
        then, now = self.provenance["task"], task.settings()
        if changes := [key for key in ("tokenizer", "chat_template") if then.get(key) != now.get(key)]:
            found = differences({key: then.get(key) for key in changes}, {key: now.get(key) for key in changes})
            if "tokenizer" in changes and self.about.get("begins"):
                found.append(first_difference(getattr(task, "tokenizer", None), self.about["begins"]))
            raise TokenizerMismatch(
                f"The factors were fitted on text read with another {' and '.join(changes).replace('_', ' ')}.",
                given=", ".join(found),
                accepted="the tokenizer and chat template that the model was trained with, for factors and scores alike",
                fix="give the same --tokenizer and --template as to whence fit, or fit again",
            )

    def __repr__(self) -> str:
        return f"Curvature({', '.join(f'{name}: {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        return framed("Curvature", facts(self._facts()))

    def _facts(self) -> Iterator[tuple[str, str]]:
        """What a reader asks first."""
        about, names = self.about, self.operator.names
        share = f", {about['share']:.1%} of the parameters" if "share" in about else ""
        yield "method", str(about.get("method", "unknown"))
        yield "modules", f"{len(names)}{share} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        if "examples" in about:
            yield (
                "fitted on",
                f"{about['examples']:,} rows" + (f", {about['positions']:,} tokens" if "positions" in about else ""),
            )
        if "labels" in about:
            yield "labels", "drawn from the model" if about["labels"] == "model" else "the data's own"


def open_factors(path: str | Path) -> Curvature:
    """Load finished factors from their folder; StaleArtifact where they are unfinished or damaged."""
    folder = Folder.open(within(path, "factors"))
    refuse_other_kind(folder, "method" in folder.manifest.get("about", {}), "factors", "whence fit")
    return load_curvature(folder, folder.manifest["about"])


def load_curvature(folder: Folder | Memory, about: dict[str, Any]) -> Curvature:
    """Put the blocks together from a folder's shards; the identity has none. Bases of shared inputs are one tensor."""
    provenance = folder.provenance if isinstance(folder, Folder) else {}
    label = f"{about['method']} on {about['examples']} {'example' if about['examples'] == 1 else 'examples'}"
    if method_named(about["method"]).eigenvalues == "one":
        return Curvature(Identity(about["modules"], label), about, provenance)
    blocks: dict[str, EigenBlock] = {}
    kept: dict[str, Sides | None] = {}
    number = 0
    while folder.has(f"eigenvalues-{number:02d}"):
        eigenvalues = expand(folder.load(f"eigenvalues-{number:02d}"))
        bases = expand(folder.load(f"basis-{number:02d}")) if folder.has(f"basis-{number:02d}") else {}
        groups = folder.read_json(f"inputs-{number:02d}.json") if bases else {}
        turned = rotations(bases)
        blocks |= {
            name: EigenBlock(turned.get(f"out/{name}"), turned.get(f"in/{groups.get(name, name)}"), lam_OI)
            for name, lam_OI in eigenvalues.items()
        }
        kept |= {name: sides_of(bases, name, groups.get(name, name)) for name in eigenvalues}
        number += 1
    order = {name: place for place, name in enumerate(about["modules"])}
    blocks = {name: blocks[name] for name in sorted(blocks, key=order.__getitem__)}
    sides = {name: found for name in blocks if (found := kept[name])}
    return Curvature(BlockDiagonal(blocks, label), about, provenance, sides)
