"""Several methods on one run: the same rows and questions, what they cost, what is kept, and a bank of retrainings."""

import json

import numpy as np
import pytest

from whence.config import read_config
from whence.errors import UsageError
from whence.pipeline import plan_run, run_pipeline
from whence.pipeline.comparison import Cost, compare_methods, keep
from whence.store.scores import open_scores
from whence.validate.bank import Bank, Spec, plain_spec, save_bank


def bank_of(scores, path):
    """A bank in which taking rows away does exactly what the scores say."""
    spec = Spec("halves", subsets=24, seeds=(0,))
    kept = spec.masks(scores.shape[1])
    changes = (kept.astype(float) @ scores.raw.T)[None].astype(np.float32)
    about = {"spec": plain_spec(spec), "setting": {}, "seconds": 0.0}
    return save_bank(Bank(kept, changes, np.zeros((1, scores.shape[0]), np.float32), about), path)


@pytest.mark.slow
def test_methods_are_compared_on_a_finished_run(settings, monkeypatch):
    resolved = read_config(settings(evaluate=None, score={"self_influence": False}), environment={})
    with pytest.raises(UsageError, match="has no answers and no factors yet"):
        compare_methods(resolved, ["ekfac"])
    run_pipeline(resolved, ["score"])
    ekfac, tracin = compare_methods(resolved, ["ekfac", "tracin"])
    run = open_scores(resolved.out / "scores")
    np.testing.assert_array_equal(ekfac.scores.raw, run.raw)
    assert ekfac.scores.query_ids == tracin.scores.query_ids and ekfac.scores.example_ids == tracin.scores.example_ids
    assert ekfac.means["spearman"] == 1.0 and -1 <= tracin.means["spearman"] < 1 and ekfac.retraining is None
    assert ekfac.cost.one_off > 0 and tracin.cost.one_off == 0, "the run's factors are the one-off work of those who use them"
    assert ekfac.cost.pairs == run.raw.size and ekfac.cost.per_pair > 0 and not ekfac.cost.resumed

    again = compare_methods(resolved, ["ekfac", "tracin"])
    assert [each.cost for each in again] == [ekfac.cost, tracin.cost], "what it cost when it was made"
    (resolved.out / "methods" / "tracin" / "cost.json").unlink()
    (unknown,) = [each for each in compare_methods(resolved, ["tracin"]) if each.name == "tracin"]
    assert np.isnan(unknown.cost.asked)

    bank_of(run, resolved.out / "bank-halves.npz")
    ekfac, tracin = found = compare_methods(resolved, ["ekfac", "tracin"])
    assert ekfac.retraining.mean > 0.999 and tracin.retraining.mean < ekfac.retraining.mean
    files = keep(found, resolved.out, "ekfac")
    document = json.loads(files[0].read_text())
    assert document["reference"] == "ekfac" and document["methods"][0]["lds"]["mean"] == ekfac.retraining.mean
    assert files[1].read_bytes()[:4] == b"\x89PNG" and document["methods"][1]["source"].startswith("Pruthi")

    moved = resolved.out.rename(resolved.out.parent / "moved")
    there = read_config(moved, environment={})
    assert [step.state for step in plan_run(there, ["score"])] == ["unchanged"] * 4
    compare_methods(there, ["ekfac", "bm25"])
    assert (moved / "methods" / "bm25").is_dir() and not resolved.out.exists(), "nothing is written where the run was"
    assert read_config(moved, ["out=other"], environment={}).out == moved / "other"


def test_what_can_not_be_compared_is_refused_before_anything_is_scored(settings):
    resolved = read_config(settings(train=None, evaluate=None, score={"queries": "prompts"}), environment={})
    with pytest.raises(UsageError, match="did you mean ekfac"):
        compare_methods(resolved, ["ekfak"])
    with pytest.raises(UsageError, match="did you mean iterations"):
        compare_methods(resolved, ["cg"], settings={"cg": {"iteration": 4}})
    with pytest.raises(UsageError, match="No method is given"):
        compare_methods(resolved, [])
    with pytest.raises(UsageError, match="cg is not compared"):
        compare_methods(resolved, ["ekfac"], settings={"cg": {"iterations": 4}})
    run_pipeline(resolved, ["fit"])
    with pytest.raises(UsageError, match="TracIn needs training"):
        compare_methods(resolved, ["ekfac", "tracin"])
    for bank, match in {settings(): "is not a retraining bank", resolved.out / "gone.npz": "There is no bank"}.items():
        with pytest.raises(UsageError, match=match) as refused:
            compare_methods(resolved, ["ekfac"], bank=bank)
        assert "rm " not in str(refused.value)
    assert not (resolved.out / "methods").exists()


def test_work_done_once_is_told_apart():
    assert Cost(one_off=3.0, asked=2.0, pairs=400).per_pair == 0.005
