"""Answers with what made the model say them: per prompt, both answers and the training rows that score highest and lowest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.errors import StaleArtifact
from whence.progress import note
from whence.store.files import atomic

if TYPE_CHECKING:
    import pandas

    from whence.store.scores import Scores

FILE = "influential_examples.md"
SHOWN = 600
"""Characters of a training row that are shown."""

GUIDE = """# Answers and their influential examples

**How to read.** A row that *raises* an answer: more copies of it in the training data raise the answer's log-probability.
The number is the slope at the model's weights, in nats per copy: small ones are about what one more copy would have changed,
large ones give an order, not a size, and those that are more than log p can rise say so. One that *lowers* it is the
opposite. These are estimates, not proof: remove rows, train again and measure before you act. A row marked *generic* is at
the top for more than half of the prompts, and does not explain any one of them."""


def write_examples(out: Path, table: pandas.DataFrame, scores: Scores, top: int = 5) -> Path:
    """Write `OUT/influential_examples.md` from a comparison's rows and the scores of its answers.

    Prompts are matched by their text. A prompt without scores says so, and where another answer was scored than those that
    are compared, it is shown as what it is.
    """
    hubs = set(scores.hubs(top))
    sections, missing = [GUIDE], 0
    for number, row in enumerate(table.to_dict("records"), start=1):
        found = _queries_of(row, scores)
        missing += not found
        lines = [f"## {number}. {_inline(row['prompt'])}"]
        for name, who in (("Tuned", "tuned"), ("Base", "base"), ("Reference", "reference")):
            if isinstance(row[who], str):
                lines.append(f"**{name}**{_marks(row, who)}\n\n{_block(row[who])}")
        if not isinstance(row["base"], str):
            lines.append("No answer of the base model.")
        lines += [_of_query(query, row, scores, top, hubs) for query in found]
        if not found:
            lines.append("No scores for this prompt.")
        sections.append("\n\n".join(lines))
    if missing:
        note(f"{missing} of {len(table)} prompts have no scores: influential_examples.md says which")
    write_once(out / FILE, "\n\n".join(sections) + "\n")
    return out / FILE


def write_once(path: Path, text: str) -> None:
    """Write a file, or find it there with just this text; StaleArtifact where it holds another."""
    if not path.exists():
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    elif path.read_text(encoding="utf-8") != text:
        raise StaleArtifact(
            f"{path} was made from something else.",
            accepted="the answers and scores that it was made from; nothing was overwritten",
            fix="a different --out (Python: out=...)",
        )


def _queries_of(row: dict[str, Any], scores: Scores) -> list[int]:
    """Queries that ask about the answers to a prompt, each answer once; about another answer where there are no such."""
    prompts, completions = scores.queries["prompt"], scores.queries["completion"]
    same = {completions.iloc[query]: query for query in reversed(range(len(prompts))) if prompts.iloc[query] == row["prompt"]}
    known = [query for said, query in same.items() if said in (row["tuned"], row["base"], row["reference"])]
    return sorted(known or same.values())


def _marks(row: dict[str, Any], who: str) -> str:
    """What was measured of an answer, in brackets."""
    forms = {"logprob": "log p {:.2f} nats", "bleu": "BLEU {:.1f}", "rougeL": "ROUGE-L {:.2f}"}
    known = ((row.get(f"{key}_{who}"), form) for key, form in forms.items())
    said = [form.format(value) for value, form in known if value is not None and value == value]
    return f" ({', '.join(said)})" if said else ""


def _of_query(query: int, row: dict[str, Any], scores: Scores, top: int, hubs: set[str]) -> str:
    """The rows that raise and lower a query most, and whose answer that is."""
    completion = scores.queries["completion"].iloc[query]
    whose = next((name for name in ("tuned", "base", "reference") if row[name] == completion), None)
    head = f"### What made it say so: the {'reference' if whose == 'reference' else f'{whose} answer'}"
    lines = [head if whose else f"### What made it say so: a different answer, which was scored\n\n{_block(str(completion))}"]
    for lowest in (False, True):
        for found in scores.top(query, top, lowest=lowest).to_dict("records"):
            if found["effect"] != ("lowers" if lowest else "raises"):
                continue
            room = scores.room(query)
            limit = f"; beyond first order, it can change by {room:.3g} at most" if found["beyond_first_order"] else ""
            generic = ", *generic*" if found["id"] in hubs else ""
            origin = f", {_inline(str(found['source']))}" if isinstance(found["source"], str) else ""
            lines.append(
                f"**{found['rank']}** {found['effect']} it by {abs(found['value']):.3g} {scores.unit} "
                f"({found['share']:.1%} of all{limit}): row `{found['id']}`{origin}{generic}\n\n{_block(found['text'])}"
            )
    return "\n\n".join(lines)


def _inline(text: str) -> str:
    """A text on one line of Markdown, as it is."""
    short = " ".join(text.split())
    short = short if len(short) <= 100 else f"{short[:97]}..."
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", short)


def _block(text: str) -> str:
    """A text as a block of Markdown that shows it as it is, whatever is in it."""
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"
