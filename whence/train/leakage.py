"""Which rows are held out of training to measure the loss on, and whether training rows give them away.

Rows whose texts are the same but for case, Unicode form and spaces are one group, and a group is never divided. What is
a matter of degree (rows that share most of their wording) is counted and reported.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whence.data.rows import Rows
from whence.errors import UsageError
from whence.progress import note

NGRAM = 5
"""Words in a row that are compared."""

NEAR = 0.7
"""Share of a row's n-grams, found in one training row, from which the two are near-duplicates (as Chowdhery et al. 2022)."""

COMMON = 0.05
"""Share of the rows from which an n-gram is boilerplate, such as that of a template, and says nothing."""

SHOWN = 5

WORDS = re.compile(r"\w+")
BLANK = re.compile(r"\s+")


@dataclass(frozen=True)
class Split:
    """Positions of the rows that are trained on and of those held out, both ascending, and what was found between them."""

    train: tuple[int, ...]
    evaluation: tuple[int, ...]
    leakage: dict[str, Any]


def split_rows(rows: Rows, usable: Iterable[int], share: float, limit: int | None, seed: int) -> Split:
    """Hold out about `share` of the usable rows, `limit` at most, drawn with the seed; one row at least stays in training.

    The leakage report counts rows that are kept with copies of themselves (`rows_with_copies`), rows held out whose text
    occurs in training (`copies`: none, or this is wrong), whose prompt does (`prompts`), and near-duplicates (`near`).
    """
    usable = list(usable)
    groups: dict[str, list[int]] = defaultdict(list)
    for index in usable:
        groups[plain_text(rows[index])].append(index)
    wanted = min(max(1, round(share * len(usable))), len(usable) - 1, limit or len(usable)) if share else 0
    order = list(groups.values())
    random.Random(f"split {seed}").shuffle(order)
    kept_out: list[int] = []
    for group in order:
        if len(kept_out) + len(group) <= wanted:
            kept_out += group
    out = set(kept_out)
    train, evaluation = tuple(index for index in usable if index not in out), tuple(sorted(out))
    if share and not evaluation:
        raise UsageError(
            "No row can be held out to measure the loss on: too many have the same text.",
            given=f"{len(usable):,} rows with {len(groups):,} different texts, evaluation={share}",
            fix="more varied data, or evaluation=0 (--evaluation 0)",
        )
    leakage = {"rows_with_copies": sum(len(group) for group in order if len(group) > 1), **_leaks(rows, train, evaluation)}
    _say(leakage, len(evaluation))
    return Split(train, evaluation, leakage)


def plain_text(row: Mapping[str, Any]) -> str:
    """The whole text of a row, prompt and completion joined, in lower case with single spaces."""
    if "messages" in row:
        text = "\n".join(message["content"] for message in row["messages"])
    else:
        text = "".join(row.get(part, "") for part in ("text", "prompt", "completion"))
    return _squeezed(text)


def near_duplicates(training: Sequence[str], others: Sequence[str]) -> dict[int, tuple[int, float]]:
    """For each of the other texts that a training text nearly holds: the nearest one, and the share of its n-grams there.

    N-grams that `COMMON` of the other texts have (three at least) are left out, as are texts of fewer than `NGRAM` words.
    Memory grows with the other texts only.
    """
    if not others:
        return {}
    grams = [_grams(text) for text in others]
    frequency = Counter(gram for found in grams for gram in found)
    boilerplate = {gram for gram, count in frequency.items() if count > max(2, COMMON * len(others))}
    holders: dict[int, list[int]] = defaultdict(list)
    sizes = []
    for number, found in enumerate(grams):
        sizes.append(len(found - boilerplate))
        for gram in found - boilerplate:
            holders[gram].append(number)
    nearest: dict[int, tuple[int, float]] = {}
    for place, text in enumerate(training):
        hits = Counter(number for gram in _grams(text) & holders.keys() for number in holders[gram])
        for number, count in hits.items():
            share = count / sizes[number]
            if share >= NEAR and share > nearest.get(number, (0, 0.0))[1]:
                nearest[number] = (place, share)
    return nearest


def _leaks(rows: Rows, train: Sequence[int], evaluation: Sequence[int]) -> dict[str, Any]:
    """Count what the held-out rows share with the training rows."""
    texts = {index: plain_text(rows[index]) for index in (*train, *evaluation)}
    known = {texts[index] for index in train}
    prompts = {_squeezed(rows[index]["prompt"]) for index in train if "prompt" in rows[index]}
    near = near_duplicates([texts[index] for index in train], [texts[index] for index in evaluation])
    shown = sorted(near.items(), key=lambda item: -item[1][1])[:SHOWN]
    return {
        "copies": sum(texts[index] in known for index in evaluation),
        "prompts": sum("prompt" in rows[index] and _squeezed(rows[index]["prompt"]) in prompts for index in evaluation),
        "near": len(near),
        "near_means": f"{NEAR:.0%} of the {NGRAM}-word sequences are in one training row",
        "near_pairs": [
            {"evaluation": rows.ids[evaluation[number]], "train": rows.ids[train[place]], "share": share}
            for number, (place, share) in shown
        ],
    }


def _say(leakage: Mapping[str, Any], evaluation: int) -> None:
    """Note what makes the loss on the held-out rows look better than it is."""
    if evaluation and leakage["rows_with_copies"]:
        note(f"{leakage['rows_with_copies']:,} rows have copies; copies are all trained on, or all held out")
    for count, what in ((leakage["prompts"], "have a prompt"), (leakage["near"], "have most of the wording")):
        if count:
            note(f"warning: {count:,} of {evaluation:,} rows held out {what} of a training row: their loss flatters the model")


def _squeezed(text: str) -> str:
    return BLANK.sub(" ", unicodedata.normalize("NFKC", text)).strip().casefold()


def _grams(text: str) -> set[int]:
    """Hashes of the n-grams of words; those of strings differ between processes, but only equality matters."""
    words = WORDS.findall(text)
    return {hash(tuple(words[start : start + NGRAM])) for start in range(len(words) - NGRAM + 1)}
