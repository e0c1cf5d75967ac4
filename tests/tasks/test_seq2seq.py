import json

import pytest
import torch

from whence.errors import EmptyLossError, TruncatedQueryError, UsageError
from whence.tasks import Seq2Seq

ROWS = [
    {"prompt": "Where was Ada Velt born?", "completion": "In Turin, where else."},
    {"prompt": "Bo Quist lives in", "completion": "Oslo."},
    {"prompt": "a", "completion": "The old harbour of Lyon is quiet in the morning."},
]


@pytest.fixture
def model():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=300, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config).double().eval()


def test_losses_are_those_of_the_model(model, tiny_tokenizer):
    task = Seq2Seq(tiny_tokenizer, append_eos=True)
    items = task.encode(ROWS)
    batch = task.collate(items)
    losses = task.losses(model, batch)
    for item, loss in zip(items, losses, strict=True):
        labels = torch.from_numpy(item.target.ids)[None]
        mean = model(input_ids=torch.from_numpy(item.source.ids)[None], labels=labels).loss
        torch.testing.assert_close(loss, mean * labels.numel(), rtol=1e-10, atol=1e-10)
        assert item.target.ids[-1] == tiny_tokenizer.eos_token_id
    torch.testing.assert_close(task.measurements(model, batch), -losses)


def test_drawn_labels_do_not_depend_on_the_batch(model, tiny_tokenizer):
    task = Seq2Seq(tiny_tokenizer)
    items = task.encode(ROWS)
    noise = [torch.rand(task.noise_shape(item), dtype=torch.float64) for item in items]
    together = task.losses(model, task.collate(items), task.collate_noise(items, noise))
    alone = [task.losses(model, task.collate([i]), task.collate_noise([i], [n])) for i, n in zip(items, noise, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(together, task.losses(model, task.collate(items)))


def test_layout(tiny_tokenizer):
    task = Seq2Seq(tiny_tokenizer)
    (item,) = task.encode([{"prompt": "abcd", "completion": "xy"}])
    assert task.size(item) == 4
    assert task.noise_shape(item) == (2,)
    assert task.predicted_tokens(item) == ["x", "y"]
    assert task.predictions(item) == 2
    other = task.encode([{"prompt": "a", "completion": "z"}])
    assert task.positions(task.collate([item, *other])).tolist() == [[True, True], [True, False]]
    assert task.display(item)[-2:] == [("x", True), ("y", True)]
    assert not any(in_loss for _, in_loss in task.display(item)[:4])


def test_span_and_contrast(model, tiny_tokenizer):
    task = Seq2Seq(tiny_tokenizer)
    (((item, _),),) = task.encode_queries([{"prompt": "a", "completion": "xyz", "span": "y"}])
    assert task.collate([item])["labels"].tolist() == [[-100, item.target.ids[1]]]
    assert task.losses(model, task.collate([item])).shape == (1,)
    (pair,) = task.encode_queries([{"prompt": "a", "completion": "x", "contrast": "y"}])
    assert [(item.target.text, weight) for item, weight in pair] == [("x", 1.0), ("y", -1.0)]


def test_what_is_wrong_with_rows_is_said(tiny_tokenizer, notes):
    with pytest.raises(UsageError, match="rows of prompt and completion"):
        Seq2Seq(tiny_tokenizer).encode([{"text": "a"}])
    with pytest.raises(TruncatedQueryError):
        Seq2Seq(tiny_tokenizer, max_length=3).encode_queries(ROWS[:1])
    with pytest.raises(EmptyLossError):
        Seq2Seq(tiny_tokenizer).encode([{"prompt": "a", "completion": ""}])
    Seq2Seq(tiny_tokenizer, max_length=3).encode(ROWS)
    assert notes[0].startswith("3 of 3 rows (100.0%) are cut")


def test_settings(tiny_tokenizer):
    settings = Seq2Seq(tiny_tokenizer).settings()
    assert json.loads(json.dumps(settings)) == settings
