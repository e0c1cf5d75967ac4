"""The whole offline tour, as `make demo` runs it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from whence.data import as_rows
from whence.demo import model
from whence.demo.tour import METHODS, _lead, _measured, take_tour
from whence.demo.world import make_world
from whence.errors import StaleArtifact
from whence.operators import Identity
from whence.scoring import score
from whence.store.intact import read_json
from whence.store.scores import open_scores
from whence.validate.controls import best_rank


def shortened(epochs, **sizes):
    """The model's settings with less training, to which alone a test holds what is trained with them."""
    return replace(model.SETTINGS, training=replace(model.SETTINGS.training, epochs=epochs), **sizes)


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The demo, but that it hardly trains again for the row that it measures: `test_one_more_copy_...` does."""

    def hardly(*given):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "SETTINGS", shortened(epochs=1))
            return model.taught(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whence.demo.tour.taught", hardly)
        return take_tour(tmp_path_factory.mktemp("demo") / "run")


def test_true_sources_come_first(tour):
    assert len(tour.findings) + tour.unanswered == 24
    assert len(tour.findings) >= 22
    assert tour.rank1_share() >= 0.9
    assert tour.rank1_share("TF-IDF") < 0.6
    assert tour.median_lead() > tour.median_lead("gradient dot product")


def test_the_summary_is_what_the_scores_on_disk_say(tour):
    summary = json.loads((tour.folder / "summary.json").read_text())
    scores = open_scores(tour.folder / "scores")
    assert {"questions", "planted_rank1_share", "median_rank", "seconds"} <= set(summary)
    for number, finding in enumerate(summary["findings"]):
        assert scores.top(number, 1)["text"][0] == finding["raises"][0]["text"]
        assert (finding["ranks"][METHODS[0]] == 1) == finding["raises"][0]["is_source"]


def test_a_row_is_measured_by_training_again(tour):
    measured, first = tour.measured, tour.findings[0]
    scores = open_scores(tour.folder / "scores")
    assert (measured.question, measured.row) == (first.question, first.raises[0]["text"])
    assert measured.slope == scores.top(0, 1)["value"][0] and measured.once == scores.queries["measured"][0]
    assert measured.twice != measured.once != measured.without
    assert read_json(tour.folder / "measured.json") == json.loads((tour.folder / "summary.json").read_text())["measured"]


def test_one_more_copy_of_the_row_raises_the_answer_and_none_lowers_it(tmp_path, monkeypatch):
    """Training with every row counted once is the demo's own training, to the bit."""
    monkeypatch.setattr(model, "SETTINGS", shortened(epochs=12, width=32, inner=64))
    world = make_world(people=12, questions=2)
    rows, question = as_rows(world.rows), world.questions[0]
    (taught, tokenizer), (same, _) = model.taught(rows, 0, [{}, dict.fromkeys(range(len(rows)), 1.0)])
    assert all(torch.equal(a, b) for a, b in zip(taught.parameters(), same.parameters(), strict=True))
    names = [name for name, _ in taught.named_modules() if name.endswith("_proj")]
    influence = score(taught, model.task_of(tokenizer), [question.row], rows, Identity(names))
    measured = _measured(tmp_path, 0, rows, question.row, influence)
    assert measured.once == influence.queries["measured"][0]
    assert measured.without < measured.once < measured.twice < 0


def test_slopes_beyond_what_log_p_can_rise_are_marked(tour):
    for finding in tour.findings:
        for row in finding.raises + finding.lowers:
            assert bool(row["limit"]) == (row["nats"] > -finding.log_p)
    page = (tour.folder / "summary.md").read_text()
    assert "at most +" in page and "Measured by training again" in page and ", p = " in page


def test_pages_name_every_question_and_both_signs(tour):
    for name in ("summary.md", "summary.html"):
        page = (tour.folder / name).read_text()
        assert all(finding.question in page for finding in tour.findings)
        assert "+" in page and "planted source" in page and "not proof" in page.replace("not a proof", "not proof")


def test_a_second_tour_computes_nothing_again(tour):
    before = {path: path.stat().st_mtime_ns for path in tour.folder.rglob("*.safetensors")}
    again = take_tour(tour.folder)
    assert {path: path.stat().st_mtime_ns for path in tour.folder.rglob("*.safetensors")} == before
    assert [finding.ranks for finding in again.findings] == [finding.ranks for finding in tour.findings]


def test_another_seed_in_the_same_folder_is_refused(tour):
    with pytest.raises(StaleArtifact, match="another corpus"):
        take_tour(tour.folder, seed=1)


def test_ties_count_against_the_source():
    assert best_rank(np.array([1.0, 1.0, 0.0]), [0]) == 2
    assert best_rank(np.array([1.0, 2.0, 0.0]), [0, 1]) == 1
    assert _lead(np.array([4.0, 2.0, 0.0]), [0]) == 2.0
    assert _lead(np.array([-1.0, 2.0]), [0]) == 0.0
