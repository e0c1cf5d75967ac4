"""Small settings that a laptop can retrain hundreds of times: data, a model and a recipe each.

Digits and diabetes come with scikit-learn. The others are read from a folder of the user's (`data=`): UCI's Concrete and
Energy as in Hernandez-Lobato & Adams 2015, MNIST's idx files, AG News, SST-2 and TinyStories. Rows and sizes are drawn with
a fixed seed, so that a setting is the same everywhere.
"""

from __future__ import annotations

import csv
import functools
import gzip
import itertools
import json
import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.data.rows import make_rows
from whence.demo.tiny import BOS, EOS, PAD, UNK, make_llama, train_tokenizer
from whence.engine.stream import identify
from whence.errors import UsageError
from whence.store.digest import canonical_json, digest
from whence.tasks import CausalLM, Classification, Regression, Task
from whence.validate.trainer import Recipe, Replicas, retrain

BUNDLED = ("diabetes", "digits")
"""Need no folder."""


@dataclass(frozen=True)
class Setting:
    """Data, a model and how it is trained; `model(seed)` is an untrained one."""

    name: str
    about: str
    model: Callable[[int], nn.Module]
    task: Task
    train: Sequence[Any]
    queries: Sequence[Any]
    recipe: Recipe
    modules: str = "all"
    """What is tracked: all that is trained."""
    texts: tuple[list[str], list[str]] | None = None
    """Of queries and training rows, for measures on words."""

    @property
    def fingerprint(self) -> str:
        """Hash of the training rows and the queries."""
        return identify(self.train)[1][:16] + identify(self.queries)[1][:16]

    def trained(self, seeds: Sequence[int] = (0,)) -> Replicas:
        """Models trained on all rows; each seed decides the first weights and the order of the rows."""
        return retrain(self.model(0), self.task, self.train, self.recipe, seeds=seeds, order_seeds=seeds, progress="train")

    def describe(self) -> dict[str, Any]:
        """What decides the trained weights: JSON values."""
        shapes = {name: list(parameter.shape) for name, parameter in self.model(0).named_parameters()}
        return {
            "setting": self.name,
            "model": f"{self.about} {digest(canonical_json(shapes))}",
            "parameters": sum(math.prod(shape) for shape in shapes.values()),
            "train": len(self.train),
            "queries": len(self.queries),
            "recipe": dict(sorted(vars(self.recipe).items())) | {"betas": list(self.recipe.betas)},
            "data": self.fingerprint,
        }


def setting(name: str, data: str | Path | None = None) -> Setting:
    """The setting of that name; `data` is the folder that holds what it reads.

    Raises UsageError for an unknown name, and where the data is not there.
    """
    if name not in SETTINGS:
        raise UsageError(f"There is no setting {name!r}", accepted=", ".join(SETTINGS))
    if name in BUNDLED:
        return SETTINGS[name](None)
    if data is None:
        raise UsageError(
            f"The setting {name} reads data that does not come with whence",
            accepted=f"a folder with {' and '.join(FILES[name])}; without a folder: {', '.join(BUNDLED)}",
            fix="name it: --data FOLDER (Python: data=...)",
        )
    try:
        return SETTINGS[name](Path(data))
    except UsageError:
        raise
    except (ValueError, LookupError, TypeError, OSError, EOFError, RecursionError, csv.Error, zlib.error) as error:
        raise UsageError(
            f"The data of {name} in {data} can't be read",
            given=f"{type(error).__name__}: {error}",
            accepted=" and ".join(FILES[name]),
            fix="copy or download the files again",
        ) from error


# regression


def regression(name: str, width: int, recipe: Recipe, folder: Path | None) -> Setting:
    """A perceptron of two tanh layers, as in Grosse et al. 2023, appendix C: 70 % of the rows train, up to 200 others ask."""
    x_NI, y_N = diabetes() if name == "diabetes" else uci(name, folder)
    order = np.random.default_rng(0).permutation(len(x_NI))
    rows = round(0.7 * len(x_NI))
    train, rest = order[:rows], order[rows:][:200]
    x_NI = (x_NI - x_NI[train].mean(0)) / np.maximum(x_NI[train].std(0), 1e-9)
    y_N = (y_N - y_N[train].mean()) / y_N[train].std()
    inputs, targets = torch.from_numpy(x_NI).float(), torch.from_numpy(y_N).float()[:, None]

    def model(seed: int) -> nn.Module:
        return seeded(seed, lambda: perceptron([inputs.shape[1], width, width, 1], nn.Tanh))

    return Setting(
        name,
        f"{name}: {inputs.shape[1]}-{width}-{width}-1 tanh, squared error",
        model,
        Regression(),
        [(inputs[i], targets[i]) for i in train],
        [(inputs[i], targets[i]) for i in rest],
        recipe,
    )


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """The diabetes data of scikit-learn (Efron et al. 2004): inputs `[N, 10]` and targets `[N]`."""
    from sklearn.datasets import load_diabetes

    bunch: Any = load_diabetes()
    return bunch.data, bunch.target


