"""Whether the rows that come first share words with the question: small models match words, large ones ideas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from whence.filter.texts import words_of
from whence.store.scores import Scores

RARE = 0.1
"""A keyword is a word that at most this share of the rows have."""

SAMPLE = 20_000
"""Rows that stand for all where there are more: every second, every third ..."""

SHOWN = 20
"""Keywords that are named at most, the rarest first."""


@dataclass(frozen=True)
class Keywords:
    """The keywords of a part of a query, and how many of its top rows have one or more of them."""

    part: str
    """"prompt" or "answer"; "text" of a query without an answer."""
    words: tuple[str, ...]
    top: int
    rows: int
    """How many rows are the top."""
    share: float
    """Of all rows that have a keyword."""
    p_value: float
    """The probability of so many or more in as many random rows (hypergeometric)."""

    @property
    def expected(self) -> float:
        """How many random rows would have one."""
        return self.share * self.rows

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "words": list(self.words), "expected": self.expected}


def keyword_overlap(scores: Scores, k: int = 10) -> list[tuple[Keywords, ...]]:
    """For each query, its prompt's and its answer's keywords and how many of its `k` highest rows have one.

    A word of the answer that is in the prompt counts as the prompt's. Parts without a keyword are left out.
    """
    from scipy.stats import hypergeom

    asked = [_parts(query) for query in scores.queries.to_dict("records")]
    known = {word for parts in asked for words in parts.values() for word in words}
    texts = list(scores.examples["text"])
    drawn = [known & set(words_of(text)) for text in texts[:: -(-len(texts) // SAMPLE)]] if known else []
    counts = Counter(word for words in drawn for word in words)
    found = []
    for number, parts in enumerate(asked):
        first = [set(words_of(text)) for text in scores.top(number, k)["text"]] if any(parts.values()) else []
        of_query = []
        for part, words in parts.items():
            keywords = {word for word in words if 0 < counts[word] <= RARE * len(drawn)}
            if not keywords:
                continue
            every, top = (sum(bool(keywords & own) for own in rows) for rows in (drawn, first))
            p_value = float(hypergeom.sf(top - 1, len(drawn), every, len(first)))
            named = sorted(keywords, key=lambda word: (counts[word], word))[:SHOWN]
            of_query.append(Keywords(part, tuple(named), top, len(first), every / len(drawn), p_value))
        found.append(tuple(of_query))
    return found


def _parts(query: Mapping[str, Any]) -> dict[str, set[str]]:
    """The words of each part of a query."""
    texts = {part: text for part in ("prompt", "completion") if isinstance(text := query.get(part), str)}
    if "completion" not in texts:
        return {"text": set(words_of(str(query["text"])))}
    prompt = set(words_of(texts.get("prompt", "")))
    return {"prompt": prompt, "answer": set(words_of(texts["completion"])) - prompt}
