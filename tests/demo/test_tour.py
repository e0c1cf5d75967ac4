"""The whole offline tour, as `make demo` runs it."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from whence.cli.demo import show_measured, show_removal
from whence.data import as_rows
from whence.demo import model
from whence.demo import tour as tour_module
from whence.demo.tour import METHODS, _lead, _trained_again, take_tour
from whence.demo.world import make_world
from whence.errors import StaleArtifact
from whence.linalg.stats import best_rank
from whence.operators import Identity
from whence.scoring import score
from whence.store.intact import read_json
from whence.store.scores import open_scores


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
    kept = read_json(tour.folder / "measured.json")["measured"]
    assert [kept[0][0], kept[1][0]] == [measured.twice, measured.without]


def test_predicted_stands_beside_measured_for_every_other_question(tour):
    scores, removal = open_scores(tour.folder / "scores"), tour.removal
    kept = np.array(read_json(tour.folder / "measured.json")["measured"])
    before, first = scores.queries["measured"].to_numpy(), scores.raw.argmax(1)
    assert [row.question for row in removal.rows] == [finding.question for finding in tour.findings[1:]]
    for number, row in enumerate(removal.rows, start=1):
        group = list(range(2 - number % 2, len(tour.findings), 2))
        assert number in group and row.row == scores.top(number, 1)["text"][0]
        np.testing.assert_allclose(row.predicted, -scores.values[number, list({*first[group]})].sum(), rtol=1e-5)
        np.testing.assert_allclose(row.measured, kept[3 - number % 2, number] - before[number], rtol=1e-6)
    assert removal.calibration["retrainings"] == 2 and removal.calibration["says"] in (tour.folder / "summary.md").read_text()
    console = Console(width=120, file=io.StringIO())
    show_measured(tour.measured, console)
    show_removal(removal, console)
    printed = console.file.getvalue()
    assert removal.says in printed and removal.calibration["says"] in printed and removal.rows[0].row in printed


def test_no_predicted_change_takes_log_p_past_0_without_a_word(tour):
    for log_p, change, said in [
        (tour.measured.once, tour.measured.slope, tour.measured.beyond),
        *((row.log_p, row.predicted, row.beyond) for row in tour.removal.rows),
        *((each.log_p, row["nats"], row["limit"]) for each in tour.findings for row in [*each.raises, *each.lowers]),
    ]:
        assert said.startswith("beyond first order: at most +") == (log_p + change > 0) and bool(said) == (log_p + change > 0)


def test_one_more_copy_of_the_row_raises_the_answer_and_none_lowers_it(tmp_path, monkeypatch):
    """Training with every row counted once is the demo's own training, to the bit."""
    monkeypatch.setattr(model, "SETTINGS", shortened(epochs=12, width=32, inner=64))
    world = make_world(people=12, questions=2)
    rows, queries = as_rows(world.rows), as_rows([question.row for question in world.questions])
    (taught, tokenizer), (same, _) = model.taught(rows, 0, [{}, dict.fromkeys(range(len(rows)), 1.0)])
    assert all(torch.equal(a, b) for a, b in zip(taught.parameters(), same.parameters(), strict=True))
    names = [name for name, _ in taught.named_modules() if name.endswith("_proj")]
    influence = score(taught, model.task_of(tokenizer), queries, rows, Identity(names))
    measured, removal = _trained_again(tmp_path, 0, rows, queries, influence)
    assert [row.measured < 0 for row in removal.rows] == [True] * (len(queries) - 1)
    assert measured.once == influence.queries["measured"][0]
    assert measured.without < measured.once < measured.twice < 0


def test_the_pages_say_what_was_measured_and_what_is_impossible(tour):
    page = (tour.folder / "summary.md").read_text()
    assert "beyond first order: at most +" in page and ", from p = " in page
    assert "Measured by training again" in page and "The first row left out" in page and ", p = " in page


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


def test_another_seed_in_the_same_folder_is_refused_or_keeps_it_beside(tour, monkeypatch):
    with pytest.raises(StaleArtifact, match="another corpus.*\n.*\n.*--rerun"):
        take_tour(tour.folder, seed=1)

    def killed(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(tour_module, "teach", killed)
    with pytest.raises(KeyboardInterrupt):
        take_tour(tour.folder, seed=1, rerun=True)
    kept = tour.folder.with_name(f"{tour.folder.name}.1")
    assert (kept / "summary.json").exists() and [file.name for file in tour.folder.iterdir()] == ["corpus.jsonl"]
    shutil.rmtree(tour.folder)
    kept.rename(tour.folder)


def test_ties_count_against_the_source():
    assert best_rank(np.array([1.0, 1.0, 0.0]), [0]) == 2
    assert best_rank(np.array([1.0, 2.0, 0.0]), [0, 1]) == 1
    assert _lead(np.array([4.0, 2.0, 0.0]), [0]) == 2.0
    assert _lead(np.array([-1.0, 2.0]), [0]) == 0.0
