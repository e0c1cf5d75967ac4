"""A folder that lives in memory: for work whose result is not wanted on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from whence import dist
from whence.store.digest import plain
from whence.store.manifest import Folder, refuse_other_work


class Memory:
    """What `Folder` offers to work in progress, without a disk: nothing survives, nothing is refused."""

    finished = False

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._json: dict[str, Any] = {}
        self._children: dict[str, Memory] = {}

    def warn_if_no_room(self, most: int) -> None:
        """Nothing is written."""

    def has(self, name: str) -> bool:
        """Whether the shard was saved."""
        return name in self._tensors

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors as the shard `name`."""
        self._tensors[name] = dict(tensors)

    def load(self, name: str, device: Any = "cpu") -> dict[str, Tensor]:
        """The tensors of a shard."""
        return {key: tensor.to(device) for key, tensor in self._tensors[name].items()}

    def drop(self, name: str) -> None:
        """Forget a shard."""
        self._tensors.pop(name, None)

    def child(self, name: str) -> Memory:
        """Memory in this one, for work that may not stay."""
        return self._children.setdefault(name, Memory())

    def adopt(self, name: str) -> None:
        """Take what a child keeps for its own."""
        child = self._children.pop(name)
        self._tensors |= child._tensors
        self._json |= child._json

    def discard(self, name: str) -> None:
        """Forget a child."""
        self._children.pop(name, None)

    def write_json(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        self._json[name] = value

    def has_json(self, name: str) -> bool:
        """Whether the JSON value is kept."""
        return name in self._json

    def read_json(self, name: str) -> Any:
        """The value kept."""
        return self._json[name]

    def finish(self, extra: Mapping[str, Any] | None = None) -> None:
        """Nothing more to do."""


@contextlib.contextmanager
def work(
    out: str | Path | None, made_from: Callable[[], Mapping[str, Any]], *, rerun: bool = False
) -> Iterator[Folder | Memory]:
    """The folder for work that is made from this (see `Folder.claim`), or memory where the user wants no folder.

    It is released at the end. `made_from` is asked only where it matters, since it hashes models. Raises StaleArtifact, and
    WhenceError where another process of the run is doing different work.
    """
    if out is None:
        if dist.world() > 1:
            own = made_from()
            refuse_other_work(dist.from_first(plain(own)), own)
        yield Memory()
        return
    with Folder.claim(out, made_from(), rerun=rerun) as folder:
        yield folder
