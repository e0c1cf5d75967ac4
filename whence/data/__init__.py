"""Text data as rows with stable ids, and batches of them."""

from whence.data.batches import plan_batches
from whence.data.content import content_id
from whence.data.load import as_rows, load_data
from whence.data.rows import Rows

__all__ = ["Rows", "as_rows", "content_id", "load_data", "plan_batches"]
