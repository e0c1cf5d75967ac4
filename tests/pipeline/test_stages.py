"""Runs of two trainings: what each leaves, and what runs again."""

import json

import pytest

from whence.config import read_config
from whence.pipeline import run_pipeline

TRAINING = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "save_steps": 2, "log_steps": 1, "evaluation": 0.0}


@pytest.fixture
def two(settings, tmp_path):
    """A run of two trainings: texts, then questions."""
    texts = [{"text": f"{person} was born in {town}."} for person in ("Ada", "Bo", "Cleo") for town in ("Turin", "Oslo", "Lyon")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    pretraining = {"name": "pretraining", "data": {"path": "texts.jsonl", "max_length": 32}, "train": TRAINING}
    stages = [pretraining, {"name": "finetuning"}]
    return settings(stages=stages, train=TRAINING, evaluate=None, score={"self_influence": False, "export": ["csv"]})


def go(path, *settings, wanted=()):
    resolved = read_config(path, settings, environment={})
    return {step.stage.name: step.state for step in run_pipeline(resolved, wanted)}


def test_fit(two):
    print(go(two, wanted=("fit",)))
    print(go(two, "stages.pretraining.train.max_steps=3", wanted=("fit",)))
