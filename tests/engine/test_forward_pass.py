"""Forward passes give what one example at a time gives, whatever is batched together, and leave the model alone."""

import pytest
import torch
from models import CASES, llama, randomised, small_memory, texts, tokenizer
from oracle import agree
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from whence.engine.forward import head_of, hidden_of, hidden_states, losses_of, measured_of
from whence.engine.point import Point
from whence.engine.queries import encode_queries, precondition
from whence.engine.stream import encode
from whence.errors import UsageError
from whence.operators import Identity
from whence.tasks import CausalLM, Classification, Seq2Seq

ROWS = texts(8, seed=1)
QUERIES = [*texts(6, seed=2)[::2], {"prompt": "w1 w2", "completion": " w3", "contrast": " w4 w5"}]


def test_losses_are_those_of_rows_alone_in_batches_that_fit(notes):
    model = randomised(llama()).double().train()
    rows = [*ROWS, {"prompt": "w1", "completion": ""}]
    point = Point(model, small_memory(CausalLM(tokenizer()), 12), rows)
    found = losses_of(point)
    assert model.training and any("halved" in text for text in notes)
    task = CausalLM(tokenizer())
    alone = [task.losses(model.eval(), task.collate([item])) for item in encode(task, ROWS).items]
    agree(found[:8], torch.cat(alone).detach(), 1e-12)
    assert found[8] == 0


@pytest.mark.parametrize("measurement", ["logprob", "margin"])
def test_what_is_measured_is_what_scores_measure(measurement):
    point = Point(randomised(llama()).double().eval(), CausalLM(tokenizer(), measurement=measurement), ROWS)
    asked = encode_queries(point.task, QUERIES)
    prepared = precondition(point, asked, point.cover().sites, Identity())
    agree(measured_of(point, asked), prepared.measured, 1e-12)


def test_hidden_states_of_a_decoder_that_reads_an_encoder():
    sizes = {"d_model": 8, "d_ff": 10, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    model = randomised(T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)).double().eval())
    task = Seq2Seq(tokenizer())
    items = encode(task, [row for row in ROWS if "prompt" in row]).items
    h_BTI, real_BT = hidden_states(task, model, task.collate(items))
    for item, h_TI, real_T in zip(items, h_BTI, real_BT, strict=True):
        (one,), _ = hidden_states(task, model, task.collate([item]))
        assert int(real_T.sum()) == len(one) == task.predictions(item)
        agree(h_TI[real_T], one, 1e-10)


def test_a_contrast_stands_for_its_answer():
    point = Point(randomised(llama()).double().eval(), CausalLM(tokenizer()), ROWS)
    with_contrast, without = (
        encode_queries(point.task, QUERIES[3:]),
        encode_queries(point.task, [QUERIES[3] | {"contrast": None}]),
    )
    agree(hidden_of(point, with_contrast)[0], hidden_of(point, without)[0], 1e-12)


def test_heads():
    model = CASES["gpt2"].model()
    assert head_of(model) is model.lm_head and head_of(CASES["conv"].model()).in_features == 6
    with pytest.raises(UsageError, match="no head"):
        head_of(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()))

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Linear(5, 4)

        def forward(self, x):
            return x @ self.table(torch.eye(5).to(x)).mT.T

    task = Classification()
    with pytest.raises(UsageError, match="told apart"):
        hidden_states(task, Shared().double(), task.collate(CASES["mlp"].train()))
