"""Words alone: the formulas, word by word."""

import pytest
import torch
from distributed import work
from distributed.processes import run
from models import CASES, llama, texts, tokenizer
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.words import ORACLES
from whence.data import as_rows
from whence.errors import UsageError
from whence.methods.base import attribute
from whence.tasks import CausalLM

ROWS, QUERIES = as_rows(texts(8, seed=1)), as_rows(texts(6, seed=2)[::2])


@pytest.mark.parametrize(("method", "settings"), [("bm25", {}), ("bm25", {"k1": 0.9, "b": 0.0}), ("tfidf", {})])
def test_it_is_its_oracle(method, settings):
    case = Case(llama(), CausalLM(tokenizer()), ROWS, QUERIES)
    found = attribute(method, case.model, case.task, QUERIES, ROWS, **settings)
    agree(found.values, ORACLES[method](case, **settings), 1e-12)
    assert (
        found.unit == {"bm25": "BM25", "tfidf": "cosine"}[method] and found.example_ids == list(ROWS.ids) and not found.directed
    )


def test_several_processes_give_the_same():
    expected = attribute("bm25", llama(), CausalLM(tokenizer()), QUERIES, ROWS).values
    for found in run(work.by_method, "bm25", ROWS, QUERIES):
        agree(found, expected, 1e-12)


def test_rows_without_words_are_refused():
    case = CASES["mlp"]
    with pytest.raises(UsageError, match="have no text"):
        attribute("tfidf", case.model(), case.task(), case.queries(), case.train())


def test_the_model_is_not_run(monkeypatch):
    model = llama()
    monkeypatch.setattr(model, "forward", lambda *given, **named: torch.zeros(0).item())
    attribute("bm25", model, CausalLM(tokenizer()), QUERIES, ROWS)
