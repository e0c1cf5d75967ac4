"""Tables of others, remade: each command at a tiny size, what its truth is, and what is committed."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.outside import adamw, facts, leaderboard, mnist
from benchmarks.quality import Work
from whence.errors import UsageError
from whence.validate.bank import Spec, make_bank, measured, open_bank
from whence.validate.settings import setting
from whence.validate.trainer import retrain

RESULTS = Path(mnist.__file__).parent / "results"


def ran(command, data, folder, name, *given):
    assert command.main(["--data", str(data), "--out", str(folder), "--tiny", *given]) == 0
    found = json.loads((folder / f"{name}.json").read_text())
    for rows in found["tables"].values():
        assert all(f"| {row['method']} |" in (folder / f"{name}.md").read_text() for row in rows)
    return found


def value(cell):
    return float(cell.split(" ")[0])


def test_mnist(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "METHODS", {name: mnist.METHODS[name] for name in ("EK-FAC, damping of training", "random")})
    monkeypatch.setattr(mnist, "DEAR", {"MAGIC": mnist.DEAR["MAGIC"]})
    found = ran(mnist, shared_data, tmp_path, "mnist-lr")
    rows = {row["method"]: row for row in found["tables"][""]}
    assert value(rows["MAGIC"]["leave-one-out"]) > 0.99
    assert value(rows["EK-FAC, damping of training"]["lds"]) > 0.8 > value(rows["random"]["lds"])
    bank = open_bank(tmp_path / "banks" / "mnist-lr-removals.npz")
    assert (~bank.kept).sum(1).tolist() == [1] * len(bank.kept)


def test_a_peer_that_is_not_installed_is_said(shared_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(mnist.TINY, "subsets", 2)
    monkeypatch.setitem(sys.modules, "dattri", None)
    given = ["--data", str(shared_data), "--out", str(tmp_path), "--tiny", "--peers", "dattri"]
    assert mnist.main(given) == UsageError.exit_code
    assert "dattri can't be imported" in capsys.readouterr().out


def test_halves_alone_are_trained_as_if_there_were_no_other_rows(tmp_path):
    whole = setting("diabetes")
    own = replace(
        whole, train=whole.train[:60], queries=whole.queries[:5], recipe=replace(whole.recipe, epochs=3, batch_size=8)
    )
    bank = make_bank(own, Spec("alone", subsets=3, seeds=(1,)), tmp_path / "bank.npz")
    rows = [own.train[n] for n in np.flatnonzero(bank.kept[2])]
    assert len(rows) == 30
    alone = retrain(own.model(1), own.task, rows, own.recipe, seeds=[1], order_seeds=[1], progress="").measurements(own.queries)
    every = measured(own, np.ones((1, 60)), 1)[0]
    np.testing.assert_allclose(bank.changes[0, 2], alone[0].numpy() - every[0], atol=1e-4)
    again = make_bank(own, Spec("halves", subsets=3, seeds=(1,)), tmp_path / "other.npz")
    assert np.array_equal(again.kept, bank.kept) and not np.allclose(again.changes, bank.changes, atol=1e-3)


def test_adamw(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(adamw, "METHODS", {name: adamw.METHODS[name] for name in ("MAGIC", "gradient dot", "BM25")})
    found = ran(adamw, shared_data, tmp_path, "adamw-text")
    plain, _, smooth, warm = ({row["method"]: row for row in rows} for rows in found["tables"].values())
    assert set(plain) == set(smooth) == {"MAGIC", "gradient dot", "BM25"}
    values = [value(rows["MAGIC"]["leave-one-out"]) for rows in (smooth, plain, warm)]
    assert values[0] > max(0.95, values[1])  # what no derivative tells is smoothed away
    assert values[2] > 0.95 and value(plain["MAGIC"]["of rows first read later"]) > values[1]  # it is all in the first step


@pytest.fixture(scope="module")
def taught(shared_data):
    chosen = argparse.Namespace(data=shared_data)
    corpus = facts.real_corpus_of(chosen, facts.TINY, 0)
    return corpus, Work(facts.corpus_setting(corpus, facts.TINY), seeds=(0,))


def test_facts(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "METHODS", {name: facts.METHODS[name] for name in ("EK-FAC", "BM25", "random")})
    found = ran(facts, shared_data, tmp_path, "facts")
    rows = {row["method"]: row for row in found["tables"][""]}
    assert value(rows["BM25"]["MRR"]) > 0.8 > value(rows["random"]["MRR"])
    assert value(rows["EK-FAC"]["MRR"]) > value(rows["random"]["MRR"])
    ranks = found["corpora"][0]["BM25"]["MRR"]
    assert np.mean(ranks) == pytest.approx(value(rows["BM25"]["MRR"]), abs=1e-3)


def test_no_row_of_a_fact_has_the_wording_of_its_question(taught):
    corpus, _ = taught
    for question, places in zip(corpus.questions, corpus.sources, strict=True):
        assert len(places) == 2
        assert not any(corpus.rows[place]["text"].startswith(question["prompt"]) for place in places)


def test_a_tail_patch_is_a_step_of_the_training(taught):
    """One step of Adam by autograd on the model itself."""
    import torch

    corpus, work = taught
    rows = [list(corpus.sources[0]), *([1, 2, 3] for _ in corpus.questions[1:])]
    found = facts.tail_patch(work)(rows)
    assert found[0] > 0
    model, task, training = work.replicas.copy_of(0), work.setting.task, work.training
    batch = task.collate(task.encode([corpus.rows[row] for row in rows[0]]))
    task.losses(model, batch).mean().backward()
    moments, steps = training.checkpoints[-1].second_moments(), len(training.steps)
    queries = [item for item, _ in task.encode_queries(work.setting.queries)[0]]
    with torch.no_grad():
        before = float(task.measurements(model, task.collate(queries)))
        for name, weight in model.named_parameters():
            scale = (moments[name] / (1 - 0.999**steps)).sqrt() + 1e-8
            weight -= float(training.learning_rates[-len(training.steps) // 12 :].mean()) * weight.grad / scale
        assert found[0] == pytest.approx(float(task.measurements(model, task.collate(queries))) - before, abs=2e-5)


@pytest.mark.slow
def test_the_leaderboard(shared_data, tmp_path, monkeypatch, capsys):
    given = ["--methods", "ekfac,bm25,random"]
    found = ran(leaderboard, shared_data, tmp_path, "leaderboard", *given)
    rows = {row["method"]: row for row in found["tables"][""]}
    assert rows["ekfac"]["published"] == 0.454 and value(rows["ekfac"]["LDS"]) > value(rows["random"]["LDS"])
    monkeypatch.setattr(leaderboard, "retrain", lambda *a, **k: pytest.fail("trained again"))
    again = ran(leaderboard, shared_data, tmp_path, "leaderboard", *given, "--bank", str(tmp_path / "bank.npz"))
    assert again["tables"] == {
        "": [row | {"seconds": again["tables"][""][n]["seconds"]} for n, row in enumerate(found["tables"][""])]
    }
    with np.load(tmp_path / "bank.npz") as file:
        arrays = dict(file)
    assert (~arrays["kept"]).sum(1).tolist() == [3] * leaderboard.TINY.retrainings  # 10 % of 32
    np.savez(tmp_path / "cut.npz", **arrays | {"losses": arrays["losses"][:, :-1]})
    given = ["--data", str(shared_data), "--out", str(tmp_path), "--tiny", "--bank", str(tmp_path / "cut.npz")]
    assert leaderboard.main(given) == UsageError.exit_code
    assert "is of other rows or queries" in capsys.readouterr().out


# what is committed


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_committed_tables_are_of_these_methods(file):
    found = json.loads(file.read_text())
    expected = {"facts": facts.METHODS, "adamw-text": adamw.METHODS, "adamw-lm": adamw.METHODS}
    expected |= {"mnist-lr": mnist.METHODS | mnist.DEAR, "mnist-mlp": mnist.METHODS}
    for rows in found["tables"].values():
        assert {row["method"] for row in rows} >= set(expected[file.stem])
        assert found["processor_minutes"] < 20
