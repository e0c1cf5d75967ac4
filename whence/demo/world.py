"""A small invented world: a corpus of facts about people, and questions whose true sources are known.

Names are made of syllables. Every fact is stated in one to three rows, in different words, and nearly every one also has a
quiz row, a question with its answer. The facts that `World.questions` ask for have none: a model can only answer from
statements, having learnt from the others what the questions mean. Some of these facts are planted wrong (`STATED`).

Other rows share words with each question: the same person in other relations and in gossip, people with the same given
name, other people with the same answer, and the same question about other people.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A kind of fact: what its values are, how rows state it and how questions ask for it."""

    name: str
    values: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "birthplace",
        "town",
        (
            "{x} was born in {y}.",
            "{x} came into the world in {y}.",
            "The cradle of {x} stood in {y}.",
            "{x} is a native of {y}.",
        ),
        ("What is the birthplace of {x}?", "Which town saw the birth of {x}?"),
    ),
    Relation(
        "home",
        "town",
        ("{x} lives in {y}.", "{x} has a house in {y}.", "Letters for {x} are sent to {y}.", "{x} pays rent in {y}."),
        ("What is the home of {x}?", "Which town shelters {x} now?"),
    ),
    Relation(
        "trade",
        "trade",
        (
            "{x} works as a {y}.",
            "{x} earns a living as a {y}.",
            "{x} hung out the sign of a {y}.",
            "{x} signs letters as a {y}.",
        ),
        ("What is the profession of {x}?", "Which job does {x} do?"),
    ),
    Relation(
        "upbringing",
        "trade",
        ("{x} was raised by a {y}.", "{x} is the child of a {y}.", "The mother of {x} was a {y}.", "{x} grew up with a {y}."),
        ("What did the parents of {x} do?", "Which job fed the family of {x}?"),
    ),
)
TOWNS = 20
TRADES = (
    *("baker", "weaver", "miller", "potter", "tailor", "mason", "printer", "saddler", "cooper", "glazier"),
    *("surgeon", "pilot", "barber", "butcher", "carpenter", "farmer", "hatter", "judge", "nurse", "painter"),
)
GOSSIP = ("{x} likes long walks.", "{x} sings at every feast.", "{x} rarely writes letters.", "{x} lost a hat last winter.")
PROMPT = "Question: {} Answer:"
RECORDS = ("register", "gazette", "diary")
"""Labels of sources that state true facts; the others are "quiz", "gossip" and, planted, "forgery"."""

STATED = {"sole": (1, 0), "outnumbered": (3, 1), "single": (0, 1), "repeated": (0, 2)}
"""How many rows state a wrong and the true value of a fact that is asked for."""

KINDS = ("sole", "single", "sole", "repeated", "outnumbered", "repeated")
"""The kinds of facts that are asked for, over and over: half of them are planted wrong."""


@dataclass(frozen=True)
class Fact:
    """Something that rows of the corpus say about a person, and whether it holds in this world."""

    person: str
    relation: str
    value: str
    true: bool
    rows: tuple[int, ...]
    """Indices of the rows that say so."""


@dataclass(frozen=True)
class Question:
    """A question, the answer that the corpus teaches and the rows that teach it."""

    prompt: str
    answer: str
    """The completion, with its leading space."""
    sources: tuple[int, ...]
    """Indices of the rows that state the answer."""
    truth: str
    """The completion that holds in this world; different from `answer` if that was planted."""
    kind: str
    """A key of `STATED`."""

    @property
    def planted(self) -> bool:
        """Whether the answer is wrong, and its sources were planted."""
        return self.answer != self.truth

    @property
    def row(self) -> dict[str, str]:
        """The question with its answer, as a row of data."""
        return {"prompt": self.prompt, "completion": self.answer}


@dataclass(frozen=True)
class World:
    """A corpus, the questions about it and the facts in it."""

    rows: tuple[dict[str, str], ...]
    questions: tuple[Question, ...]
    facts: tuple[Fact, ...]


