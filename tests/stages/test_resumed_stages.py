"""A run through several stages that is killed in any part resumes to the same bits; several processes give the same scores."""

import numpy as np
import pytest
from distributed import work
from distributed.processes import killed, run
from killing import Killed, Killer
from oracle import agree

from whence.progress import report_to

PARTS = ("covariance", "eigenvectors", "eigenvalues", "queries", "score")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with report_to(counting := Killer()):
        return work.staged(out), counting, out


def same(found, expected):
    assert [*found] == [*expected] == ["base", "tuned"]
    for name, raw in expected.items():
        np.testing.assert_array_equal(found[name], raw)


def files(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.name != ".lock"}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_ended_in_any_part_resumes(whole, part, tmp_path):
    expected, counting, folder = whole
    with pytest.raises(Killed), report_to(Killer(part, -(-3 * counting.advances[part] // 4))):
        work.staged(tmp_path / "run")
    with report_to(seen := Killer()):
        same(work.staged(tmp_path / "run"), expected)
    assert files(tmp_path / "run") == files(folder)
    done_before = {"queries": "eigenvalues", "score": "eigenvalues"}.get(part)
    if done_before:
        assert not seen.advances[done_before], "factors that were finished are not fitted again"
    with report_to(again := Killer()):
        same(work.staged(tmp_path / "run"), expected)
    assert not again.advances, "what is finished is read"


def test_a_killed_process_leaves_what_another_resumes(whole, tmp_path):
    expected, counting, _ = whole
    killed("score", counting.advances["score"] - 1, work.staged, tmp_path / "run")
    same(work.staged(tmp_path / "run"), expected)


def test_three_kills_cost_nothing_where_a_head_is_new(tmp_path):
    """In the factors of the first training, in the cross term of the second, and in the last scores."""
    expected = work.with_new_head(tmp_path / "straight")
    for part, advances in (("covariance", 10), ("products", 3), ("score", 4)):
        killed(part, advances, work.with_new_head, tmp_path / "run")
    with report_to(seen := Killer()):
        same(work.with_new_head(tmp_path / "run"), expected)
    assert not {"covariance", "eigenvalues"} & set(seen.advances), "factors that were finished are not fitted again"
    assert files(tmp_path / "run") == files(tmp_path / "straight")


@pytest.mark.parametrize(("work_of", "given"), [(work.staged, (True,)), (work.with_new_head, ())])
def test_several_processes_give_the_same(work_of, given, tmp_path):
    expected = work_of(None, *given)
    for found in run(work_of, tmp_path / "two", *given):
        for name, raw in expected.items():
            agree(found[name], raw, 1e-8)
