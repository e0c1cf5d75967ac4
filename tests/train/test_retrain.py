"""A recorded training is repeated with rows that count otherwise; what is not that training is noticed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed.processes import run
from distributed.work import retrained
from killing import Killed
from models import texts, tokenizer
from oracle import agree
from trainings import trained

from whence.data import as_rows
from whence.engine.point import Point
from whence.engine.queries import encode_queries
from whence.engine.stream import encode
from whence.errors import NumericalError, StaleArtifact, UsageError
from whence.models import load_model
from whence.tasks import CausalLM
from whence.train import replicas
from whence.train.record import read_training
from whence.train.replay import Run
from whence.train.replicas import at_once
from whence.train.retrain import in_order, retrain, with_rows

ROWS, HELD_OUT = as_rows(texts(7, seed=1)), as_rows(texts(4, seed=4))
SETTINGS = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 2, "evaluation": 0, "log_steps": 2, "save_steps": 3, "keep": None}
WAYS = {
    "full": {"weight_decay": 0.1, "max_grad_norm": 0.5},
    "lora": {"lora": {"r": 2, "dropout": 0.0, "targets": "all-linear"}, "learning_rate": 0.05},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("retrain"), ROWS, SETTINGS, WAYS)


TASK = CausalLM(tokenizer())


def asked(folder):
    training = read_training(folder)
    model = load_model(training.model)[0]
    queries = encode_queries(TASK, as_rows(texts(6, seed=2)[::2]), model)
    return training, Point(model, TASK, ROWS), queries, encode(TASK, HELD_OUT, model)


def test_how_far_the_training_moved_the_weights(base):
    before, training = load_model(base / "base")[0], read_training(base / "full")
    after = load_model(training.model)[0]
    start, end = (torch.cat([weight.detach().flatten() for weight in model.parameters()]) for model in (before, after))
    assert training.update(after) == pytest.approx(float((end - start).norm() / start.norm()), rel=1e-5) and start.norm() > 0
    assert training.update(before) == 0
    adapted = read_training(base / "lora")
    assert adapted.update(load_model(adapted.model)[0]) is None


@pytest.mark.parametrize("way", WAYS)
def test_rows_left_out_or_twice(base, way):
    """The oracle puts the weights into the loss of torch's own optimizer, row by row."""
    training, point, queries, held_out = asked(base / way)
    weights = np.ones((3, 7))
    weights[0, [1, 4]], weights[1, 2] = 0, 2
    found = retrain(training, weights, point, queries, held_out=held_out, together=2)
    assert found.repeated and found.repeated.loss is not None
    assert found.repeated.drift < 1e-3 and found.repeated.logged == 3 and found.repeated.loss < 1e-5
    assert found.measured.shape == (3, 3) and np.abs(found.falls[2]).max() < 1e-4 < np.abs(found.falls[:2]).min()
    for k in range(2):
        model = _by_torch(training, point, weights[k])
        values = [sum(w * model_measures(model, item) for item, w in query) for query in queries.weighted]
        agree(found.measured[k], np.array(values), 1e-4)
        losses = sum(-model_measures(model, item) for item in held_out.items)
        assert found.held_out[k] == pytest.approx(losses / sum(map(TASK.predictions, held_out.items)), rel=1e-4)


