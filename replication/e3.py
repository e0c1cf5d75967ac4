"""E3, a case study: which stories are behind three answers of a model that was pretrained on stories and tuned to questions.

    python -m replication.e3 --data ../shared/data

The pretrained model is stories260K, a real one of TinyStories; it is tuned to say which word follows. For each of three prompts
100 paragraphs are chosen by words (TF-IDF) and by embeddings (nearest neighbours), and scored through both stages, token by
token. The best 16 are shown raw, per token of their length and as cosines, with flags for what looks like an artefact of length
or of repetition. Writes e3.html, e3.png, e3.json and e3.md.
"""

from __future__ import annotations

import argparse
import html
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import whence
from benchmarks.command import run
from replication.tinystories import ASKED, question
from whence.data.rows import make_rows
from whence.engine.point import Point
from whence.filter.embeddings import nearness
from whence.filter.tfidf import tfidf_scores
from whence.plots.style import LOWERS, RAISES, figure, save
from whence.show.tokens import merge_special
from whence.stages import Stage, multistage
from whence.store.files import atomic
from whence.store.scores import Scores
from whence.tasks import CausalLM
from whence.validate.results import Result, Row
from whence.validate.settings import FILES, found
from whence.validate.trainer import Recipe, recorded

PROMPTS = (
    ("Once upon a time, there was a little girl named", "Lily"),
    ("The bird wanted to fly high up in the", "sky"),
    ("Tom was hungry, so his mom gave him an", "apple"),
)
"""What is asked about, and the word whose log-probability is traced."""

TOP, CHOSEN, LENGTH, SHORTEST = 16, 100, 128, 5
"""Rows that are shown of each ranking, that are chosen of each prompt; tokens of a row at most, and words at least."""
SPARSE = 2 / 3
"""Of `|a|_2 / |a|_1` over the tokens of a row, from which one token carries it (Grosse et al. 2023, appendix)."""
REPEATED = 0.2
"""Share of a row's runs of four words that are not its first of the kind, from which it repeats itself."""
SHORT, LONG = 0.1, 0.9
"""Quantiles of the candidates' lengths at and beyond which a row's rank may be that of its length."""

RECIPE = Recipe(0.001, 4, 16, "momentum", schedule="cosine")


@dataclass(frozen=True)
class Study:
    """What is shown."""

    scores: Scores
    candidates: list[np.ndarray]
    """Of each prompt: columns of the scores."""
    length: np.ndarray
    cosine: np.ndarray
    """The same scores per token of a row, and as cosines, `[Q, N]`."""


def replica(chosen: argparse.Namespace) -> Result:
    """Everything, in order."""
    rows, tuned_rows, sample, length = (40, 8, 8, 96) if chosen.tiny else (1000, 192, 96, LENGTH)
    model, tokenizer = whence.load_model(found(chosen.data / "models", "stories260K/hf/config.json").parent)
    task = CausalLM(tokenizer, max_length=length)
    lines = found(chosen.data, FILES["lm"][0]).read_text(encoding="utf-8").splitlines()
    stories = [json.loads(line)["text"] for line in lines]
    paragraphs = [each.strip() for text in stories for each in text.split("\n") if len(each.split()) >= SHORTEST]
    train = make_rows([{"text": text} for text in paragraphs[:rows]], origin="tinystories")
    draw = random.Random(0)
    asked = (question(tokenizer, " ".join(text.split()[:24]), draw) for text in stories[-1000:])
    tuning = make_rows([row for row in asked if row][:tuned_rows], origin="tinystories")
    queries = make_rows([{"prompt": ASKED.format(a), "completion": f" {b}"} for a, b in PROMPTS], origin="prompts")
    recipe = RECIPE if not chosen.tiny else Recipe(0.002, 1, 8, "momentum")
    steps = recipe.steps(len(tuning))
    training = recorded(model, task, tuning, recipe, start="given", checkpoints=[steps], progress="")
    tuned, _ = whence.load_model(found(chosen.data / "models", "stories260K/hf/config.json").parent)
    training.checkpoints[-1].load(tuned)

    places = [candidates(model, tokenizer, prompt, answer, train, min(CHOSEN, rows)) for prompt, answer in PROMPTS]
    union = sorted({int(place) for each in places for place in each})
    pretraining = whence.fit(model, task, train, examples=sample, eigenvalue_examples=sample)
    finetuning = whence.fit(tuned, task, tuning, examples="all", eigenvalue_examples="all")
    stages = [
        Stage("pretraining", Point(model, task, train.take(union)), pretraining, n_train=len(train)),
        Stage("finetuning", Point(tuned, task, tuning), finetuning, training),
    ]
    scores = multistage(stages, queries, per="token", norms=("cosine",)).stages["pretraining"]
    columns = [np.array([union.index(int(place)) for place in each]) for each in places]
    study = Study(scores, columns, scores.normalised("length").raw, scores.normalised("cosine").raw)
    tables = {f"{prompt} ... {answer}": table(study, number) for number, (prompt, answer) in enumerate(PROMPTS)}
    with atomic(chosen.out / "e3.html") as temporary:
        temporary.write_text(page(study, tables), encoding="utf-8")
    save(picture(study, tables), chosen.out / "e3.png")
    measured = [float(value) for value in scores.queries["measured"]]
    weights, rates = sum(p.numel() for p in model.parameters()), training.learning_rates.sum()
    says = [
        f"Pretrained: stories260K, {weights:,} weights; {len(train)} paragraphs of real stories, cut to {length} tokens; "
        f"tuned on {len(tuning)} questions, learning rates of {rates:.3g} together",
        "Log p of the answers: " + ", ".join(f"{b!r} {value:.2f}" for (_, b), value in zip(PROMPTS, measured, strict=True)),
        f"Of each prompt {CHOSEN} paragraphs by TF-IDF and nearest neighbours, the best {TOP} of each ranking; "
        f"flags: {flag_counts(tables)}",
        f"Of the raw top {TOP} are in the top {TOP} per token {overlap(study, study.length)}, and as cosines "
        f"{overlap(study, study.cosine)}; correlation of raw values with length: {lengths(study)}",
        "Token heat maps: e3.html, e3.png",
    ]
    return Result("e3", {"prompts": [list(each) for each in PROMPTS]}, tables, says, heading="E3: a case study")


