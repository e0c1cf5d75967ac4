import json

import pytest
import torch
from torch import nn

from whence.errors import UsageError
from whence.tasks import Classification

LABELS = ["World", "Sports"]
ROWS = [{"text": "Ada Velt was born in Turin.", "label": "Sports"}, {"text": "Bo", "label": 0}]


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 5).double()


def pairs():
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(3, dtype=torch.float64, generator=generator), label) for label in (1, 4, 0)]


def test_pairs_and_mappings():
    task, model = Classification(), linear()
    batch = task.collate(task.encode(pairs()))
    expected = torch.stack([-model(x).log_softmax(-1)[label] for x, label in pairs()])
    torch.testing.assert_close(task.losses(model, batch), expected)
    torch.testing.assert_close(task.measurements(model, batch), -expected)
    mapping = task.collate([{"input": x, "labels": label} for x, label in pairs()])
    torch.testing.assert_close(task.losses(model, mapping), expected)
    assert task.size(pairs()[0]) == 1


def test_labels_drawn_from_the_model():
    task, model = Classification(), linear()
    draws = 20_000
    batch = {"inputs": pairs()[0][0].expand(draws, 3), "targets": torch.zeros(draws, dtype=torch.int64)}
    assert task.noise_shape(pairs()[0]) == ()
    noise = task.collate_noise([None] * draws, list(torch.rand(draws, generator=torch.Generator().manual_seed(0))))
    losses = task.losses(model, batch, noise)
    logp = model(pairs()[0][0]).log_softmax(-1)
    for value in logp:
        share, p = (losses + value).abs().lt(1e-9).double().mean(), value.exp()
        assert abs(share - p) < 4.5 * (p * (1 - p) / draws) ** 0.5


def test_margin_and_callables():
    model, items = linear(), pairs()
    task = Classification(measurement="margin")
    p = torch.stack([model(x).softmax(-1)[label] for x, label in items])
    torch.testing.assert_close(task.measurements(model, task.collate(items)), (p / (1 - p)).log())
    own = Classification(measurement=lambda model, batch: batch["inputs"][:, 0])
    torch.testing.assert_close(own.measurements(model, own.collate(items)), torch.stack([x[0] for x, _ in items]))


def test_texts(tiny_tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=2, **sizes)).double().eval()
    task = Classification(tiny_tokenizer, LABELS)
    items = task.encode(ROWS)
    assert [item.label for item in items] == [1, 0]
    assert task.size(items[0]) == len(tiny_tokenizer(ROWS[0]["text"])["input_ids"])
    assert "".join(piece for piece, _ in task.display(items[0])) == ROWS[0]["text"]
    together = task.losses(model, task.collate(items))
    alone = torch.cat([task.losses(model, task.collate([item])) for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_image_model():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)).eval()
    task = Classification()
    batch = task.collate([{"pixel_values": torch.randn(3, 8, 8), "labels": label} for label in (0, 2)])
    expected = -model(pixel_values=batch["pixel_values"]).logits.log_softmax(-1)[[0, 1], [0, 2]]
    torch.testing.assert_close(task.losses(model, batch), expected)


def test_labels_as_text_of_a_table(tiny_tokenizer):
    (item,) = Classification(tiny_tokenizer).encode([{"text": "a b", "label": "3"}])
    assert item.label == 3


@pytest.mark.parametrize("row", [{"text": "a"}, {"text": "a", "label": "Weather"}, {"text": "a", "label": "1"}])
def test_unknown_labels(tiny_tokenizer, row):
    with pytest.raises(UsageError, match="no label that is known") as raised:
        Classification(tiny_tokenizer, LABELS).encode([row])
    assert raised.value.accepted == "World, Sports"


def test_examples_without_target():
    with pytest.raises(UsageError, match="no target"):
        Classification().losses(linear(), {"inputs": torch.zeros(1, 3)})


def test_settings(tiny_tokenizer):
    for task in (Classification(), Classification(tiny_tokenizer, LABELS)):
        assert json.loads(json.dumps(task.settings())) == task.settings()
