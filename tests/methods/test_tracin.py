"""TracIn is the sum over checkpoints of learning rate times gradient dot product, however it is computed."""

import numpy as np
import pytest
import torch
from distributed import work
from distributed.processes import run
from killing import killed_and_resumed
from models import llama, randomised, texts, tokenizer
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.training import ORACLES
from whence.config.schema import Train
from whence.data import as_rows
from whence.errors import StaleArtifact, UsageError
from whence.methods.base import attribute
from whence.models import load_model
from whence.settings import Score
from whence.tasks import CausalLM
from whence.train.finetune import finetune
from whence.train.record import read_training

ROWS, QUERIES = as_rows(texts(8, seed=1)), as_rows(texts(6, seed=2)[::2])
EXACT = Score(chunks=2)


def trained(folder, **changes):
    torch.manual_seed(0)
    settings = Train(learning_rate=1e-2, epochs=2, batch_size=2, save_steps=2, log_steps=1, keep=3, **changes)
    finetune(randomised(llama()).eval(), CausalLM(tokenizer()), ROWS, settings, out=folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("tracin") / "train")


def tracin(training, task, queries, rows, settings=Score(), **keep):
    record = read_training(training)
    return attribute("tracin", load_model(record.model)[0], task, queries, rows, settings, training=record, **keep)


def test_it_is_its_oracle(training):
    record = read_training(training)
    assert len(record.checkpoints) == 3 and len({each.learning_rate for each in record.checkpoints}) > 1
    found = tracin(training, CausalLM(tokenizer()), QUERIES, ROWS)
    case = Case(load_model(record.model)[0], CausalLM(tokenizer()), ROWS, QUERIES, record)
    agree(found.values, ORACLES["tracin"](case), 1e-4)
    assert found.unit == "nats per step on the row" and found.about["operator"] == "TracIn"
    assert [part["factor"] for part in found.about["sum"]] == [each.learning_rate for each in record.checkpoints]
    assert found.queries["measured"].isna().all(), "it differs from checkpoint to checkpoint"


def test_a_killed_run_resumes_and_another_training_is_refused(training, tmp_path):
    given = (CausalLM(tokenizer()), QUERIES, ROWS)

    def made(out):
        return tracin(training, *given, settings=EXACT, out=out)

    whole = made(tmp_path / "whole")
    seen = killed_and_resumed(made, tmp_path, "score", 2, at="end")
    assert len(seen.resumed["score"]) == 2, "the first checkpoint is not scored again"
    again = made(tmp_path / "whole")
    np.testing.assert_array_equal(again.raw, whole.raw)
    assert again.about == whole.about and again.n_train == 1
    with pytest.raises(StaleArtifact, match="rates"):
        tracin(trained(tmp_path / "other", schedule="constant"), *given, settings=EXACT, out=tmp_path / "whole")


def test_several_processes_give_the_same(training, tmp_path):
    expected = tracin(training, CausalLM(tokenizer()), QUERIES, ROWS)
    for found in run(work.traced_by_steps, training, QUERIES, ROWS, tmp_path / "two"):
        agree(found, expected.values, 1e-5)


def test_a_training_without_checkpoints(training, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.train.record.find_checkpoints", lambda folder: [])
    with pytest.raises(UsageError, match="No checkpoint of the training was kept"):
        tracin(training, CausalLM(tokenizer()), QUERIES, ROWS)
