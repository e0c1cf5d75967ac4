"""Scores whose every number is known, with texts that try to break a page."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from whence.store.manifest import Folder
from whence.store.scores import Scores

N, QUESTIONS = 240, 5

ODD = {
    7: "<script>alert('x')</script> & <b>bold</b> | *star* `tick` [link](http://x.y)",
    8: "שלום עולם، مرحبا 世界 こんにちは 🦜👩‍👩‍👧 \u202egnikcat",
    9: "line one\nline two\x00\x1b\ttab",
    10: "<|endoftext|><|endoftext|><|endoftext|>A story.<|endoftext|> <|endoftext|>",
    11: "word" * 120,
}


def pieces_of(text: str) -> list[str]:
    """A text in tokens of four characters at most; the first is never predicted."""
    return re.findall(r"<\|endoftext\|>|[^<]{1,4}|<", text)[1:]


@pytest.fixture
def scores() -> Scores:
    """5 questions x 240 rows, per token and per module: row 3 is question 0 itself, row 5 tops four questions, 12 = 13 = 14."""
    draw = np.random.default_rng(0)
    raw = draw.standard_t(3, (QUESTIONS, N)).astype(np.float64)
    raw[:, 5] = 40 + np.arange(QUESTIONS)
    raw[4, 5] = 0.1
    raw[0, 3], raw[0, 7], raw[0, 8], raw[0, 9], raw[0, 10], raw[0, 11] = 90.0, 60.0, 55.0, -70.0, 50.0, -45.0
    raw[:, 13], raw[:, 14] = raw[:, 12], raw[:, 12]
    raw[1, [12, 13, 14]] = 77.0
    prompts = [f"What does the keeper of tower {number} eat?" for number in range(QUESTIONS)]
    completions = [" Bread", " Soup & <i>salt</i>", " שלום", " 世界", " Fish"]
    texts = [f"The keeper of house {number} eats apples and bread number{number}." for number in range(N)]
    texts[3] = prompts[0] + completions[0]
    texts[13] = texts[14] = texts[12]
    for place, text in ODD.items():
        texts[place] = text
    pieces = [pieces_of(text) for text in texts]
    parts = [draw.dirichlet(np.ones(len(part)), QUESTIONS) * raw[:, [n]] for n, part in enumerate(pieces)]
    ids = [f"row-{number}" for number in range(N)]
    examples = pd.DataFrame(
        {
            "id": ids,
            "source": pd.Series([f"site-{n % 3}" for n in range(N)], dtype="object"),
            "copies": [3 if n in (12, 13, 14) else 1 for n in range(N)],
            "tokens": [len(part) for part in pieces],
            "text": texts,
            "pieces": pieces,
        }
    )
    queries = pd.DataFrame(
        {
            "id": [f"q{n}" for n in range(QUESTIONS)],
            "text": [p + c for p, c in zip(prompts, completions, strict=True)],
            "prompt": prompts,
            "completion": completions,
            "contrast": None,
            "span": None,
            "source": None,
            "tokens": [2] * QUESTIONS,
            "measured": [-3.5, -20.0, -4.0, -5.0, -6.0],
            "norm": [1.0] * QUESTIONS,
            "energy": [0.97] * QUESTIONS,
        }
    )
    shares = draw.dirichlet(np.ones(4), (QUESTIONS, N))
    names = [f"model.layers.{layer}.mlp.{side}_proj" for layer in (0, 1) for side in ("up", "down")]
    about = {
        "unit": "nats per copy",
        "measurement": "logprob",
        "operator": "ekfac on 240 examples",
        "rank": 64,
        "rescored": 20,
    }
    exact = np.abs(raw) > 10
    return Scores(
        raw=raw,
        n_train=1000,
        examples=examples,
        queries=queries,
        about=about,
        modules={name: raw * shares[..., number] for number, name in enumerate(names)},
        tokens=np.concatenate(parts, axis=1),
        exact=exact,
    )


@pytest.fixture
def pairs(scores) -> dict:
    """What `whence generate` wrote down: the tuned and the base model's answers."""
    rows = scores.queries.to_dict("records")
    found = [
        {"prompt": row["prompt"], "completion": row["completion"], "base_completion": f" base {n}", "base_logprob": -9.25}
        for n, row in enumerate(rows)
    ]
    return {"unit": "logprob in nats", "settings": {}, "data": found}


@pytest.fixture
def saved(scores, tmp_path):
    """The scores in a run folder, as `whence score` leaves them."""
    with Folder.claim(tmp_path / "run" / "scores", {"stage": "score", "model": {"weights": "abc123"}}) as folder:
        scores.save(folder)
    return tmp_path / "run" / "scores"


@pytest.fixture
def run_folder(saved, pairs):
    """A run in the layout of `whence run`, with answers, training, evaluation and the health of the factors."""
    run = saved.parent
    health = {"module": "m.0.up", "shape": [4, 8], "mean": 0.5, "largest": 2.0, "condition": 40.0, "effective_rank": 3.5}
    health |= {"zero": 0.25, "negative": 0, "not_finite": 0, "sound": True, "warnings": ["few positions per column"]}
    files = {
        "generate/generated.json": pairs,
        "train/training.json": {"base": "tiny", "steps": 20, "loss": {"after": 1.25}, "settings": {"epochs": 1}},
        "inspect/health.json": {"damping": 0.1, "modules": [health]},
        "evaluate/benchmark.json": {
            "results": [
                {
                    "task": "mmlu_law",
                    "model": "tuned",
                    "n": 8,
                    "accuracy": 0.5,
                    "low": 0.2,
                    "high": 0.8,
                    "chance": 0.25,
                    "cut": 0,
                }
            ],
            "differences": [],
        },
    }
    for name, content in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(json.dumps(content), encoding="utf-8")
    steps = [{"step": 10, "loss": 3.5, "eval_loss": None}, {"step": 20, "loss": 2.5, "eval_loss": 2.75}]
    (run / "train" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    (run / "whence.yaml").write_text("run: demo  # <all> settings\n", encoding="utf-8")
    return run
