"""The replicas: each command at a tiny size, what decides a truth, and what is committed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import blank

from replication import e1, e2, e2b, e3
from replication.tinystories import TINY, make_world
from replication.two_stage import make_truth, onto, open_truth, removals
from whence.errors import StaleArtifact, UsageError

RESULTS = Path(e1.__file__).parent / "results"


def ran(command, data, folder):
    with blank():
        assert command.main(["--data", str(data), "--out", str(folder), "--tiny"]) == 0
    name = command.__name__.split(".")[-1]
    assert (folder / f"{name}.md").read_text().startswith("# E")
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replication")


@pytest.mark.slow
def test_e1(shared_data, folder):
    found = ran(e1, shared_data, folder)
    rows = {row["method"]: row for row in found["tables"][""]}
    assert rows["Gauss-Newton, exact inverse"]["pearson"] > 0.999  # dense: what conjugate gradients came to
    assert found["pbrf"]["pearson"] > 0.999 and abs(found["pbrf"]["slope"] - 1) < 0.05
    assert rows["Gauss-Newton, exact inverse"]["pearson"] > rows["EK-FAC"]["pearson"] > rows["Random numbers"]["pearson"] + 0.3
    assert rows["EK-FAC"]["published as"] == "ekfac-all" and (folder / "e1.svg").exists()


def test_e2(tmp_path):
    found = ran(e2, tmp_path / "no data", tmp_path)
    assert {row["method"] for row in found["tables"]["Sources found"]} == set(e2.METHODS)
    by_name = {row["method"]: row for row in found["tables"]["Sources found"]}
    assert by_name["BM25"]["mrr"] > by_name["random"]["mrr"]
    assert (tmp_path / "truths" / "facts-0.npz").exists() and (tmp_path / "e2.png").exists()


@pytest.mark.slow
def test_e2b(shared_data, folder):
    found = ran(e2b, shared_data, folder)
    tables = {title: {row.get("method") for row in rows} for title, rows in found["tables"].items()}
    same, new = (tables[f"Agreement with retraining both stages: {name}"] for name in ("questions", "classes"))
    assert {"single-stage at the tuned weights"} <= same - new  # there is none without the pretraining head
    assert e2b.REFERENCE in same & new and (folder / "e2b.png").exists()


def test_e3(shared_data, folder):
    found = ran(e3, shared_data, folder)
    page = (folder / "e3.html").read_text()
    assert len(found["tables"]) == len(e3.PROMPTS) and (folder / "e3.png").read_bytes()[:4] == b"\x89PNG"
    for rows in found["tables"].values():
        assert {row["rank, raw"] for row in rows} >= set(range(1, e3.TOP + 1))
        assert all(f"{row['nats per copy']:.2e} nats per copy" in page for row in rows)


@pytest.fixture(scope="module")
def world(shared_data):
    return make_world(shared_data, 0, TINY)


def test_a_truth_is_two_trainings_and_is_not_made_again(world, tmp_path, monkeypatch):
    weights_KN = removals(world, 3, 0.2)
    truth = make_truth(world, weights_KN, tmp_path / "truth.npz")
    kept = [place for place in range(weights_KN.shape[1]) if weights_KN[1, place]]
    assert len(kept) == weights_KN.shape[1] - round(0.2 * weights_KN.shape[1])
    replicas = world.pretrained(weights_KN[1:2])
    for name, tuning in world.tunings.items():
        again = world.tuned(tuning, replicas).measurements(tuning.queries)[0].double().numpy() - truth.whole[name]
        np.testing.assert_allclose(truth.changes[name][1], again, atol=1e-5)
    monkeypatch.setattr(type(world), "pretrained", lambda *given: pytest.fail("trained again"))
    assert np.array_equal(make_truth(world, weights_KN, tmp_path / "truth.npz").changes["classes"], truth.changes["classes"])
    with pytest.raises(StaleArtifact, match="of something else"):
        make_truth(world, 1 - weights_KN, tmp_path / "truth.npz")


def test_a_killed_truth_resumes(world, tmp_path, monkeypatch):
    weights_KN, path = removals(world, 3, 0.2), tmp_path / "truth.npz"
    whole = make_truth(world, weights_KN, tmp_path / "whole.npz")
    monkeypatch.setattr("replication.two_stage.TOGETHER", 2)
    real, calls = type(world).pretrained, []

    def killed(self, weights):
        calls.append(len(weights))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, weights)

    monkeypatch.setattr(type(world), "pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        make_truth(world, weights_KN, path)
    found = make_truth(world, weights_KN, path)
    assert calls == [2, 2, 2] and not path.with_suffix(".unfinished.npz").exists()
    np.testing.assert_allclose(found.changes["questions"], whole.changes["questions"], atol=1e-5)


def test_a_frozen_trunk_stays_and_a_new_head_is_drawn(world):
    replicas = world.pretrained(np.ones((1, len(world.pretraining.train))))
    tuning = world.tunings["classes, frozen trunk"]
    start, tuned = onto(tuning.model(replicas.copy_of(0)), replicas), world.tuned(tuning, replicas)
    moved = {name for name in start if not torch.equal(start[name], tuned.parameters[name])}
    assert moved == {"score.weight"}
    assert all(torch.equal(start[name], replicas.parameters[name]) for name in start if name != "score.weight")


def test_what_is_missing_is_said(tmp_path, capsys):
    assert e2b.main(["--data", str(tmp_path), "--out", str(tmp_path), "--tiny"]) == UsageError.exit_code
    assert "train_2316.jsonl is not there" in capsys.readouterr().out


# what is committed


@pytest.mark.parametrize("name", ["e1", "e2", "e2b", "e3"])
def test_published_results_are_whole(name):
    page = json.loads((RESULTS / f"{name}.json").read_text())
    assert page["minutes"] < 30 and page["tables"] and all(page["tables"].values())
    picture, begins = (f"{name}.svg", b"<?xml") if name == "e1" else (f"{name}.png", b"\x89PNG")
    assert (RESULTS / picture).read_bytes().startswith(begins) and (RESULTS / f"{name}.md").exists()


def test_published_truths_are_of_the_worlds_that_are_made(shared_data):
    for seed in e2b.SEEDS:
        own = make_world(shared_data, seed)
        truth = open_truth(RESULTS / "truths" / f"tinystories-{seed}.npz", own, removals(own, e2b.SUBSETS, e2b.SHARE))
        assert all(np.isfinite(found).all() for found in truth.changes.values())
    for seed in e2.SEEDS:
        facts = e2.make_facts(seed)
        left_out = e2.left_out(facts, open_truth(RESULTS / "truths" / f"facts-{seed}.npz", facts.world, e2.without(facts)))
        assert (left_out.sum(0) == e2.ROUNDS).all() and (left_out.sum(1) == e2.TOGETHER).all()
