"""`whence mirror RUN`: the scores of a run by its repeated training, in Python and as a command."""

import json

import numpy as np
import pytest
from distributed.processes import killed, run
from distributed.work import command, mirrored, resume

import whence
from whence.config import read_config
from whence.errors import StaleArtifact, UsageError
from whence.methods.base import attribute
from whence.pipeline import run_pipeline
from whence.pipeline.work import Workshop
from whence.progress import Silent, report_to
from whence.run import Run
from whence.settings import Score

TRAIN = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "save_steps": 9, "log_steps": 1, "evaluation": 0.2}


class Notes(Silent):
    """Remembers what is said."""

    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


@pytest.fixture
def finished(settings):
    """A run whose own scores are per token, which a mirrored run has none of."""
    asked = {"self_influence": False, "check": False, "queries": "prompts", "per": "token"}
    resolved = read_config(settings(evaluate=None, train=TRAIN, score=asked), environment={})
    run_pipeline(resolved, ["score"])
    return resolved


def test_a_run_is_mirrored(finished):
    with report_to(notes := Notes()):
        scores = whence.mirror(finished.out, queries=2, together=1)
    assert notes.said[0].startswith("plan: 3 trainings of 4 steps, 1 at a time: about 1 minute of one processor; weights")
    request = Workshop.of(finished).request
    point, queries = request.point, request.queries.take([0, 2])
    expected = attribute(
        "mirror", point.model, point.task, queries, point.rows, Score(batch_tokens=64), training=request.training, together=1
    )
    np.testing.assert_array_equal(scores.raw, expected.raw)
    assert scores.query_ids == list(queries.ids) and scores.about["own gain"] == expected.about["own gain"]
    with pytest.raises(StaleArtifact, match="share"):
        whence.mirror(finished.out, queries=2, together=1, share=0.5)
    assert "mirror-2" in {home.name for home in Run.of(finished).kept_scores()}, "which the page lists"


def test_the_command_tells_gain_and_agreement(finished):
    words = ("mirror", finished.out, "--queries", "2", "--together", "1", "--share", "0.5", "--complement", "--quiet")
    code, said, _ = command(*words)
    assert code == 0 and "2 x 16 scores (queries x rows), nats per copy" in said
    assert "raises it by" in said and "rank correlation with EK-FAC: " in said
    made, place = json.loads(command(*words, "--json")[1]), finished.out / "methods" / "mirror-2"
    assert made["scores"] == str(place) and made["method"] == "mirror" and made["operator"].endswith("and the others")
    assert f"rank correlation with EK-FAC: {made['correlation with EK-FAC']:.2f}" in said
    assert "mirrored run" in command("show", place, "--top", "1")[1]
    assert "in common: 2 queries, 16 rows" in command("diff", finished.out, place)[1]
    code, _, said = command("mirror", finished.out / "train")
    assert code == 2 and "is not a run" in said


def test_a_killed_one_resumes_and_two_processes_give_the_same_bits(finished, tmp_path):
    given = (finished.out, tmp_path / "killed")
    killed("mirror", 1, mirrored, *given)
    ((seen, resumed),) = run(resume, mirrored, *given, world=1)
    assert "repeat" not in seen
    whole = mirrored(finished.out, tmp_path / "whole")
    np.testing.assert_array_equal(resumed, whole)
    for found in run(mirrored, finished.out, tmp_path / "two"):
        np.testing.assert_array_equal(found, whole)


def test_a_run_without_a_training_says_what_to_add(settings):
    with pytest.raises(UsageError, match="How the model") as raised:
        whence.mirror(settings(evaluate=None, train=None))
    assert "--training CHECKPOINT" in raised.value.fix
