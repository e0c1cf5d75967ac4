"""Which examples go into a batch together."""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(sizes: Sequence[int], max_tokens: int, max_examples: int | None = None) -> list[list[int]]:
    """Group examples of similar size, so that a padded batch holds at most `max_tokens` positions.

    Deterministic: the longest first, the earlier of two equals first. An example longer than `max_tokens` is a batch of
    its own; one of size 0 is in none. Long examples come first, so that a run that doesn't fit fails at once.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted((i for i, size in enumerate(sizes) if size > 0), key=lambda i: (-sizes[i], i)):
        count = len(batches[-1]) + 1 if batches else 0
        if batches and longest * count <= max_tokens and (max_examples is None or count <= max_examples):
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = sizes[index]
    return batches
