import copy

import pytest
import torch

from tests.conftest import SENTENCES
from whence.progress import report_to
from whence.tasks import CausalLM
from whence.train.small import Training, shuffled_batches, train, warm_cosine

SHORT = Training(epochs=8, batch_size=2)


class Counting:
    """A reporter that keeps what was done of each stage."""

    def __init__(self):
        self.done = {}

    def begin(self, stage):
        self.done[stage.name] = 0

    def advance(self, stage):
        self.done[stage.name] = stage.done

    def end(self, stage):
        assert stage.done == stage.total

    def note(self, text):
        pass


def test_two_trainings_are_bit_identical_whatever_the_global_seed_and_the_cores(tiny_llama, tiny_tokenizer):
    models = tiny_llama, copy.deepcopy(tiny_llama)
    losses = []
    for threads, model in enumerate(models, start=1):
        torch.manual_seed(threads)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        losses.append(train(model, CausalLM(tiny_tokenizer), SENTENCES, SHORT))
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    assert losses[0] == losses[1]
    assert all(one.equal(other) for one, other in zip(*(model.parameters() for model in models), strict=True))


def test_the_loss_falls_and_is_that_of_the_task(tiny_llama, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    with torch.no_grad():
        untrained = (
            task.losses(tiny_llama, task.collate(task.encode([{"text": sentence} for sentence in SENTENCES]))).mean().item()
        )
    losses = train(tiny_llama, task, SENTENCES, Training(epochs=30, batch_size=4, warmup=0.5))
    assert losses[0] == pytest.approx(untrained, rel=1e-5)  # one step per epoch: the first is computed before any
    assert losses[-1] < 0.9 * losses[0]
    assert not tiny_llama.training


def test_another_seed_is_another_order(tiny_llama, tiny_tokenizer):
    other = train(copy.deepcopy(tiny_llama), CausalLM(tiny_tokenizer), SENTENCES, Training(epochs=2, batch_size=1, seed=1))
    assert other != train(tiny_llama, CausalLM(tiny_tokenizer), SENTENCES, Training(epochs=2, batch_size=1))


def test_frozen_parameters_stay_and_rows_without_loss_do_not_count(tiny_llama, tiny_tokenizer):
    embedding = tiny_llama.get_input_embeddings().weight.requires_grad_(False)
    before, again = embedding.clone(), copy.deepcopy(tiny_llama)
    rows = [{"text": sentence} for sentence in SENTENCES]
    with_empty = train(tiny_llama, CausalLM(tiny_tokenizer), [*rows, {"prompt": "Ada", "completion": ""}], SHORT)
    assert embedding.equal(before)
    assert with_empty == train(again, CausalLM(tiny_tokenizer), rows, SHORT)


def test_progress_is_told_per_epoch(tiny_llama, tiny_tokenizer):
    reporter = Counting()
    with report_to(reporter):
        train(tiny_llama, CausalLM(tiny_tokenizer), SENTENCES, SHORT)
    assert reporter.done == {"train": SHORT.epochs}


def test_the_learning_rate_rises_and_falls():
    shares = [warm_cosine(step / 100, warmup=0.1) for step in range(101)]
    assert shares[0] == 0 and shares[5] == pytest.approx(0.5) and shares[10] == max(shares) == 1
    assert shares[55] == pytest.approx(0.5) and shares[100] == pytest.approx(0, abs=1e-12)


def test_batches_hold_every_row_once_and_rows_of_like_size():
    sizes = [3, 9, 3, 9, 3, 9, 3, 9]
    generator = torch.Generator().manual_seed(0)
    first, second = (shuffled_batches(sizes, 2, generator) for _ in range(2))
    assert sorted(sum(first, [])) == list(range(8)) and first != second
    assert all(len({sizes[index] for index in batch}) == 1 for batch in first + second)


def test_a_row_may_count_twice_or_not_at_all(tiny_llama, tiny_tokenizer):
    """With one batch of all rows: twice adds its loss once more, and a row that counts for nothing may say anything."""
    task, whole = CausalLM(tiny_tokenizer), Training(epochs=1, batch_size=len(SENTENCES))
    once, again, twice = (copy.deepcopy(tiny_llama) for _ in range(3))
    (plain,), (same,) = train(once, task, SENTENCES, whole), train(again, task, SENTENCES, whole, copies={0: 1.0})
    assert plain == same and all(map(torch.equal, once.state_dict().values(), again.state_dict().values()))
    batch = task.collate(task.encode([{"text": SENTENCES[0]}]))
    (more,) = train(twice, task, SENTENCES, whole, copies={0: 2.0})
    with torch.no_grad():
        alone = float(task.losses(tiny_llama, batch)) / len(SENTENCES)
    assert more - plain == pytest.approx(alone, rel=1e-4)
    without, other = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    changed = [" ".join(reversed(SENTENCES[0].split())), *SENTENCES[1:]]
    for model, rows in ((without, SENTENCES), (other, changed)):
        train(model, task, rows, SHORT, copies={0: 0.0})
    if task.size(task.encode([{"text": changed[0]}])[0]) == task.size(task.encode([{"text": SENTENCES[0]}])[0]):
        assert all(map(torch.equal, without.state_dict().values(), other.state_dict().values()))
