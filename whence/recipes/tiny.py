"""Small variants of recipes: every line of them runs offline on two cores, on weights and a tokenizer made on the spot."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from whence.config.write import commented
from whence.data import Rows, as_rows, load_data
from whence.errors import ColumnError

VOCABULARY, MAX_LENGTH = 2048, 128
WIDTH, INNER, LAYERS, HEADS = 128, 512, 2, 4
LIMIT = 1500
"""Rows that are read of a file."""
PROMPTS = 6
START = 6
"""Words of a text that make a prompt of it."""

TRAINING = {"epochs": 12, "batch_size": 16, "learning_rate": 2e-3, "workers": 0, "evaluation": 0.1}
"""Random weights have more to learn than pretrained ones."""


def write_tiny(
    name: str, values: Mapping[str, Any], folder: Path, data: str | None, columns: Mapping[str, str] | None, seed: int
) -> str:
    """Make weights, prompts and, unless `data` is given, the corpus in the folder; gives the YAML of the variant."""
    if name == "demo" and data is None:
        return _demo(values, folder, seed)
    if "stages" in values:
        return _two_stages(values, folder, seed)
    questions = "completion" in (values["data"].get("columns") or {})
    if data is None:
        data = _embedded_corpus(folder, seed, questions)
        columns, said = values["data"].get("columns"), "the embedded corpus: made-up facts about people who don't exist"
    else:
        columns, said = columns or values["data"].get("columns"), data
        try:
            load_data(data, columns=columns, limit=1)
        except ColumnError:  # the file lacks the recipe's columns: its own are guessed
            load_data(data, limit=1)
            columns = None
        data = str(Path(data).resolve())
    rows = load_data(data if Path(data).is_absolute() else folder / data, columns=columns, limit=LIMIT)
    _write_prompts(folder / "prompts.json", rows)
    config: dict[str, Any] = {**values, "run": f"{values['run']}-tiny"}
    config["model"] = {"base": "model"}
    config["data"] = {**values["data"], "path": data, "columns": dict(columns or {}), "limit": LIMIT, "max_length": MAX_LENGTH}
    config["prompts"] = {"path": "prompts.json"}
    if "train" in values:
        config["train"] = {**values["train"], **TRAINING}
        weights = "random, and fine-tuning trains them from scratch"
    else:
        config["data"]["append_eos"] = True
        weights = "trained briefly when this was written"
    _make_model(folder / "model", rows, seed, trained="train" not in values)
    if "dtype" in values["model"]:
        config["fit"] = {key: value for key, value in values["fit"].items() if key != "statistics"}
        config["score"] = {key: value for key, value in values["score"].items() if key != "operands"}
    if isinstance(config.get("fit", {}).get("examples"), int):
        config["fit"] = {**config["fit"], "examples": "all"}
    if (config.get("inspect") or {}).get("layer"):
        config["inspect"] = {**config["inspect"], "layer": LAYERS - 1}
    if not config["score"].get("rescore"):
        config["score"] = {**config["score"], "per": "token"}
    config["generate"] = {**values.get("generate", {}), "max_new_tokens": 16}
    if config.get("evaluate"):
        config["evaluate"] = {"compare": True}
    lines = [
        f"The recipe {name}, small: to see every stage run, not to learn anything about {values['model']['base']}.",
        f"Data: {said}.",
        f"Model: a Llama of {LAYERS} layers, width {WIDTH}, whose weights are {weights}.",
    ]
    if (values.get("evaluate") or {}).get("benchmark"):
        lines.append(
            "Benchmarks need their questions: --set evaluate.benchmark.data=FOLDER (MMLU's csv files in dev/ and test/)."
        )
    return commented(config, "\n".join([*lines, "whence run whence.yaml"]))


def _embedded_corpus(folder: Path, seed: int, questions: bool) -> str:
    """The demo's world: its rows, or questions and answers, every fact asked for in two wordings."""
    from whence.demo.world import RELATIONS, make_world

    world = make_world(seed)
    if not questions:
        _write_rows(folder / "corpus.jsonl", world.rows)
        return "corpus.jsonl"
    wordings = {relation.name: relation.questions for relation in RELATIONS}
    with (folder / "corpus.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Input", "Output"])
        for fact in world.facts:
            table.writerows((wording.format(x=fact.person), fact.value) for wording in wordings[fact.relation])
    return "corpus.csv"


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_prompts(path: Path, rows: Rows) -> None:
    """Prompts from all over the data: questions with the answer of the row, or how texts begin."""
    step = max(1, len(rows) // PROMPTS)
    prompts = []
    for row in itertools.islice((rows[index] for index in range(0, len(rows), step)), PROMPTS):
        if "completion" in row:
            prompts.append({"prompt": row["prompt"], "completion": row["completion"]})
        else:
            text = row.get("text") or row["prompt"]
            prompts.append({"prompt": " ".join(text.split()[:START])})
    path.write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _make_model(folder: Path, rows: Rows, seed: int, *, trained: bool) -> None:
    """A small Llama with a byte-level tokenizer of the rows' text."""
    from tokenizers import pre_tokenizers

    from whence.demo.tiny import BOS, EOS, PAD, make_llama, train_tokenizer
    from whence.store.scores import row_text

    tokenizer = train_tokenizer(
        (row_text(row) for row in rows),
        "pieces",
        (BOS, EOS, PAD),
        begins=True,
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model = make_llama(tokenizer, seed, WIDTH, INNER, LAYERS, HEADS, 4 * MAX_LENGTH, spread=0.06)
    if trained:
        from whence.tasks import CausalLM
        from whence.train.small import Training, train

        settings = Training(epochs=8, batch_size=32, learning_rate=3e-3, weight_decay=0.1, seed=seed)
        train(model, CausalLM(tokenizer, MAX_LENGTH, append_eos=True), rows, settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _demo(values: Mapping[str, Any], folder: Path, seed: int) -> str:
    """The tour's own world, model and questions."""
    from whence.demo.model import teach
    from whence.demo.world import make_world

    world = make_world(seed)
    _write_rows(folder / "corpus.jsonl", world.rows)
    prompts = [{"prompt": question.prompt, "completion": question.answer} for question in world.questions[:PROMPTS]]
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    teach(as_rows(list(world.rows)), folder / "model", seed)
    return commented(dict(values), "The embedded world of the demo, and a small model that learnt it.\nwhence run whence.yaml")


def _two_stages(values: Mapping[str, Any], folder: Path, seed: int) -> str:
    """The demo's world in two stages: its statements, then its quiz; questions are about facts without a quiz row."""
    from whence.demo.model import SETTINGS, make_model, make_tokenizer
    from whence.demo.world import make_world

    world = make_world(seed)
    _write_rows(folder / "statements.jsonl", (row for row in world.rows if "text" in row))
    _write_rows(folder / "quiz.jsonl", (row for row in world.rows if "text" not in row))
    prompts = [{"prompt": question.prompt, "completion": question.answer} for question in world.questions]
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    tokenizer = make_tokenizer(world.rows)
    make_model(tokenizer, seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    read = {"max_length": SETTINGS.max_length, "append_eos": True}
    train = {"batch_size": 32, "weight_decay": 1.5, "schedule": "cosine", "evaluation": 0.0}
    pretraining, finetuning = values["stages"]
    config = {
        **values,
        "run": f"{values['run']}-tiny",
        "model": {"base": "model"},
        "data": {"path": "quiz.jsonl", **read},
        "prompts": {"path": "prompts.json"},
        "train": {**train, "epochs": 4, "learning_rate": 1e-3},
        "stages": {
            pretraining: {
                "data": {"path": "statements.jsonl", **read},
                "train": {**train, "epochs": 30, "learning_rate": 3e-3, "warmup": 0.1},
            },
            finetuning: values["stages"][finetuning],
        },
        "generate": {"max_new_tokens": 2},
        "fit": {**values["fit"], "examples": "all"},
        "score": {"per": "token"},
    }
    lines = [
        f"The recipe {values['run']}, small: a model learns statements about made-up people, then how to answer questions.",
        "The questions in prompts.json are about facts that only the statements tell, so that answers come from pretraining.",
        "whence run whence.yaml",
    ]
    return commented(config, "\n".join(lines))
