import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from killing import Killed, Killer

from benchmarks.flips import flip
from benchmarks.quality import TOLERANCE, recheck
from whence.errors import StaleArtifact, UsageError
from whence.progress import report_to
from whence.validate import bank as bank_module
from whence.validate.bank import Spec, make_bank, open_bank, save_bank
from whence.validate.settings import setting
from whence.validate.trainer import Recipe

SPEC = Spec("removals", subsets=6, share=0.05)


@pytest.fixture(scope="module")
def diabetes():
    whole = setting("diabetes")
    return replace(whole, train=whole.train[:60], queries=whole.queries[:7], recipe=Recipe(0.02, 3, 20, "momentum"))


@pytest.fixture(scope="module")
def made(diabetes, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "removals.npz"
    return make_bank(diabetes, SPEC, path), path


def test_a_bank_holds_what_retraining_measures(made, diabetes):
    bank, path = made
    assert bank.changes.shape == (2, 6, 7) and bank.kept.shape == (6, 60) and bank.whole.shape == (2, 7)
    assert (~bank.kept).sum(1).tolist() == [3] * 6
    whole = diabetes.trained([0]).measurements(diabetes.queries)[0]
    np.testing.assert_allclose(bank.whole[0], whole, rtol=1e-4)
    for subset in range(6):
        assert recheck(bank, diabetes, subset, seed=subset % 2) <= TOLERANCE
    assert path.stat().st_size < 5000
    unfinished = path.with_suffix(".unfinished.npz")
    assert not unfinished.exists()
    unfinished.write_bytes(path.read_bytes())  # killed before it was deleted
    assert make_bank(diabetes, SPEC, path).about == bank.about and not unfinished.exists()


def test_rechecking_finds_numbers_of_another_subset(made, diabetes):
    bank, _ = made
    swapped = replace(bank, changes=bank.changes[:, ::-1])
    assert recheck(swapped, diabetes) > 0.1


def test_halves_keep_half_of_the_rows_at_twice_the_weight():
    spec = Spec("halves", subsets=50)
    kept = spec.masks(61)
    assert (kept.sum(1) == 30).all()
    np.testing.assert_allclose(spec.weights(kept).sum(1), 61)
    assert abs(kept.mean(0) - 30 / 61).max() < 0.3  # no row is always in
    assert not np.array_equal(kept, replace(spec, seed=1).masks(61))
    assert np.array_equal(kept, spec.masks(61))


def test_a_finished_bank_is_opened_and_not_made_again(made, diabetes, monkeypatch):
    bank, path = made
    monkeypatch.setattr(bank_module, "retrain", lambda *a, **k: pytest.fail("retrained"))
    again = make_bank(diabetes, SPEC, path)
    assert np.array_equal(again.changes, bank.changes) and again.about == bank.about


@pytest.mark.parametrize(
    ("spec", "recipe"),
    [(Spec("removals", subsets=6, share=0.06), {}), (Spec("removals", subsets=7, share=0.05), {}), (SPEC, {"seed": 3})],
)
def test_a_bank_of_something_else_is_refused_and_kept(made, diabetes, spec, recipe):
    before = made[1].read_bytes()
    with pytest.raises(StaleArtifact, match=r"spec\.|recipe\.seed 0 -> 3"):
        make_bank(replace(diabetes, recipe=replace(diabetes.recipe, **recipe)), spec, made[1])
    assert made[1].read_bytes() == before


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.98])
def test_a_truncated_bank_is_refused(made, tmp_path, cut):
    content = made[1].read_bytes()
    short = tmp_path / "short.npz"
    short.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(UsageError, match="cut off"):
        open_bank(short)


def test_an_altered_bank_is_refused(made, tmp_path):
    with np.load(made[1]) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["levels"][0, 2, 3] += 1
    np.savez_compressed(tmp_path / "altered.npz", **arrays)
    with pytest.raises(UsageError, match="altered"):
        open_bank(tmp_path / "altered.npz")


def test_a_bank_that_lacks_subsets_or_seeds_is_refused(made, tmp_path):
    bank, _ = made
    for lacking in (
        replace(bank, changes=bank.changes[:, :5], kept=bank.kept[:5]),
        replace(bank, changes=bank.changes[:1], whole=bank.whole[:1]),
        replace(bank, kept=~bank.kept),
    ):
        save_bank(lacking, tmp_path / "lacking.npz")
        with pytest.raises(UsageError, match=r"lacks retrainings|other subsets"):
            open_bank(tmp_path / "lacking.npz")


def test_no_bank_is_no_bank(tmp_path):
    with pytest.raises(UsageError, match="no bank"):
        open_bank(tmp_path / "none.npz")


def test_a_killed_run_goes_on_where_it_stopped(made, diabetes, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_module, "SAVED", 3)
    path = tmp_path / "resumed.npz"
    with pytest.raises(Killed), report_to(Killer(left=2)):
        make_bank(diabetes, SPEC, path)
    assert not path.exists()
    with pytest.raises(UsageError, match="not a finished bank"):
        open_bank(path.with_suffix(".unfinished.npz"))
    with pytest.raises(StaleArtifact, match="learning_rate"):
        make_bank(replace(diabetes, recipe=replace(diabetes.recipe, learning_rate=0.03)), SPEC, path)
    counted = []
    retrain = bank_module.retrain
    monkeypatch.setattr(bank_module, "retrain", lambda *a, **k: counted.append(len(a[4])) or retrain(*a, **k))
    bank = make_bank(diabetes, SPEC, path)
    assert sum(counted) == 2 * 7 - 6  # two of the pieces were there
    np.testing.assert_allclose(bank.changes, made[0].changes, rtol=1e-3, atol=1e-6)


def test_the_about_says_where_it_comes_from(made):
    about = json.loads(json.dumps(made[0].about))
    assert about["setting"]["recipe"]["learning_rate"] == 0.02
    assert about["spec"]["seeds"] == [0, 1] and about["seconds"] > 0
    assert re.fullmatch(r"[0-9a-f]{16}", about["code"]) and about["setting"]["data"]


def test_a_bank_with_a_flipped_bit_is_refused_or_the_same(made, tmp_path):
    bank, path = made
    copied = tmp_path / "bank.npz"
    copied.write_bytes(path.read_bytes())
    draw, refused = random.Random(0), 0
    for _ in range(300):
        bit = draw.randrange(8 * copied.stat().st_size)
        flip(copied, bit)
        try:
            again = open_bank(copied)
        except UsageError as error:
            assert f"rm {copied}" in error.fix
            refused += 1
        else:  # in a date, or what else of a zip file nobody reads
            assert np.array_equal(again.changes, bank.changes) and again.about == bank.about
        flip(copied, bit)
    assert refused > 150