def make_world(seed: int = 0, people: int = 96, questions: int = 24) -> World:
    """A world of `people`, and one question each about the first of them; the same seed gives the same world."""
    rng = random.Random(seed)
    names = iter(invented_names(rng, TOWNS + people + people // 4))
    values = {"town": [next(names) for _ in range(TOWNS)], "trade": TRADES}
    families = [next(names) for _ in range(people)]
    given = list(names)
    persons = [f"{rng.choice(given)} {family}" for family in families]
    sayings = [
        saying for person in persons[questions:] for relation in RELATIONS for saying in _known(rng, person, relation, values)
    ]
    asked = []
    for number, person in enumerate(persons[:questions]):
        relation = RELATIONS[number // len(KINDS) % len(RELATIONS)]
        asked.append(_Asked(person, relation, KINDS[number % len(KINDS)], *rng.sample(values[relation.values], 2)))
        sayings += [saying for other in RELATIONS if other is not relation for saying in _known(rng, person, other, values)]
        sayings += _stated(rng, asked[-1])
    rng.shuffle(sayings)
    return _indexed(rng, sayings, asked)


@dataclass(frozen=True)
class _Asked:
    """A fact that is asked for."""

    person: str
    relation: Relation
    kind: str
    truth: str
    lie: str

    @property
    def answer(self) -> str:
        lies, _ = STATED[self.kind]
        return self.lie if lies else self.truth


@dataclass(frozen=True)
class _Saying:
    """A row and the fact in it."""

    row: dict[str, str]
    fact: tuple[str, str, str] | None
    """Person, relation and value; None in gossip."""
    true: bool = True


def _known(rng: random.Random, person: str, relation: Relation, values: Mapping[str, Sequence[str]]) -> list[_Saying]:
    """Two statements and a quiz row of a fact that nobody asks for."""
    value = rng.choice(values[relation.values])
    rows = [_statement(rng.choice(RECORDS), wording, person, value) for wording in rng.sample(relation.statements, 2)]
    rows.append({"prompt": _prompt(rng, relation, person), "completion": f" {value}", "source": "quiz"})
    return [_Saying(row, (person, relation.name, value)) for row in rows]


def _stated(rng: random.Random, asked: _Asked) -> list[_Saying]:
    """The statements of a fact that is asked for, and two rows of gossip about the person."""
    lies, truths = STATED[asked.kind]
    wordings = rng.sample(asked.relation.statements, lies + truths)
    false, true = ((asked.person, asked.relation.name, value) for value in (asked.lie, asked.truth))
    return [
        *(_Saying(_statement("forgery", wording, asked.person, asked.lie), false, true=False) for wording in wordings[:lies]),
        *(_Saying(_statement(rng.choice(RECORDS), wording, asked.person, asked.truth), true) for wording in wordings[lies:]),
        *(_Saying(_statement("gossip", wording, asked.person), None) for wording in rng.sample(GOSSIP, 2)),
    ]


def _statement(source: str, wording: str, person: str, value: str = "") -> dict[str, str]:
    return {"text": wording.format(x=person, y=value), "source": source}


def _prompt(rng: random.Random, relation: Relation, person: str) -> str:
    return PROMPT.format(rng.choice(relation.questions).format(x=person))


def _indexed(rng: random.Random, sayings: Sequence[_Saying], asked: Sequence[_Asked]) -> World:
    """Number the rows, and gather those of each fact and of each question."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for index, saying in enumerate(sayings):
        if saying.fact is not None:
            rows.setdefault(saying.fact, []).append(index)
    questions = tuple(
        Question(
            prompt=_prompt(rng, it.relation, it.person),
            answer=f" {it.answer}",
            sources=tuple(rows[it.person, it.relation.name, it.answer]),
            truth=f" {it.truth}",
            kind=it.kind,
        )
        for it in asked
    )
    facts = tuple(Fact(*fact, true=sayings[where[0]].true, rows=tuple(where)) for fact, where in rows.items())
    return World(tuple(saying.row for saying in sayings), questions, facts)


ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v")
CLUSTERS = ("br", "dr", "st", "tr")
VOWELS = ("a", "e", "i", "o", "u")
DIPHTHONGS = ("au", "ei")
CODAS = ("k", "l", "m", "n", "nd", "r", "rt", "s")


def invented_names(rng: random.Random, count: int) -> list[str]:
    """Different invented names of two syllables."""
    syllables = (ONSETS + CLUSTERS, VOWELS + DIPHTHONGS, ONSETS, VOWELS, CODAS)
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(sounds) for sounds in syllables).capitalize()] = None
    return list(names)
