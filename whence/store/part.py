"""A part of a folder, for work whose shards may not stay: what `Folder` offers, under a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whence.store.manifest import Folder
from whence.store.memory import Memory

Store = Folder | Memory


class Part:
    """The shards and JSON files of `whole` whose names begin with `name/`."""

    def __init__(self, whole: Store, name: str):
        self.whole, self.name = whole, name

    def has(self, name: str) -> bool:
        """Whether the shard was saved."""
        return self.whole.has(f"{self.name}/{name}")

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors as the shard `name`."""
        self.whole.save(f"{self.name}/{name}", tensors)

    def load(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Load the tensors of a shard."""
        return self.whole.load(f"{self.name}/{name}", device)

    def drop(self, name: str) -> None:
        """Delete a shard."""
        self.whole.drop(f"{self.name}/{name}")

    def has_json(self, name: str) -> bool:
        """Whether the JSON file was written."""
        return self.whole.has_json(f"{self.name}/{name}")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.whole.write_json(f"{self.name}/{name}", value)

    def read_json(self, name: str) -> Any:
        """Read a JSON file."""
        return self.whole.read_json(f"{self.name}/{name}")