def candidates(model: Any, tokenizer: Any, prompt: str, answer: str, train: Any, count: int) -> np.ndarray:
    """Rows that are near in words or in the model's mean hidden state: half of each, each once."""
    asked, texts = f"{prompt} {answer}", [row["text"] for row in train]
    words = np.argsort(-tfidf_scores([asked], texts).raw[0], kind="stable")
    near = np.argsort(-nearness(embedded(model, tokenizer, [asked]), embedded(model, tokenizer, texts))[0], kind="stable")
    taken = dict.fromkeys(int(row) for pair in zip(words, near, strict=True) for row in pair)
    return np.array(list(taken)[:count])


@torch.no_grad()
def embedded(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Mean last hidden states of the first 64 tokens, `[n, D]`."""
    ids = (torch.tensor([tokenizer(text)["input_ids"][:64]]) for text in texts)
    return torch.stack([model.model(each).last_hidden_state[0].mean(0) for each in ids]).numpy()


# tables


def table(study: Study, query: int) -> list[Row]:
    """The rows that are among the best of any of the rankings, with their rank in each, and flags."""
    own = study.candidates[query]
    ranks = {name: ranked(values[query][own]) for name, values in rankings(study).items()}
    best = sorted(
        (place for place in range(len(own)) if min(rank[place] for rank in ranks.values()) <= TOP),
        key=lambda place: ranks["raw"][place],
    )
    return [
        {
            **{f"rank, {name}": int(rank[place]) for name, rank in ranks.items()},
            "nats per copy": float(study.scores.values[query, own[place]]),
            "tokens": int(study.scores.examples["tokens"].iloc[own[place]]),
            "flags": ", ".join(flags(study, query, int(own[place]))),
            "text": shortened(study.scores.examples["text"].iloc[own[place]]),
            "id": study.scores.example_ids[own[place]],
        }
        for place in best
    ]


def rankings(study: Study) -> dict[str, np.ndarray]:
    """Values `[Q, N]` of each ranking."""
    return {"raw": study.scores.raw, "per token": study.length, "cosine": study.cosine}


def ranked(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the highest value first."""
    return np.argsort(np.argsort(-values, kind="stable"), kind="stable") + 1


def flags(study: Study, query: int, column: int) -> list[str]:
    """What speaks against a row: its length, that it repeats itself, or that one token carries it."""
    every = study.scores.examples["tokens"].to_numpy()
    here, text = every[column], study.scores.examples["text"].iloc[column]
    tokens = study.scores.token_scores(query, column)
    found = []
    if np.quantile(every, SHORT) < np.quantile(every, LONG):
        found += ["short"] if here <= np.quantile(every, SHORT) else ["long"] if here > np.quantile(every, LONG) else []
    runs = Counter(zip(*(text.lower().split()[start:] for start in range(4)), strict=False))
    if runs and 1 - len(runs) / runs.total() > REPEATED:
        found.append("repeats itself")
    if np.linalg.norm(tokens) > SPARSE * np.abs(tokens).sum():
        found.append("one token")
    return found


def shortened(text: str, length: int = 100) -> str:
    """The beginning of a text on one line, for a table."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= length else f"{text[:length]}..."


def flag_counts(tables: dict[str, list[Row]]) -> str:
    """How many of the rows that are shown have each flag."""
    counts = Counter(flag for rows in tables.values() for row in rows for flag in row["flags"].split(", ") if flag)
    return ", ".join(f"{flag} {count}" for flag, count in counts.most_common()) or "none"


def overlap(study: Study, other: np.ndarray) -> str:
    """How many of the best of the raw ranking are among the best of the other, for each prompt."""
    found = []
    for query, own in enumerate(study.candidates):
        raw, there = (set(np.argsort(-values[query][own], kind="stable")[:TOP]) for values in (study.scores.raw, other))
        found.append(str(len(raw & there)))
    return ", ".join(found)


def lengths(study: Study) -> str:
    """Correlation of the size of raw values with the number of tokens, for each prompt."""
    tokens = study.scores.examples["tokens"].to_numpy()
    pairs = [(np.abs(study.scores.raw[query][own]), tokens[own]) for query, own in enumerate(study.candidates)]
    return ", ".join("none" if np.ptp(b) == 0 else f"{np.corrcoef(a, b)[0, 1]:.2f}" for a, b in pairs)


# heat maps


def page(study: Study, tables: dict[str, list[Row]]) -> str:
    """The rows with their tokens coloured: blue raises the answer, orange lowers it."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>E3: a case study</title><style>body{font:14px/1.6 sans-serif;"
        "max-width:60em;margin:2em auto;padding:0 1em}small{color:#555}p{margin:.4em 0 1em}</style><h1>E3: a case study</h1>"
        f"<p>Each token is coloured by what it does to the log-probability of the answer: <b style='color:{RAISES}'>blue raises"
        f"</b>, <b style='color:{LOWERS}'>orange lowers</b>. A token is coloured for being predicted.</p>"
    ]
    for query, (title, rows) in enumerate(tables.items()):
        parts.append(f"<h2>{html.escape(title)}</h2>")
        for row in rows:
            ranks = ", ".join(f"{key} {value}" for key, value in row.items() if key.startswith("rank"))
            flagged = f"; <b>{html.escape(row['flags'])}</b>" if row["flags"] else ""
            told = f"<small>{ranks}; {row['nats per copy']:.2e} nats per copy; {row['tokens']} tokens{flagged}</small>"
            parts.append(f"<div>{told}<p>{coloured(*tokens_of(study, query, row['id']))}</p></div>")
    return "\n".join(parts) + "\n"


def tokens_of(study: Study, query: int, name: str) -> tuple[list[str], np.ndarray]:
    """Tokens of a row, and what each does, as a share of the strongest."""
    values = study.scores.token_scores(query, name)
    pieces = list(study.scores.examples["pieces"].iloc[study.scores.column_of(name)])
    merged, sums = merge_special(pieces, values)
    strength = np.array(sums)
    return merged, strength / max(np.abs(strength).max(initial=0.0), 1e-300)


def coloured(pieces: Sequence[str], strength: np.ndarray) -> str:
    """Tokens in HTML."""
    found = []
    for piece, value in zip(pieces, strength, strict=True):
        red, green, blue = rgb(float(value))
        found.append(f"<span style='background:rgb({red},{green},{blue})'>{html.escape(piece)}</span>")
    return "".join(found)


def rgb(value: float) -> tuple[int, int, int]:
    """From white to the colour of what raises, or of what lowers."""
    full = RAISES if value > 0 else LOWERS
    share = 0.75 * min(1.0, abs(value))
    return tuple(round(255 + share * (int(full[at : at + 2], 16) - 255)) for at in (1, 3, 5))  # type: ignore[return-value]


def picture(study: Study, tables: dict[str, list[Row]], each: int = 3, width: int = 118, most: int = 3) -> Any:
    """The first rows of each prompt by cosine, as a picture."""
    drawing, axes = figure(11.0, 7.2, 3, 1)
    for query, (title, rows) in enumerate(tables.items()):
        own = axes[query]
        own.set_axis_off()
        own.set_title(title, fontsize=10, loc="left")
        own.set_xlim(0, width)
        own.set_ylim(each * (most + 1), 0)
        for place, row in enumerate(sorted(rows, key=lambda row: row["rank, cosine"])[:each]):
            line, column = place * (most + 1), 0
            own.text(0, line + 0.6, f"raw {row['rank, raw']}, cosine {row['rank, cosine']}", fontsize=8, color="#555555")
            line += 1
            for piece, value in zip(*tokens_of(study, query, row["id"]), strict=True):
                text = " ".join(piece.split("\n")).replace("$", "S")
                if column + len(text) > width:
                    line, column = line + 1, 0
                if line >= (place + 1) * (most + 1):
                    break
                shade = tuple(part / 255 for part in rgb(float(value)))
                own.add_patch(rectangle(column, line, len(text), shade))
                own.text(column, line + 0.72, text, fontsize=9.5, family="monospace")
                column += len(text)
    return drawing


def rectangle(x: float, y: float, width: float, colour: Any) -> Any:
    """A cell of the heat map."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, 0.9, facecolor=colour, edgecolor="none")


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    return run("replication.e3", __doc__ or "", replica, given)


if __name__ == "__main__":
    raise SystemExit(main())
