"""Every command on a real disk that is full, or that takes no writing: it says so, and goes on once there is room."""

import os
import subprocess
from pathlib import Path

import pytest
from distributed import work
from distributed.processes import run as in_processes
from facts import facts, write_jsonl

MIB = 2**20


@pytest.fixture
def disk(tmp_path):
    """A disk of its own in memory, of 16 MiB; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes free; deleting the file makes room again."""
    filler = disk / "filler"
    filler.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left))
    return filler


@pytest.fixture
def commands(tiny_model_folder, data, queries, fitted, tmp_path, run):
    """Commands, and what each writes below a folder."""
    model = tiny_model_folder
    scores = tmp_path / "scores"
    run("score", model, "-d", data, "-f", fitted, "--queries", queries, "-o", scores, "-q")
    rows = write_jsonl(tmp_path / "rows.jsonl", facts())
    config = tmp_path / "whence.yaml"
    sizes = "{max_steps: 4, batch_size: 4, save_steps: 2}"
    config.write_text(
        f"model: {{base: {model}}}\ndata: {{path: {rows}}}\nprompts: {{path: {queries}}}\ntrain: {sizes}\n"
        "generate: {max_new_tokens: 4}\nevaluate: {compare: true}\n"
    )

    def of(name: str, out: Path) -> list[object]:
        return {
            "fit": ["fit", model, "-d", data, "-o", out / "a", "-q"],
            "score": ["score", model, "-d", data, "-f", fitted, "--queries", queries, "-o", out / "a", "-q"],
            "index": ["index", "build", model, "-d", data, "-o", out / "a", "-q"],
            "generate": ["generate", model, "--prompts", queries, "-o", out / "a.json", "-q"],
            "train": ["train", model, "-d", data, "--max-steps", 4, "--save-steps", 2, "-o", out / "a", "-q"],
            "report": ["report", scores, "-o", out / "a", "-q"],
            "inspect": ["inspect", fitted, "-o", out / "a", "-q"],
            "export": ["export", scores, "-o", out / "a.parquet"],
            "run": ["run", config, "--set", f"out={out / 'a'}", "-q"],
            "recipes": ["recipes", "cp", "demo", out / "a"],
            "init": ["init", out / "a" / "whence.yaml"],
        }[name]

    return of


STAGES = ["fit", "score", "index", "generate", "train", "report", "inspect", "export", "run", "recipes", "init"]


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 4096, 24 * 1024, 80 * 1024, 200 * 1024])
@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk(name, left, commands, disk, run):
    filler, words = fill(disk, left), commands(name, disk)
    ((code, _, said),) = in_processes(work.command, *words, world=1)
    assert code in (0, 3), said
    if code == 0:
        return  # there was room enough
    assert "could not be written.  [WHENCE-13]" in said and "0.0 GB free where" in said and "goes on" in said
    assert "Traceback" not in said
    filler.unlink()
    ((code, _, said),) = in_processes(work.command, *words, world=1)
    assert code == 0, said
    assert not list(disk.rglob("*.tmp")) and not list(disk.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_read_only_disk(name, commands, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ((code, _, said),) = in_processes(work.command, *commands(name, disk), world=1)
    assert code == 3, said
    assert "The disk is read-only: " in said and "[WHENCE-13]" in said and "another --out" in said
