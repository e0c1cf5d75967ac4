import os
import subprocess
import sys

import pytest

from whence.errors import WhenceError
from whence.store.files import atomic, locked, temporary_for


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_deleted_by_the_next_who_writes_the_file(tmp_path):
    left = tmp_path / f".scores.png.{ended()}.tmp"
    left.touch()
    reused = tmp_path / f".scores.png.{os.getppid()}.tmp"  # its process began long after the file was written
    reused.touch()
    os.utime(reused, (1e9, 1e9))
    other, foreign = tmp_path / f".x.png.{left.name.split('.')[-2]}.tmp", tmp_path / ".scores.png.a.tmp"
    for file in (other, foreign):
        file.touch()
    with atomic(tmp_path / "scores.png") as temporary:
        temporary.write_text("drawn")
    assert {file.name for file in tmp_path.iterdir()} == {"scores.png", other.name, foreign.name}


def test_what_another_process_is_writing_stays(tmp_path):
    writing = tmp_path / f".scores.png.{os.getppid()}.tmp"
    writing.touch()
    with atomic(tmp_path / "scores.png") as temporary:
        temporary.write_text("drawn")
    assert writing.exists()


def test_a_folder_that_a_killed_process_left_is_deleted(tmp_path):
    left = tmp_path / f".report.{ended()}.tmp"
    (left / "queries").mkdir(parents=True)
    assert temporary_for(tmp_path / "report").name == f".report.{os.getpid()}.tmp" and not left.exists()


def test_a_lock_says_who_holds_it_and_is_let_go(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(WhenceError, match=rf"process {os.getpid()}\) is writing"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass
