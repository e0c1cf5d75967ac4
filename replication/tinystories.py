"""Real text for two stages: a language model of TinyStories' openings, tuned to answer questions or to tell two classes apart.

What the second stage asks for is in openings that the first has not read: which word comes next, and whether a story is of
a she or of a he.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from replication.two_stage import Tuning, World
from whence.data.rows import Rows, make_rows
from whence.demo.tiny import BOS, EOS, PAD, UNK, make_llama, train_tokenizer
from whence.tasks import CausalLM, Classification
from whence.validate.settings import FILES, Setting, found
from whence.validate.trainer import Recipe

WORDS = 24

ASKED = "Question: which word follows '{}'? Answer:"
SHE = {"she", "her", "hers", "herself", "girl", "mom", "mommy", "sister", "princess", "lady", "daughter"}
HE = {"he", "his", "him", "himself", "boy", "dad", "daddy", "brother", "prince", "man", "son"}


@dataclass(frozen=True)
class Size:
    """Of a world.

    Trained in large batches at a small learning rate: at 0.01, in batches of 32, half of the rows' weight taken away moved the
    answers as far as all of it, in a direction of its own, which no derivative can predict.
    """

    rows: int = 384
    words: int = WORDS
    """Of a pretraining row."""
    tuning_rows: int = 256
    queries: int = 48
    vocabulary: int = 400
    width: int = 32
    layers: int = 2
    pretraining: Recipe = Recipe(0.003, 14, 96, "momentum", schedule="cosine")
    questions: Recipe = Recipe(0.005, 8, 32, "momentum", schedule="cosine")
    classes: Recipe = Recipe(0.01, 6, 64, "momentum", weight_decay=1e-3, schedule="cosine")
    head: Recipe = Recipe(0.1, 16, 64, "momentum", weight_decay=1e-2, schedule="cosine")


SMALL = Size()
TINY = Size(24, WORDS, 12, 6, 120, 8, 1, *(Recipe(0.01, 1, 8, "momentum") for _ in range(4)))


def make_world(data: Path, seed: int, size: Size = SMALL) -> World:
    """Openings of stories that are drawn with the seed, and three trainings that may follow: questions, classes twice.

    Raises UsageError where the folder `data` has no TinyStories.
    """
    lines = found(data, FILES["lm"][0]).read_text(encoding="utf-8").splitlines()
    stories = [" ".join(json.loads(line)["text"].split()) for line in lines]
    tokenizer = train_tokenizer([*stories, *[ASKED.format("")] * 9], "words", (BOS, EOS, UNK, PAD), vocab_size=size.vocabulary)
    draw = random.Random(seed)
    draw.shuffle(stories)
    openings = list(dict.fromkeys(filter(None, (opening(tokenizer, story, size.words) for story in stories))))
    train, others = openings[: size.rows], openings[size.rows :]
    length = 2 * size.words

    def model(seed: int) -> nn.Module:
        llama = make_llama(tokenizer, seed, size.width, 2 * size.width, size.layers, 2, length, spread=size.width**-0.5)
        llama.set_attn_implementation("eager")  # plain attention, which `vmap` knows how to batch
        return llama

    task = CausalLM(tokenizer, max_length=length)
    pretraining = Setting(
        "tinystories",
        f"TinyStories: Llama of {size.layers} layers, {size.width} wide, {len(tokenizer)} words, texts of {size.words}",
        model,
        task,
        rows_of({"text": text} for text in train),
        rows_of({"text": text} for text in others[-size.queries :]),
        size.pretraining,
        "*",
    )
    few = size.tuning_rows + size.queries
    questions = list(itertools.islice(filter(None, (question(tokenizer, text, draw) for text in others)), few))
    classes = list(itertools.islice(filter(None, map(told, others)), few))
    classifying = Classification(tokenizer, ["she", "he"], max_length=length)

    def split(rows: Sequence[dict[str, Any]]) -> tuple[Rows, Rows]:
        return rows_of(rows[: size.tuning_rows]), rows_of(rows[size.tuning_rows :])

    def classifier(frozen: bool) -> Any:
        return lambda pretrained: with_head(pretrained, seed, frozen)

    same = Tuning("questions", "which word follows; the same head", lambda own: own, task, *split(questions), size.questions)
    full = Tuning(
        "classes", "she or he; a new head, all is trained", classifier(False), classifying, *split(classes), size.classes
    )
    head = Tuning(
        "classes, frozen trunk",
        "she or he; only the new head is trained",
        classifier(True),
        classifying,
        *split(classes),
        size.head,
    )
    return World(pretraining, {each.name: each for each in (same, full, head)}, seed)


def with_head(pretrained: nn.Module, seed: int, frozen: bool) -> nn.Module:
    """A classifier of two classes on the pretrained trunk, with a head that is drawn by the seed."""
    from transformers import LlamaForSequenceClassification

    config = type(pretrained.config)(**{**pretrained.config.to_dict(), "num_labels": 2})  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config).eval()
    model.set_attn_implementation("eager")
    model.model.load_state_dict(pretrained.model.state_dict())  # type: ignore[union-attr]
    model.model.requires_grad_(not frozen)
    return model


def rows_of(rows: Any) -> Rows:
    """As data."""
    return make_rows(list(rows), origin="tinystories")


def opening(tokenizer: Any, story: str, words: int) -> str | None:
    """The first tokens of a story; None for one of fewer."""
    offsets = tokenizer(story[: 20 * words], return_offsets_mapping=True)["offset_mapping"]
    return story[: offsets[words - 1][1]] if len(offsets) >= words else None


def question(tokenizer: Any, text: str, draw: random.Random) -> dict[str, str] | None:
    """Which word follows the beginning of a text, where it is one that the tokenizer knows."""
    words = text.split()
    places = [
        n
        for n in range(5, min(12, len(words)))
        if words[n].isalpha() and tokenizer.unk_token_id not in tokenizer(f" {words[n]}")["input_ids"]
    ]
    if not places:
        return None
    at = draw.choice(places)
    return {"prompt": ASKED.format(" ".join(words[:at])), "completion": f" {words[at]}"}


def told(text: str) -> dict[str, Any] | None:
    """The text, and whether it is of a she (0) or of a he (1); None where it is of both or of neither."""
    words = {word.lower() for word in re.findall(r"\w+", text)}
    return None if bool(words & SHE) == bool(words & HE) else {"text": text, "label": int(bool(words & HE))}