def test_rows_are_added(base):
    """The oracle reads them in the same steps, whose losses are divided by what they were."""
    training, point, queries, _ = asked(base / "full")
    extra = encode(TASK, as_rows([*texts(2, seed=9), ROWS[3]]), point.model)
    weights = np.ones((2, 10))
    weights[0, 7:], weights[1] = [2, 0, 1], [1, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    found = retrain(training, weights, point, queries, extra=extra, together=2)
    plain = retrain(training, weights[:, :7], point, queries, together=2)
    np.testing.assert_array_equal(found.whole, plain.whole)
    assert found.repeated == plain.repeated, "the control reads none of them"
    np.testing.assert_array_equal(found.measured[1], plain.measured[1])
    examples, how = with_rows(extra, point.examples, training.replay())
    assert [len(step) for step in how.added] == [1, 1, 1] * 2 and sorted(how.added[0] + how.added[1]) == sorted(
        how.added[3] + how.added[4]
    )
    model = _by_torch(training, point, weights[0], (examples, how))
    agree(
        found.measured[0],
        np.array([sum(w * model_measures(model, item) for item, w in query) for query in queries.weighted]),
        1e-4,
    )
    with pytest.raises(UsageError, match="not weights of the rows") as raised:
        retrain(training, np.ones(7), point, queries, extra=extra)
    assert "[K, 10]" in raised.value.accepted


def test_rows_may_count_otherwise_from_a_step_on(base):
    training, point, queries, _ = asked(base / "full")
    weights = np.ones((1, 7))
    weights[0, [1, 4]] = 0
    whole, late = (retrain(training, weights, point, queries, start=start, together=1) for start in (0, 4))
    np.testing.assert_array_equal(late.whole, whole.whole)
    assert late.repeated == whole.repeated and (late.measured != whole.measured).all()
    model = _by_torch(training, point, weights[0], start=4)
    measured = [sum(w * model_measures(model, item) for item, w in query) for query in queries.weighted]
    agree(late.measured[0], np.array(measured), 1e-4)
    with pytest.raises(UsageError, match="no such step"):
        retrain(training, weights, point, queries, start=6)


def model_measures(model, item):
    with torch.no_grad():
        return -float(TASK.losses(model, TASK.collate([item])))


def _by_torch(training, point, weights_N, with_others=None, start=0):
    (examples, how), model = with_others or (point.examples, training.replay()), load_model(training.model)[0].eval()
    named = {name: weight for name, weight in model.named_parameters() if name in how.start}
    with torch.no_grad():
        for name, weight in named.items():
            weight.copy_(how.start[name])
    rule = how.descent.optimizer
    groups = [
        {"params": [named[name]], "weight_decay": 0.0 if name in how.descent.undecayed else how.descent.weight_decay}
        for name in named
    ]
    optimizer = torch.optim.AdamW(groups, betas=rule.betas, eps=rule.eps)
    added_to = how.added or [[]] * len(how.steps)
    for step, (names, added, rate) in enumerate(zip(how.steps, added_to, how.learning_rates, strict=True)):
        rows = [examples.ids.index(name) for name in (*names, *added)]
        items = [examples.items[row] for row in rows]
        losses = TASK.losses(model, TASK.collate(items)) * torch.tensor(weights_N[rows] if step >= start else 1.0)
        optimizer.zero_grad()
        (losses.sum() / sum(map(TASK.predictions, items[: len(names)]))).backward()
        if rule.clip:
            torch.nn.utils.clip_grad_norm_(list(named.values()), rule.clip)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.step()
    return model


def test_another_training_is_noticed(base):
    training, point, queries, _ = asked(base / "full")
    given = (np.ones(7), point, queries)
    rates = replace(training, learning_rates=training.learning_rates * 1.3)
    order = replace(training, steps=in_order(training.replay(), 5).steps)
    short = replace(training, steps=training.steps[:-1], learning_rates=training.learning_rates[:-1])
    for other in (rates, order, short):
        with pytest.raises(NumericalError, match="does not end at the model"):
            retrain(other, *given)
    for wrong in (np.ones(6), np.full(7, np.nan)):
        with pytest.raises(UsageError, match="not weights of the rows"):
            retrain(training, wrong, point, queries)
    elsewhere = retrain(training, *given, order=5)
    assert elsewhere.repeated is None and np.abs(elsewhere.whole[:-1] - retrain(training, *given).whole[:-1]).max() > 1e-3


def test_a_killed_run_resumes_to_the_same_bits(base, tmp_path, monkeypatch):
    training, point, queries, held_out = asked(base / "full")
    weights = 1 - np.eye(7)[:5]
    given = {"held_out": held_out, "together": 2}
    whole = retrain(training, weights, point, queries, **given)

    import whence.train.retrain as module

    repeat = module.repeat_steps
    for left in (0, 1, 2):  # after so many: the control, and groups of two
        calls = iter([repeat] * left)

        def killed(*arguments, calls=calls, **options):
            if (call := next(calls, None)) is None:
                raise Killed
            return call(*arguments, **options)

        monkeypatch.setattr(module, "repeat_steps", killed)
        with pytest.raises(Killed):
            retrain(training, weights, point, queries, out=tmp_path / "kept", **given)
    monkeypatch.setattr(module, "repeat_steps", repeat)
    resumed = retrain(training, weights, point, queries, out=tmp_path / "kept", **given)
    monkeypatch.setattr(module, "repeat_steps", None)
    again = retrain(training, weights, point, queries, out=tmp_path / "kept", **given)
    for found in (resumed, again):
        np.testing.assert_array_equal(found.measured, whole.measured)
        np.testing.assert_array_equal(found.held_out, whole.held_out)
        assert found.repeated == whole.repeated
    files = sum(file.stat().st_size for file in (tmp_path / "kept").rglob("*") if file.name.startswith("retrained"))
    assert files < 2000
    for other in ({"together": 1}, {"held_out": None}):  # how many go together changes last bits
        with pytest.raises(StaleArtifact):
            retrain(training, weights, point, queries, out=tmp_path / "kept", **given | other)
    with pytest.raises(StaleArtifact):
        retrain(training, weights * 2, point, queries, out=tmp_path / "kept", **given)


def test_replicas_go_side_by_side_where_batches_are_short(base, monkeypatch):
    training, point, queries, _ = asked(base / "full")
    run = Run(point.model, point.task, point.examples, training.replay())
    size = sum(weight.numel() for weight in point.model.parameters())
    longest = max(run.examples.sizes[row] for row in run.rows[0])
    assert [at_once(run, count) for count in (1, 5, 40)] == [1, 5, replicas.SIDE_BY_SIDE]
    monkeypatch.setitem(replicas.SHORT, "cpu", 6 * size * (2 * longest + 8))  # batches of two rows
    assert at_once(run, 40) == replicas.SIDE_BY_SIDE == at_once(run, 40, beside=8) and at_once(run, 40, beside=9) == 1
    monkeypatch.setattr(replicas, "WEIGHTS", 3 * size)
    assert at_once(run, 40) == 3


@pytest.mark.parametrize("kept", [True, False])
def test_two_processes_give_the_bits_of_one(base, tmp_path, kept):
    given = (base / "full", as_rows(texts(6, seed=2)[::2]), ROWS)
    expected = retrained(*given, None)
    for found in run(retrained, *given, tmp_path if kept else None):
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)
