import pytest
import torch

from whence.data import as_rows
from whence.errors import EmptyLossError
from whence.tasks import CausalLM
from whence.train.evidence import evidence_of_training
from whence.train.small import Training, train

ROWS = as_rows([f"Ada Velt was born in {town}. She is a baker." for town in ("Turin", "Oslo", "Lyon", "Ghent", "Bern", "Riga")])


def test_random_weights_show_none_and_trained_ones_do(tiny_llama, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    before = evidence_of_training(tiny_llama, task, ROWS)
    assert not before.learnt and before.loss == pytest.approx(before.shuffled, rel=0.05)
    train(tiny_llama, task, ROWS, Training(epochs=20, batch_size=6))
    after = evidence_of_training(tiny_llama, task, ROWS)
    assert after.learnt and after.loss < after.shuffled


def test_the_loss_is_per_token_and_short_answers_count(tiny_llama, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    rows = as_rows([{"prompt": "Ada was born in", "completion": f" {town}"} for town in "ABC"])
    items = task.tokenize(rows)
    with torch.no_grad():
        losses = task.losses(tiny_llama, task.collate(items))
    assert evidence_of_training(tiny_llama, task, rows).loss == pytest.approx(losses.sum().item() / 6, rel=1e-5)


def test_rows_without_loss(tiny_llama, tiny_tokenizer):
    with pytest.raises(EmptyLossError):
        evidence_of_training(tiny_llama, CausalLM(tiny_tokenizer), as_rows([{"prompt": "Ada", "completion": ""}]))