def uci(name: str, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `[N, I]` and targets `[N]` of a UCI set."""
    files = [found(folder, file) for file in FILES[name]]
    table = np.loadtxt(files[0])
    features, target = (np.loadtxt(file).astype(int).reshape(-1) for file in files[1:])
    return table[:, features], table[:, target[0]]


# classes


def digits(_: Path | None) -> Setting:
    """Scikit-learn's 8 x 8 digits: 1,000 train, 200 others ask."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return images_setting("digits", bunch.data / 16, bunch.target, 64, DIGITS)


def mnist(folder: Path | None) -> Setting:
    """MNIST, halved in size to 14 x 14: 1,000 of the test images train, 200 others ask."""
    images, labels = (found(folder, file) for file in FILES["mnist"])
    pixels = np.frombuffer(gzip.decompress(images.read_bytes())[16:], np.uint8).reshape(-1, 14, 2, 14, 2)
    numbers = np.frombuffer(gzip.decompress(labels.read_bytes())[8:], np.uint8)
    return images_setting("mnist", pixels.mean((2, 4)).reshape(-1, 196) / 255, numbers, 64, MNIST)


def images_setting(name: str, x_NI: np.ndarray, y_N: np.ndarray, width: int, recipe: Recipe) -> Setting:
    """A perceptron of two ReLU layers."""
    order = np.random.default_rng(0).permutation(len(x_NI))[:1200]
    inputs = torch.from_numpy(np.ascontiguousarray(x_NI)).float()
    pairs = [(inputs[i], int(y_N[i])) for i in order]

    def model(seed: int) -> nn.Module:
        return seeded(seed, lambda: perceptron([inputs.shape[1], width, width, 10], nn.ReLU))

    about = f"{name}: {inputs.shape[1]}-{width}-{width}-10 ReLU, cross-entropy"
    return Setting(name, about, model, Classification(), pairs[:1000], pairs[1000:], recipe)


# texts


class Bag(nn.Module):
    """Classes from the mean of a text's word vectors and one hidden layer."""

    def __init__(self, words: int, width: int, hidden: int, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.hidden, self.out = nn.Linear(width, hidden), nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[B, V]`."""
        mask_BT1 = attention_mask.unsqueeze(-1).to(self.embedding.weight.dtype)
        mean_BI = (self.embedding(input_ids) * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        return self.out(torch.tanh(self.hidden(mean_BI)))


def topics(folder: Path | None) -> Setting:
    """AG News, titles with the texts: 1,000 train, 200 others ask for their class of four."""
    with found(folder, FILES["text"][0]).open(encoding="utf-8", newline="") as file:
        records = [(f"{title}. {text}".replace("\\", " "), int(label) - 1) for label, title, text in csv.reader(file)]
    rows = [{"text": text, "label": label} for text, label in records]
    return bag_setting("ag_news", rows, 4, 48, TEXT)


def sentiment(folder: Path | None) -> Setting:
    """SST-2: 1,000 sentences train, 200 others ask whether they are positive."""
    lines = found(folder, FILES["sst2"][0]).read_text(encoding="utf-8").splitlines()
    rows = [{"text": text, "label": int(label)} for text, label in (line.rsplit("\t", 1) for line in lines)]
    return bag_setting("sst2", rows, 2, 48, TEXT)


def bag_setting(name: str, rows: list[dict[str, Any]], classes: int, length: int, recipe: Recipe) -> Setting:
    """A bag of word vectors on a drawn sample of the rows."""
    different = list({row["text"]: row for row in rows}.values())
    chosen = random.Random(0).sample(different, 1200)
    train, queries = chosen[:1000], chosen[1000:]
    texts = [row["text"] for row in train]
    tokenizer = train_tokenizer(texts, "words", (UNK, PAD), lowercase=True, vocab_size=800)
    words = len(tokenizer)

    def model(seed: int) -> nn.Module:
        return seeded(seed, lambda: Bag(words, 16, 32, classes))

    return Setting(
        name,
        f"{name}: {words} word vectors of 16, mean, 32 tanh, {classes} classes",
        model,
        Classification(tokenizer, max_length=length),
        make_rows(train, origin=name),
        make_rows(queries, origin=name),
        recipe,
        "*",
        ([row["text"] for row in queries], texts),
    )


# language models

LM_TOKENS, LM_TRAIN, LM_QUERIES, LM_VOCABULARY = 24, 384, 128, 256


def language(folder: Path | None) -> Setting:
    """A Llama of two layers on TinyStories: pieces of 32 tokens train, others ask for their second half."""
    lines = found(folder, FILES["lm"][0]).read_text(encoding="utf-8").splitlines()
    stories = [json.loads(line)["text"] for line in lines]
    random.Random(0).shuffle(stories)
    tokenizer = train_tokenizer(stories[:500], "pieces", (BOS, EOS, UNK), vocab_size=LM_VOCABULARY)
    openings = (opening(tokenizer, story, LM_TOKENS) for story in dict.fromkeys(stories))
    pieces = list(itertools.islice(dict.fromkeys(filter(None, openings)), LM_TRAIN + LM_QUERIES))
    train, queries = [before + after for before, after in pieces[:LM_TRAIN]], pieces[LM_TRAIN:]

    def model(seed: int) -> nn.Module:
        llama = make_llama(tokenizer, seed, 32, 64, 2, 2, 2 * LM_TOKENS, spread=32**-0.5)
        llama.set_attn_implementation("eager")  # plain attention, which `vmap` knows how to batch
        return llama

    return Setting(
        "lm",
        f"tinystories: Llama of 2 layers, 32 wide, {len(tokenizer)} tokens, texts of {LM_TOKENS}",
        model,
        CausalLM(tokenizer, max_length=2 * LM_TOKENS),
        make_rows([{"text": text} for text in train], origin="tinystories"),
        make_rows([{"prompt": before, "completion": after} for before, after in queries], origin="tinystories"),
        LANGUAGE,
        "*",
        ([before + after for before, after in queries], train),
    )


def opening(tokenizer: Any, story: str, tokens: int) -> tuple[str, str] | None:
    """The first `tokens` tokens of a story in two halves; None for a shorter one."""
    offsets = tokenizer(story, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) < tokens:
        return None
    cut, end = offsets[tokens // 2][0], offsets[tokens - 1][1]
    return story[:cut], story[cut:end]


# parts


def perceptron(widths: Sequence[int], nonlinearity: type[nn.Module]) -> nn.Module:
    """Linear layers with the nonlinearity between them."""
    layers: list[nn.Module] = []
    for number, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [*([nonlinearity()] if number else []), nn.Linear(into, out)]
    return nn.Sequential(*layers)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """The model built with this seed; other random numbers go on as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def found(folder: Path | None, file: str) -> Path:
    """The file `SET/NAME` below the user's folder, or one further below; raises UsageError where there is none."""
    assert folder is not None
    for place in (folder / file, folder.parent / file, *sorted(folder.glob(f"*/{file}"))):
        if place.is_file():
            return place
    raise UsageError(
        f"{file} is not there",
        given=str(folder),
        accepted="a folder that holds it, in a subfolder or one below",
        fix="--data FOLDER (Python: data=...)",
    )


UCI = ("data.txt", "index_features.txt", "index_target.txt")
FILES = {
    "concrete": tuple(f"concrete/{file}" for file in UCI),
    "energy": tuple(f"energy/{file}" for file in UCI),
    "mnist": ("mnist_t10k/t10k-images-idx3-ubyte.gz", "mnist_t10k/t10k-labels-idx1-ubyte.gz"),
    "text": ("ag_news/test.csv",),
    "sst2": ("sst2/train.tsv",),
    "lm": ("tinystories/train_2316.jsonl",),
}
"""What each setting reads."""

CONCRETE = Recipe(0.02, 40, 64, "momentum", weight_decay=1e-3, schedule="cosine")
ENERGY = Recipe(0.02, 40, 64, "momentum", weight_decay=1e-3, schedule="cosine")
DIABETES = Recipe(0.01, 20, 64, "momentum", weight_decay=1e-2, schedule="cosine")
DIGITS = Recipe(0.05, 20, 64, "momentum", weight_decay=1e-3, schedule="cosine")
MNIST = Recipe(0.05, 20, 64, "momentum", weight_decay=1e-3, schedule="cosine")
TEXT = Recipe(0.01, 10, 50, "adamw", weight_decay=0.01, schedule="cosine")
LANGUAGE = Recipe(0.005, 10, 32, "adamw", weight_decay=0.01, schedule="cosine")

SETTINGS: dict[str, Callable[[Path | None], Setting]] = {
    "concrete": functools.partial(regression, "concrete", 128, CONCRETE),
    "energy": functools.partial(regression, "energy", 128, ENERGY),
    "diabetes": functools.partial(regression, "diabetes", 64, DIABETES),
    "digits": digits,
    "mnist": mnist,
    "text": topics,
    "sst2": sentiment,
    "lm": language,
}
