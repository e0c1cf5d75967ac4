"""Several processes give what one gives, write it once, end together, and go on after a kill."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from distributed import work
from distributed.processes import launched, run, torchrun
from oracle import matrices_of

from whence import dist
from whence.errors import NumericalError, StaleArtifact, UsageError, WhenceError
from whence.fitting import open_factors

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-12
"""Relative to the largest number, in float64: the order of sums differs, and nothing else. What is no sum is the same."""


VARYING = {"config.json", "manifest.json", ".lock"}


def agree(found, expected):
    """Whether the same names have the same numbers, but for rounding."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if isinstance(values, dict):
            agree(found[name], values)
            continue
        a, b = np.asarray(found[name], dtype=float), np.asarray(values, dtype=float)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * max(1e-30, np.nan_to_num(np.abs(b)).max(initial=0)))


def same(a, b):
    """Whether everything is the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)


def files(folder):
    """Names and sizes of all files but those that hold times or a process's number, whose digits vary."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.stat().st_size for name, path in found.items() if path.name not in VARYING}


def test_one_process_needs_nothing():
    assert (dist.rank(), dist.world(), list(dist.share([1, 2]))) == (0, 1, [1, 2])
    dist.only_one_process("whence generate")
    dist.barrier()
    dist.start()
    assert not torch.distributed.is_initialized()
    program = "import whence.dist, whence.cli.console, sys; whence.dist.barrier(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_incomplete_environment_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as cluster managers set it for programs that never ask
    assert dist.world() == 1 and dist.rank() == 0


def test_commands_for_one_process_say_so(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"whence generate runs in one process[^$]*4 processes"):
        dist.only_one_process("whence generate")
    with dist.alone():
        dist.only_one_process("whence generate")
        assert "RANK" not in os.environ
    assert dist.rank() == 1


def test_exchanges():
    first, second = run(work.exchanged)
    assert (first["share"], second["share"]) == ([0, 2, 4, 6], [1, 3, 5])
    assert first["sums"] == {"only 0": [1, 1], "only 1": [1, 1]}
    assert second["sums"] == {"shared": [3, 3, 3], **first["sums"]}
    assert (first.pop("to first"), second.pop("to first")) == ([{"0": []}, {"1": [1]}], [])
    for found in (first, second):
        assert found["first"] == 0 and found["all"] == [0, 1] and found["names"] == ["x", "y0", "y1"]
        assert found["to all"] == {"a": [0], "b": []} and found["bfloat16"] == [2, 2]
        assert found["alone"] == (0, 1, False) and found["world"] == 2


@pytest.mark.parametrize("where", ["first", "agreeing"])
def test_an_error_is_that_of_all(where):
    for error in run(work.failing, where):
        assert isinstance(error, NumericalError) and "an error of" in error.what and error.fix == "that"


def test_an_error_that_nobody_hears_of_ends_the_others():
    first, second = run(work.failing, "nowhere")
    assert isinstance(second, NumericalError)
    assert isinstance(first, WhenceError) and "Another process of this run ended" in str(first)


def test_factors(tmp_path):
    expected = work.factors(tmp_path / "one")
    first, second = run(work.factors, tmp_path / "two")
    assert same(first, second), "the processes differ"
    agree(first, expected)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_scores(tmp_path):
    work.fit_case("llama", tmp_path / "factors")
    expected = work.scored(tmp_path / "one", tmp_path / "factors")
    found = run(work.scored, tmp_path / "three", tmp_path / "factors", world=3)
    assert same(found[0], found[1]) and same(found[0], found[2]), "the processes differ"
    agree(found[0], expected)
    for way in expected.keys() - {"queries", "examples", "all"}:  # those are sums over processes
        assert same(found[0][way], expected[way]), way
    assert files(tmp_path / "three").keys() == files(tmp_path / "one").keys()


def test_nothing_is_deleted_before_all_have_read_it(tmp_path):
    first, second = run(work.reading_late, work.all_that_deletes, tmp_path)
    assert isinstance(first, dict), first
    assert same(first, second)


