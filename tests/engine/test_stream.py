"""The one loop: what it reads, how labels are drawn, what it refuses."""

import threading

import pytest
import torch
from models import CASES
from oracle import drawn, log_likelihood

from whence.capture import Capture
from whence.coverage import cover
from whence.engine.stream import Sink, draws, encode, likelihood, read, stream
from whence.errors import UsageError
from whence.tasks.base import sample_classes


def test_ids_are_stable_and_copies_are_numbered():
    case = CASES["mlp"]
    rows = case.train(3)
    once, twice = encode(case.task(), rows), encode(case.task(), [*rows, rows[0], rows[0]])
    assert twice.ids[:3] == once.ids and twice.ids[3:] == (f"{once.ids[0]}#2", f"{once.ids[0]}#3")
    assert once.fingerprint != twice.fingerprint


def test_text_is_read_as_text_and_tensors_as_they_are():
    assert read(["a text"]).rows[0]["text"] == "a text"
    rows = CASES["mlp"].train()
    assert read(rows) is rows


def test_no_examples_is_an_error():
    with pytest.raises(UsageError, match="no examples"):
        encode(CASES["mlp"].task(), [])


def test_examples_without_a_loss_are_not_used():
    examples = encode(CASES["llama"].task(), [{"text": "w1"}, {"text": "w1 w2"}, {"text": "w3 w4 w5"}])
    assert examples.sizes == (0, 1, 2) and examples.usable == [1, 2]


def test_draws_belong_to_the_example_and_the_seed():
    case = CASES["llama"]
    task, examples = case.task(), encode(case.task(), case.train())
    item, name = examples.items[0], examples.ids[0]
    noise = draws(task, item, name, "0")
    assert noise.shape == (task.size(item),) and noise.dtype == torch.float64
    assert torch.equal(noise, draws(task, item, name, "0"))
    assert not torch.equal(noise, draws(task, item, name, "1"))
    assert not torch.equal(noise, draws(task, item, f"{name}#2", "0"))


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    found = sample_classes(p.log().expand(1000, 4), uniform)
    assert torch.bincount(found, minlength=4).tolist() == [500, 0, 300, 200]
    assert found.tolist() == [drawn(p.log(), u) for u in uniform.tolist()]
    assert sample_classes(p.log(), torch.tensor(0.0)).item() == 0
    assert sample_classes(p.log(), torch.tensor(1 - 2.0**-25)).item() == 3


def test_drawn_labels_do_not_depend_on_the_batch():
    case = CASES["llama"]
    model, task = case.model(), case.task()
    examples = encode(task, case.train())
    noise = [draws(task, item, name, "0:eigenvalues") for item, name in zip(examples.items, examples.ids, strict=True)]
    together = task.losses(model, task.collate(examples.items), task.collate_noise(examples.items, noise))
    for number, (item, uniform) in enumerate(zip(examples.items, noise, strict=True)):
        torch.testing.assert_close(-together[number], log_likelihood(item, uniform)(model))


def test_the_next_batch_is_collated_while_one_is_worked_on():
    case = CASES["mlp"]
    task, model = case.task(), case.model()
    collated, waited = [threading.Event() for _ in range(3)], []

    class Watched(type(task)):
        def collate(self, items):
            collated[len([event for event in collated if event.is_set()])].set()
            return super().collate(items)

        def losses(self, model, batch, noise=None):
            number = len(waited)
            waited.append(number == 2 or collated[number + 1].wait(timeout=60))
            return super().losses(model, batch, noise)

    task.__class__ = Watched
    examples = encode(task, case.train(3))
    with Capture(model, cover(model, "all").sites) as capture:
        stream(capture, task, examples.items, [[0], [1], [2]], likelihood(task, examples), Sink(), lambda positions: None)
    assert waited == [True, True, True]
