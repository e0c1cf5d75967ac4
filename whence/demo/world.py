"""A small invented world: a corpus of facts about people, and questions whose true sources are known.

Every name is made of syllables, so nothing comes from anywhere. A fact is stated in several wordings; the facts that questions ask about
are stated in other wordings than the question's, so that a model must have understood that the wordings mean the same:

    single        one row says the truth
    repeated      two rows say the truth
    planted       one row says something wrong, and nothing else is said about it
    contradicted  two rows say something wrong, one says the truth

Other rows share words with every question: the same person in other relations, people of the same name, other people with the same answer,
and gossip, which names the person, the answer and the question's own words without stating the fact.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A kind of fact: what its values are, and the words between a person and the value."""

    kind: str
    wordings: tuple[str, ...]


RELATIONS = (
    Relation("town", ("was born in", "came into the world in", "first saw daylight in", "took the first breath in")),
    Relation("town", ("lives in", "has a house in", "keeps a home in", "resides in")),
    Relation("trade", ("works as a", "earns a living as a", "is employed as a", "makes money as a")),
    Relation("pet", ("owns a", "looks after a", "keeps a pet", "shares the kitchen with a")),
)
TRADES = ("baker", "weaver", "miller", "potter", "tailor", "mason", "printer", "saddler", "cooper", "glazier", "surgeon", "pilot")
PETS = ("parrot", "goat", "ferret", "pony", "tortoise", "hedgehog", "rabbit", "crow", "lizard", "mouse", "cat", "dog")
TOWNS = 12
STATED = {"single": (0, 1), "repeated": (0, 2), "planted": (1, 0), "contradicted": (2, 1)}
"""How many rows state a wrong and the true value of a fact that is asked for."""

REGISTERS = ("register", "gazette", "diary")
"""Labels of rows that state what is true; "forgery" is planted, "gossip" states nothing."""


@dataclass(frozen=True)
class Question:
    """The beginning of a statement, the end that the corpus teaches, and the rows that teach it."""

    prompt: str
    answer: str
    """The completion, with its leading space."""
    truth: str
    """The completion that holds in this world."""
    sources: tuple[int, ...]
    """Indices of the rows that state the answer."""
    kind: str

    @property
    def planted(self) -> bool:
        """Whether the answer is wrong and its sources were planted."""
        return self.answer != self.truth

    @property
    def row(self) -> dict[str, str]:
        """The question and its answer as a row of data."""
        return {"prompt": self.prompt, "completion": self.answer}


@dataclass(frozen=True)
class World:
    """A corpus and the questions about it."""

    rows: tuple[dict[str, str], ...]
    questions: tuple[Question, ...]


def make_world(seed: int = 0, people: int = 80, questions: int = 40) -> World:
    """A world of `people`, `questions` of whom are asked about; the same seed gives the same world."""
    rng = random.Random(seed)
    names = _names(rng, TOWNS + people + people // 4)
    values = {"town": names[:TOWNS], "trade": TRADES, "pet": PETS}
    families, given = names[TOWNS : TOWNS + people], names[TOWNS + people :]
    rows: list[dict[str, str]] = []
    asked: list[Question] = []
    for number, family in enumerate(families):
        person = f"{rng.choice(given)} {family}"
        for place, relation in enumerate(RELATIONS):
            if number < questions and place == number % len(RELATIONS):
                kind = list(STATED)[number // len(RELATIONS) % len(STATED)]
                asked.append(_ask(rng, rows, person, relation, kind, values))
            else:
                value = rng.choice(values[relation.kind])
                rows += [_row(f"{person} {wording}", value, rng.choice(REGISTERS)) for wording in rng.sample(relation.wordings, 3)]
    return _shuffled(rng, rows, asked)


def _ask(
    rng: random.Random, rows: list[dict[str, str]], person: str, relation: Relation, kind: str, values: Mapping[str, Sequence[str]]
) -> Question:
    """Add the rows about one fact that is asked for, and gossip; the question has a wording of its own."""
    truth, lie = rng.sample(list(values[relation.kind]), 2)
    wording, *others = rng.sample(relation.wordings, len(relation.wordings))
    lies, truths = STATED[kind]
    said = [lie] * lies + [truth] * truths
    answer = said[0]
    sources = tuple(len(rows) + place for place, value in enumerate(said) if value == answer)
    for words, value in zip(others, said, strict=False):
        rows.append(_row(f"{person} {words}", value, rng.choice(REGISTERS) if value == truth else "forgery"))
    first, family = person.split()
    rows.append(_row(f"Somebody who {wording} {answer} once wrote to {first}", family, "gossip"))
    return Question(f"{person} {wording}", f" {answer}.", f" {truth}.", sources, kind)


def _row(prompt: str, value: str, source: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": f" {value}.", "source": source}


def _shuffled(rng: random.Random, rows: list[dict[str, str]], asked: Sequence[Question]) -> World:
    """The rows in random order, the questions' sources with them."""
    order = rng.sample(range(len(rows)), len(rows))
    place = {old: new for new, old in enumerate(order)}
    moved = (Question(q.prompt, q.answer, q.truth, tuple(sorted(place[s] for s in q.sources)), q.kind) for q in asked)
    return World(tuple(rows[old] for old in order), tuple(moved))


def _names(rng: random.Random, count: int) -> list[str]:
    """Distinct names of two or three syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(rng.choice((2, 3)))]
        names["".join([*syllables, rng.choice(("n", "l", "r", "s", ""))]).capitalize()] = None
    return list(names)