@pytest.mark.parametrize(("stage", "advances"), [("covariance", 10), ("eigenvectors", 2), ("eigenvalues", 10)])
def test_a_killed_fit(tmp_path, stage, advances):
    (whole, _) = run(work.fit_case, "llama", tmp_path / "whole", work.ROWS)
    ends = run(work.kill_at, stage, advances, None, work.fit_case, "llama", tmp_path / "again", work.ROWS)
    assert -signal.SIGKILL in ends and all(end == -signal.SIGKILL or isinstance(end, WhenceError) for end in ends)
    assert not (tmp_path / "again" / "manifest.json").exists()
    subprocess.run(["cp", "-r", tmp_path / "again", tmp_path / "alone"], check=True)

    (seen, found), _ = run(work.resume, work.fit_case, "llama", tmp_path / "again", work.ROWS)
    assert seen["covariance" if stage == "eigenvectors" else stage] > 0, "the second run began from nothing"
    assert same(found, whole)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()

    seen, found = work.resume(work.fit_case, "llama", tmp_path / "alone", work.ROWS)  # in one process
    assert seen["covariance" if stage == "eigenvectors" else stage] > 0
    agree(found, whole)


def test_a_killed_score(tmp_path):
    work.fit_case("llama", tmp_path / "factors", work.ROWS)
    (whole, _) = run(work.score_in, tmp_path / "factors", tmp_path / "whole")
    ends = run(work.kill_at, "score", 10, None, work.score_in, tmp_path / "factors", tmp_path / "again")
    assert -signal.SIGKILL in ends and not (tmp_path / "again" / "manifest.json").exists()
    subprocess.run(["cp", "-r", tmp_path / "again", tmp_path / "alone"], check=True)
    (seen, found), _ = run(work.resume, work.score_in, tmp_path / "factors", tmp_path / "again")
    assert seen["score"] > 0 and same(found, whole)
    seen, found = work.resume(work.score_in, tmp_path / "factors", tmp_path / "alone")
    assert seen["score"] > 0
    agree(found, whole)


def test_an_index(tmp_path):
    work.fit_case("llama", tmp_path / "factors", work.ROWS)
    for name, basis in (("plain", None), ("in a basis", tmp_path / "factors")):
        expected = work.index_in(tmp_path / f"{name}, one", basis)
        first, second = run(work.index_in, tmp_path / f"{name}, two", basis)
        assert same(first, second), "the processes differ"
        assert all(same(first[part], expected[part]) for part in ("places", "rows", "norms"))
        agree(first, expected)
        assert files(tmp_path / f"{name}, two") == files(tmp_path / f"{name}, one")
        for shard in (tmp_path / f"{name}, one").glob("*.safetensors"):
            assert shard.read_bytes() == (tmp_path / f"{name}, two" / shard.name).read_bytes()
    agree(run(work.index_in, None)[1], work.index_in(None))


def test_a_killed_index(tmp_path):
    whole = work.index_in(tmp_path / "whole")
    ends = run(work.kill_at, "index", 10, None, work.index_in, tmp_path / "again")
    assert -signal.SIGKILL in ends and not (tmp_path / "again" / "manifest.json").exists()
    subprocess.run(["cp", "-r", tmp_path / "again", tmp_path / "alone"], check=True)
    (seen, found), _ = run(work.resume, work.index_in, tmp_path / "again")
    assert seen["index"] > 0, "the second run began from nothing"
    agree(found, whole)
    seen, found = work.resume(work.index_in, tmp_path / "alone")  # in one process
    assert seen["index"] > 0 and same(found, whole)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()


def test_one_process_goes_on_in_two(tmp_path):
    whole = work.fit_case("llama", tmp_path / "whole", work.ROWS)
    (end,) = run(work.kill_at, "eigenvalues", 10, 0, work.fit_case, "llama", tmp_path / "again", work.ROWS, world=1)
    assert end == -signal.SIGKILL
    (seen, found), _ = run(work.resume, work.fit_case, "llama", tmp_path / "again", work.ROWS)
    assert seen["eigenvalues"] > 0
    agree(found, whole)


@pytest.mark.parametrize("killed", [0, 1])
def test_one_killed_process_ends_the_others(tmp_path, killed):
    ends = run(work.kill_at, "covariance", 2, killed, work.fit_case, "llama", tmp_path / "factors", work.ROWS)
    assert ends[killed] == -signal.SIGKILL
    assert isinstance(ends[1 - killed], WhenceError) and "Another process of this run ended" in str(ends[1 - killed])


@pytest.mark.parametrize("place", [0, 1])
def test_a_row_that_one_process_can_not_work_with(tmp_path, place):
    errors = run(work.fit_overflowing, tmp_path / "factors", place)
    assert all(isinstance(error, NumericalError) and "finite" in str(error) for error in errors)
    assert str(errors[0]) == str(errors[1])


