"""The quality benchmark: what it writes is what it measured, banks are made once, and what is committed is complete."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality, quality_report
from benchmarks.quality import CEILING, METHODS, REFERENCE, SLOPES, Work, by, held_out_slope, main, of_training
from whence.errors import UsageError
from whence.validate import bank as bank_module
from whence.validate.bank import Bank, Spec, open_bank, plain_spec
from whence.validate.settings import setting
from whence.validate.trainer import Recipe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SPECS = {"removals": Spec("removals", subsets=24, share=0.05), "halves": Spec("halves", subsets=20)}
SOME = {name: METHODS[name] for name in (REFERENCE, "gradient dot", "random")}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    assert main(["--settings", "diabetes", "--out", str(folder), "--recheck"], SPECS, SOME) == 0
    return folder, json.loads((folder / "quality.json").read_text())


def test_every_method_has_a_row_per_measure(written):
    _, found = written
    rows = found["rows"]
    assert {row["setting"] for row in rows} == {"diabetes"}
    for measure in quality.MEASURES:
        own = {row["method"]: row for row in rows if row["measure"] == measure}
        assert set(own) == {*SOME, CEILING}
        assert all(row["ci_low"] <= row["value"] <= row["ci_high"] and row["seconds"] >= 0 for row in own.values())
        assert own[REFERENCE]["value"] > own["random"]["value"] + 0.3
    (gap,) = [r for r in rows if r["method"] == "random" and r["measure"] == f"{REFERENCE} ahead, removals"]
    values = {row["method"]: row["value"] for row in rows if row["measure"] == "lds removals"}
    assert gap["value"] == pytest.approx(values[REFERENCE] - values["random"], abs=2e-4) and gap["ci_low"] > 0


@pytest.mark.parametrize("kind", ["removals", "halves"])
def test_a_held_out_slope_is_1_where_others_say_how_large_effects_are(kind):
    spec = Spec(kind, subsets=40, seeds=(0,), share=0.1)
    draw, kept = np.random.default_rng(0), spec.masks(30)
    scores = draw.normal(size=(20, 30))
    effects = (spec.weights(kept) - 1) @ scores.T * 0.05

    def slope(changes):
        bank = Bank(kept, changes[None], np.zeros((1, 20)), {"spec": plain_spec(spec)})
        return held_out_slope(scores, bank)

    assert slope(effects).mean == pytest.approx(1) and slope(effects).low == pytest.approx(1)
    noisy = slope(effects + draw.normal(size=effects.shape) * effects.std())
    assert noisy.low < 1 < noisy.high and abs(noisy.mean - 1) < 0.15
    twice = slope(effects * np.where(np.arange(20) % 2, 2, 1))  # a gain of 1 for half of the queries, of 2 for the others
    own = np.square(effects).sum(0)
    even, odd = own[::2].sum(), own[1::2].sum()
    assert twice.mean == pytest.approx((2 * odd + 2 * even) / (odd + 4 * even), abs=0.05)
    assert slope(draw.normal(size=effects.shape)).low < 0.5


def test_slopes_alone_leave_all_other_rows_as_they_are(written, tmp_path):
    folder, found = written
    (tmp_path / "quality.json").write_text((folder / "quality.json").read_text())
    (tmp_path / "banks").symlink_to(folder / "banks")
    given = ["--settings", "diabetes", "--out", str(tmp_path), "--slopes", "--methods", "gradient dot"]
    assert main(given, SPECS, SOME) == 0
    again = json.loads((tmp_path / "quality.json").read_text())
    lds = [[row for row in each["rows"] if row["measure"] not in SLOPES] for each in (found, again)]
    assert lds[0] == lds[1] and again["settings"] == found["settings"]
    assert {row["method"] for row in again["rows"] if row["measure"] in SLOPES} == set(SOME)
    near = {row["method"]: abs(row["value"] - 1) for row in again["rows"] if row["measure"] == "held-out slope, removals"}
    assert near[REFERENCE] < 0.15 and "Held-out slope" in (tmp_path / "quality.md").read_text()


def test_tables_and_plot_show_the_rows(written):
    folder, found = written
    text = (folder / "quality.md").read_text()
    for row in found["rows"]:
        if row["measure"] == "lds removals":
            assert f"{row['value']:.3f} ± {(row['ci_high'] - row['ci_low']) / 2:.3f}" in text
    assert "| diabetes | diabetes: 10-64-64-1 tanh" in text and "24 + 20" in text
    assert (folder / "quality.png").read_bytes()[:4] == b"\x89PNG"
    plotted = quality_report.points(found["rows"])["diabetes"]
    assert {row["method"] for row in plotted} == {*SOME, CEILING}


def test_another_method_is_one_line_and_retrains_nothing(written, monkeypatch):
    folder, found = written
    monkeypatch.setattr(bank_module, "retrain", lambda *a, **k: pytest.fail("retrained"))
    more = {**SOME, "negated": lambda work: -work.scores("ekfac")}
    assert main(["--settings", "diabetes", "--out", str(folder)], SPECS, more) == 0
    rows = json.loads((folder / "quality.json").read_text())["rows"]
    values = {row["method"]: row for row in rows if row["measure"] == "lds removals"}
    assert values["negated"]["value"] == pytest.approx(-values[REFERENCE]["value"], abs=1e-4)
    assert values["negated"]["ci_high"] < 0
    before = {row["method"]: row["value"] for row in found["rows"] if row["measure"] == "lds removals"}
    assert values[REFERENCE]["value"] == before[REFERENCE]


def test_what_takes_an_hour_is_measured_by_name_and_its_rows_are_kept(written, tmp_path, monkeypatch, capsys):
    shutil.copytree(written[0], tmp_path / "own")
    before = json.loads((tmp_path / "own" / "quality.json").read_text())
    monkeypatch.setattr(quality, "SETTINGS", ("diabetes",))
    monkeypatch.setattr(quality, "DEAR", {"diabetes": ("random",)})
    again = {name: METHODS[name] for name in (REFERENCE, "random")}
    assert main(["--out", str(tmp_path / "own")], SPECS, again) == 0
    assert "measured by name only (--methods), an hour and more: random" in capsys.readouterr().out
    after = json.loads((tmp_path / "own" / "quality.json").read_text())
    old, new = ([row for row in found["rows"] if row["method"] == "random"] for found in (before, after))
    assert old == new and "gradient dot" not in {row["method"] for row in after["rows"]}, "only rows of what is dear are kept"
    (tmp_path / "own" / "quality.json").unlink()
    assert main(["--out", str(tmp_path / "own")], SPECS, again) == 0
    assert "random: takes more than an hour" in (tmp_path / "own" / "quality.md").read_text()


def test_a_truncated_bank_stops_it(written, tmp_path):
    folder, _ = written
    banks = tmp_path / "banks"
    banks.mkdir()
    for file in (folder / "banks").iterdir():
        (banks / file.name).write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UsageError, match="cut off"):
        main(["--settings", "diabetes", "--out", str(tmp_path)], SPECS, SOME)


def test_all_methods_give_scores_or_nothing(shared_data):
    few = METHODS | {"ASTRA, damping of training": by("astra", damping="training", depth=40)}  # steps of 600
    for name in ("energy", "text"):
        whole = setting(name, shared_data)
        small = replace(whole, train=whole.train[:40], queries=whole.queries[:5], recipe=replace(whole.recipe, epochs=2))
        if whole.texts:
            small = replace(small, texts=(whole.texts[0][:5], whole.texts[1][:40]))
        work = Work(small)
        found = {method: work.measure(function)[0] for method, function in few.items()}
        nothing = {method for method, scores in found.items() if scores is None}
        if name == "energy":
            assert nothing == {"BM25", "TF-IDF"}
        else:
            assert nothing == {method for method in METHODS if "exact" in method}
        for scores in found.values():
            assert scores is None or (scores.shape == (5, 40) and np.isfinite(scores).all())
        assert np.abs(found["representation similarity"]).max() <= 1 + 1e-6


def test_seconds_count_what_is_shared(written):
    own = setting("diabetes")
    work = Work(replace(own, train=own.train[:50], queries=own.queries[:5]))
    first, second = (work.measure(METHODS[f"EK-FAC, damping {damping}"])[1] for damping in (0.1, 1))
    fit = work._made["fit", "ekfac", 0, 1][1]
    assert first > fit > 0 and second > fit


def test_damping_of_training():
    own = setting("diabetes")  # 309 rows
    plain = replace(own, recipe=Recipe(0.1, 2, 100, weight_decay=0.5))
    assert of_training(plain) == pytest.approx(1 / (0.1 * 8) + 0.5)
    assert of_training(replace(own, recipe=Recipe(0.1, 2, 100, "momentum"))) == pytest.approx(1 / (0.1 * 8 * 10))
    assert of_training(replace(own, recipe=Recipe(0.1, 2, 100, "adamw"))) is None


# what is committed


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "quality.json").read_text())


def test_committed_banks_are_whole_and_small():
    files = sorted((RESULTS / "banks").glob("*.npz"))
    assert {file.stem for file in files} == {f"{name}-{kind}" for name in quality.SETTINGS for kind in quality.SPECS}
    for file in files:
        name, kind = file.stem.rsplit("-", 1)
        bank = open_bank(file)
        wanted = quality.OWN_SPECS.get(name, quality.SPECS)[kind]
        assert bank.spec == wanted and bank.spec.subsets >= 100
        assert file.stat().st_size < 250_000


def test_committed_intervals_are_narrow_enough(committed):
    """The reference's 95 % interval is 0.03 to either side or less."""
    rows = [row for row in committed["rows"] if row["method"] == REFERENCE and row["measure"] == "lds removals"]
    assert {row["setting"] for row in rows} == {"concrete", "energy", "digits", "ag_news", "lm"}
    assert all(row["ci_high"] - row["ci_low"] <= 0.06 for row in rows)


def test_committed_rows_are_of_all_methods(committed):
    assert list(committed["settings"]) == ["concrete", "energy", "digits", "ag_news", "lm"]
    for name in committed["settings"]:
        methods = {row["method"] for row in committed["rows"] if row["setting"] == name}
        assert methods >= {REFERENCE, "gradient dot", "K-FAC, damping 0.1", "random", CEILING}
    text = (RESULTS / "quality.md").read_text()
    assert all(f"{row['value']:.3f} ±" in text for row in committed["rows"] if row["measure"] == "lds removals")


def test_committed_differences_hold(committed):
    """What docs/quality.md says: EK-FAC is ahead, beyond doubt, of everything that has no curvature, and of the diagonal."""
    rows = [row for row in committed["rows"] if row["measure"] == f"{REFERENCE} ahead, removals"]
    for method in ("diagonal, damping 0.1", "gradient dot", "gradient cosine", "BM25", "TF-IDF", "gradient norm", "random"):
        own = [row for row in rows if row["method"] == method]
        assert own and all(row["ci_low"] > 0 for row in own), method
