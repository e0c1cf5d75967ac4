"""An index of projected gradients: what a training example taught, in a few kilobytes."""

from whence.indexing.build import build_index
from whence.indexing.index import Index, open_index

__all__ = ["Index", "build_index", "open_index"]