def test_a_folder_is_claimed_by_all(tmp_path):
    assert run(work.claimed, tmp_path / "f", {"stage": "fit", "seed": 0}) == [False, False]
    errors = run(work.claimed, tmp_path / "f", {"stage": "fit", "seed": 1})
    assert all(isinstance(error, StaleArtifact) and "seed 0 -> 1" in str(error) for error in errors)
    errors = run(work.claimed, tmp_path / "g", {"stage": "fit", "seed": 0}, {"stage": "fit", "seed": 3})
    assert all(isinstance(error, WhenceError) and "seed 0 -> 3" in str(error) for error in errors)


def test_other_work_is_refused_in_memory_too(tmp_path):
    work.fit_case("mlp", tmp_path / "factors")
    for errors in (run(work.fit_backwards, None), run(work.score_backwards, tmp_path / "factors")):
        for error in errors:
            assert isinstance(error, WhenceError) and "doing different work from the first" in str(error), error
            assert "data.fingerprint" in str(error)


def test_a_process_that_fails_does_not_wait_for_the_others_at_its_end(monkeypatch):
    stopped = []
    monkeypatch.setattr(dist, "stop", lambda: stopped.append(True))
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist._State, "failed", False)
    monkeypatch.delattr(sys, "last_value", raising=False)
    dist._stop_at_exit()
    assert stopped
    stopped.clear()
    dist.fail()
    dist._stop_at_exit()
    monkeypatch.setattr(dist._State, "failed", False)
    monkeypatch.setattr(sys, "last_value", KeyError(), raising=False)  # as a program's uncaught error leaves it
    dist._stop_at_exit()
    assert not stopped


def ends_with(code):
    def program():
        if code is not None:
            raise code

    return program


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0),
        (SystemExit(), 0),
        (SystemExit(3), 3),
        (SystemExit("words"), 1),
        (KeyError("a bug"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_a_program_of_several_processes_ends_at_once_with_its_code(monkeypatch, capsys, raised, code):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
    dist.end(ends_with(raised))
    assert ended == [code]
    said = capsys.readouterr().err
    assert ("words" in said) == (code == 1 and isinstance(raised, SystemExit))
    assert ("a bug" in said) == isinstance(raised, KeyError)


def test_running_out_of_memory_is_no_fault_of_the_others(monkeypatch):
    monkeypatch.setattr(dist, "start", lambda: None)
    with pytest.raises(torch.OutOfMemoryError), dist._exchange():
        raise torch.OutOfMemoryError("of this one")
    with pytest.raises(RuntimeError, match="allocate"), dist._exchange():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    with pytest.raises(WhenceError, match="Another process of this run ended"), dist._exchange():
        raise RuntimeError("Connection closed by peer")


@pytest.fixture
def asked(tmp_path, tiny_model_folder):
    """A question to the tiny model about a dozen rows."""
    data = tmp_path / "train.jsonl"
    rows = [f'{{"prompt": "Where was P{n} born?", "completion": " In T{n % 4}."}}' for n in range(13)]
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return ["trace", tiny_model_folder, "--data", data, "-q", "Where was P3 born?", "-a", " In T3.", "--chunks", "2"]


@pytest.mark.slow
def test_the_same_command(tmp_path, asked):
    two = torchrun("whence", *asked, "--out", tmp_path / "two")
    ((code, alone, complaints),) = run(work.command, *asked, "--out", tmp_path / "one", world=1)
    assert code == 0 and two.stdout.replace("/two/", "/one/") == alone, complaints
    assert two.stderr.count("shows no sign of training") == 1, two.stderr
    found, expected = (matrices_of(open_factors(tmp_path / name / "factors")) for name in ("two", "one"))
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix, rtol=0, atol=float(1e-5 * matrix.abs().max()))
    succeeded, said = launched("whence", *asked, "--out", tmp_path / "two", "--seed", "1")
    assert not succeeded and said.count("made from something else") == 1, said


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_command_of_which_one_process_is_killed(tmp_path, asked, killed):
    succeeded, ended = launched("distributed.killed", killed, *asked, "--out", tmp_path / "two")
    assert not succeeded and ended.count("Another process of this run ended") + ended.count("This run was terminated") == 1, (
        ended
    )
    assert ("process 1 of 2:" in ended) == (killed == 0)
    (code, said, complaints), other = run(work.command, *asked, "--out", tmp_path / "two")
    assert said and (code, other) == (0, (0, "", "")), complaints
