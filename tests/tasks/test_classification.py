import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import whence
from whence.engine.stream import encode
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


@pytest.mark.parametrize("label", [{}, {"label": "Weather"}, {"label": "1"}, {"label": 2}, {"label": -1}, {"label": 0.5}])
def test_unknown_labels(tiny_tokenizer, label):
    with pytest.raises(UsageError, match="no label that is known: row 2") as raised:
        Classification(tiny_tokenizer, LABELS).encode([{"text": "b", "label": 1}, {"text": "a", **label}])
    assert raised.value.accepted == "World, Sports"


def test_examples_without_target():
    with pytest.raises(UsageError, match="no target"):
        Classification().losses(linear(), {"inputs": torch.zeros(1, 3)})


def test_settings(tiny_tokenizer):
    for task in (Classification(), Classification(tiny_tokenizer, LABELS)):
        assert json.loads(json.dumps(task.settings())) == task.settings()


def test_rows_without_text_are_named(tiny_tokenizer):
    with pytest.raises(UsageError, match="row 2 has no text"):
        Classification(tiny_tokenizer, LABELS).encode([{"text": "b", "label": 1}, {"prompt": "a", "label": 1}])


def with_labels(*labels):
    return [(x, label) for (x, _), label in zip(pairs(), labels, strict=True)]


WRONG = {
    "too high": (5, "5 classes, and the label of row 2 is 5"),
    "negative": (-1, "5 classes, and the label of row 2 is -1"),
    "half": (0.5, "the label of row 2 is float32"),
    "float": (torch.tensor(1.0), "the label of row 2 is float32"),
    "complex": (torch.tensor(1j), "the label of row 2 is complex64"),
    "one of five": (torch.eye(5)[1], "the label of row 2 is of shape (5,)"),
    "one of five, integers": (torch.eye(5).long()[1], "the label of row 2 is of shape (5,)"),
    "a grid": (torch.zeros(2, 2, dtype=torch.long), "the label of row 2 is of shape (2, 2)"),
    "a list": ([1, 2], "the label of row 2 is of shape (2,)"),
    "a name": ("cat", "the label of row 2 is something else"),
    "none": (None, "the label of row 2 is something else"),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_that_are_no_class_name_their_row_before_anything_is_computed(name):
    label, message = WRONG[name]
    for container in (list, tuple):
        with pytest.raises(UsageError) as raised:
            encode(Classification(), container(with_labels(1, label, 0)), linear())
        assert message in re.sub(r" \([0-9a-f]{12}\)", "", raised.value.what)  # the id
        assert raised.value.fix


@pytest.mark.parametrize("name", ["too high", "negative", "half", "one of five", "a grid", "a name"])
def test_labels_of_data_that_is_not_in_memory_are_found_in_their_batch(name):
    label, _ = WRONG[name]
    task = Classification()
    with pytest.raises(UsageError, match="the labels of a batch"):
        task.losses(linear(), task.collate(with_labels(label, label, label)))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool, "column", "numpy"])
def test_integers_of_other_kinds_are_classes(kind):
    task, model = Classification(), linear()
    wanted = task.losses(model, task.collate(with_labels(1, 0, 1)))
    if kind == "column":
        labels = [torch.tensor([label]) for label in (1, 0, 1)]
    elif kind == "numpy":
        labels = list(np.array([1, 0, 1], np.int16))
    else:
        labels = [torch.tensor(label).to(kind) for label in (1, 0, 1)]
    torch.testing.assert_close(task.losses(model, task.collate(encode(task, with_labels(*labels), model).items)), wanted)


@pytest.mark.parametrize("outputs", [(), (1,), (4, 5)])
def test_outputs_that_are_no_classes(outputs):
    task = Classification()
    with pytest.raises(UsageError, match="not one number per class"):
        task.losses(lambda x: torch.zeros(len(x), *outputs), task.collate(pairs()))


def test_labels_out_of_range_are_found_by_fit(tiny_tokenizer):
    """Of texts, too; and of rows that the sample of a fit leaves out."""
    with pytest.raises(UsageError, match=r"5 classes, and the label of row 3 \(.*\) is 7"):
        whence.fit(linear(), Classification(), with_labels(0, 1, 7))
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=2, **sizes)).eval()
    with pytest.raises(UsageError, match=r"2 classes, and the label of row 2 \(.*\) is 2"):
        whence.fit(model, Classification(tiny_tokenizer), [{"text": "a", "label": 1}, {"text": "b", "label": "2"}])


def test_inputs_of_another_dtype_are_named():
    """Arrays are float64 where nobody says otherwise."""
    task = Classification()
    with pytest.raises(UsageError, match="another dtype than the model") as raised:
        task.losses(linear().float(), task.collate(pairs()))
    assert "inputs in float64, weights in float32" in raised.value.given


@pytest.mark.parametrize("label", [None, [1, 2]])
def test_examples_that_make_no_batch(label):
    with pytest.raises(UsageError, match="can't be put into one batch"):
        Classification().collate(with_labels(1, label, 0))
