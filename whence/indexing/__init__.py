"""An index: what every training example taught, in a kilobyte or so."""

from whence.indexing.build import add_rows, build_index, build_index_at
from whence.indexing.index import Index, open_index

__all__ = ["Index", "add_rows", "build_index", "build_index_at", "open_index"]
