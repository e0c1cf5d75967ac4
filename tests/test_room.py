"""How much fit, score and index build will write is known before they begin, and said where the disk may not hold it."""

import contextlib
import shutil
from collections import namedtuple

import pytest
import torch

import whence
from whence.demo.model import Settings, make_model, make_tokenizer
from whence.indexing import add_rows
from whence.operators import Identity
from whence.store.manifest import Folder

ROWS = [{"prompt": f"Where does {name} live?", "completion": f" In {town}."} for name in "abcdef" for town in "uvwx"]
LANDMARKS = [{"prompt": f"Who lives in {town}?", "completion": f" {name}"} for name in "ab" for town in "uvwx"]

HEADERS = 20_000
"""Bytes of what is as large for large models: manifests, headers of tables."""


@pytest.fixture(scope="module")
def opened():
    tokenizer = make_tokenizer(ROWS)
    return whence.open((make_model(tokenizer, settings=Settings(width=64, inner=128, heads=2)), tokenizer), data=ROWS)


@pytest.fixture
def disk(monkeypatch):
    """A disk with `free[0]` bytes left; `most[0]` is the size of the largest folder while one of its files was replaced."""
    seen = namedtuple("Disk", "free most")([10**12], [0])
    writing = Folder.writing

    @contextlib.contextmanager
    def watched(folder, name):
        with writing(folder, name) as temporary:
            yield temporary
            size = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
            seen.most[0] = max(seen.most[0], size)

    monkeypatch.setattr(Folder, "writing", watched)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, seen.free[0]))
    return seen


def fit(opened, out, **changes):
    return opened.fit(out=out, save_every=0.0, products="float32", check=False, **changes)


def score(opened, out, **changes):
    return whence.score(opened.model, opened.task(), ROWS, opened.rows, Identity(), out=out, check=False, **changes)


def index(opened, out, **changes):
    given = {"curvature": opened.curvature, "landmarks": LANDMARKS, "out": out, "check": False}
    return whence.build_index(opened.model, opened.task(), opened.rows, **given, **changes)


WORK = [
    (fit, {}),
    (fit, {"modules": "all", "groups": 3}),
    (fit, {"modules": "all", "largest_factor": 40}),
    (fit, {"method": "kfac"}),
    (fit, {"method": "diagonal"}),
    (fit, {"until": 0.999}),
    (score, {}),
    (score, {"per": "token", "norms": ("cosine", "relatif")}),
    (score, {"per": "module"}),
    (score, {"rescore": 2}),
    (score, {"aggregate": ("queries",), "per": "token"}),
    (index, {"kind": "landmarks", "bytes": 0.25}),
    (index, {"kind": "landmarks", "bytes": 0.25, "rank": 1}),
    (index, {"kind": "projections", "dim": 8}),
    (index, {"kind": "projections", "dim": 8, "kept": "float32"}),
]


@pytest.mark.parametrize("work, changes", WORK)
def test_the_folder_never_takes_more_than_was_foretold(work, changes, opened, disk, notes, tmp_path, monkeypatch):
    foretold = []
    monkeypatch.setattr(Folder, "warn_if_no_room", lambda folder, most: foretold.append(most))
    opened.curvature = fit(opened, None)
    foretold.clear()
    work(opened, tmp_path / "a", **changes)
    assert len(foretold) == 1 and disk.most[0] - HEADERS < foretold[0] < 2 * disk.most[0]


def test_rows_that_are_added_to_an_index_take_what_was_foretold(opened, disk, notes, tmp_path, monkeypatch):
    opened.curvature = fit(opened, None)
    index(opened, tmp_path / "a", kind="landmarks", bytes=4)
    foretold = []
    monkeypatch.setattr(Folder, "warn_if_no_room", lambda folder, most: foretold.append(most))
    disk.most[0] = 0
    more = [{"prompt": f"Where did {name} live?", "completion": " In z."} for name in "abcdefghijklmnop"]
    add_rows(tmp_path / "a", opened.model, opened.task(), more, opened.curvature)
    assert disk.most[0] - HEADERS < foretold[0] < 2 * disk.most[0]


@pytest.mark.parametrize("work", [fit, score, index])
def test_a_disk_that_is_too_small_is_said_before_the_work_begins(work, opened, disk, notes, tmp_path):
    opened.curvature = fit(opened, None)
    disk.free[0] = 100
    work(opened, tmp_path / "a")
    (said,) = [text for text in notes if "may write" in text]
    assert said.startswith(f"warning: {work.__name__} may write up to ") and f"to {tmp_path / 'a'}, where 0 kB are free" in said
    notes.clear()
    work(opened, tmp_path / "a")  # which is finished
    assert not [text for text in notes if "may write" in text]


def test_what_is_there_already_counts(disk, notes, tmp_path):
    with Folder.claim(tmp_path / "a", {"stage": "fit"}) as folder:
        folder.save("half", {"half": torch.zeros(500_000)})
        disk.free[0] = 1_000_000
        folder.warn_if_no_room(3_000_000)
        assert not notes
        folder.warn_if_no_room(3_100_000)
        assert len(notes) == 1 and "fit may write up to 1 MB" in notes[0]
