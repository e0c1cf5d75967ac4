"""Models that turn a text into a vector: they are asked for that alone, and have no loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from whence.linalg.similarity import masked_mean
from whence.settings import Length, valid
from whence.store.fingerprint import fingerprint_tokenizer
from whence.store.scores import row_text
from whence.tasks.base import Batch, Task
from whence.tasks.context import check_tokens
from whence.tasks.tokens import pad, padding_id


class TextEncoder(Task):
    """The mean of an encoder's last hidden states over a text's tokens (Reimers and Gurevych 2019, MEAN pooling)."""

    def __init__(self, tokenizer: Any, max_length: int = 512):
        self.tokenizer, self.max_length = tokenizer, valid(Length, max_length, "max_length")

    def encode(self, rows: Sequence[Any]) -> list[np.ndarray]:
        """Token ids of each row's text, cut at the maximum length."""
        found = self.tokenizer([row_text(row) for row in rows], truncation=True, max_length=self.max_length)
        return [np.asarray(ids, dtype=np.int64) for ids in found["input_ids"]]

    def examine(self, model: nn.Module, items: Sequence[np.ndarray], names: Sequence[str]) -> None:
        """Refuse texts with tokens that the encoder has no embedding for."""
        check_tokens(model, self.tokenizer, [[ids] for ids in items], names)

    def collate(self, items: Sequence[np.ndarray]) -> Batch:
        """Batch items: `input_ids` and `attention_mask`, int64 `[B, T]`."""
        mask = [np.ones_like(ids) for ids in items]
        return {"input_ids": pad(items, padding_id(self.tokenizer)), "attention_mask": pad(mask, 0)}

    def size(self, item: np.ndarray) -> int:
        """Count the tokens."""
        return len(item)

    def embeddings(self, model: nn.Module, batch: Batch) -> Tensor:
        """The vector of each text, `[I, B]`."""
        return masked_mean(model(**batch).last_hidden_state.float(), batch["attention_mask"]).T

    def settings(self) -> dict[str, Any]:
        """What decides the vectors."""
        return super().settings() | {"tokenizer": fingerprint_tokenizer(self.tokenizer), "max_length": self.max_length}
