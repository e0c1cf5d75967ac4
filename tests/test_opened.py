"""The folder of a run says how it was opened: its name alone finds everything again, or it is said what is missing."""

import json
import shutil

import numpy as np
import pytest

import whence
from whence.errors import DiskFull, StaleArtifact, UsageError
from whence.opened import OPENED, remember, remembered
from whence.serve.opening import Opening

ROWS = [
    {"question": f"Who is {name}?", "answer": f" A {trade}."} for name in ("Ada", "Bo", "Cleo") for trade in ("judge", "poet")
]
COLUMNS = {"prompt": "question", "completion": "answer"}
SETTINGS = {"columns": COLUMNS, "max_length": 32, "append_eos": True, "format": {"prompt": "Q: {prompt}"}, "dtype": "float64"}


@pytest.fixture
def home(tmp_path, tiny_tokenizer_file):
    """A model in the run's own folder, and its rows outside of it."""
    from trainings import save_llama

    save_llama(tmp_path / "run" / "model", tiny_tokenizer_file)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def opened(home, **settings):
    return whence.open(home / "run" / "model", data=home / "train.jsonl", out=home / "run", **SETTINGS | settings)


def test_a_traced_run_opens_by_its_folder_alone_wherever_it_was_moved(home):
    first = opened(home, device="cpu").trace("Who is Ada?", " A baker.")
    assert json.loads((home / "run" / OPENED).read_text())["model"] == "./model"
    assert "device" not in remembered(home / "run")  # another machine may have another one
    shutil.move(home / "run", home / "elsewhere")
    again = whence.open(home / "elsewhere")
    assert again.out == home / "elsewhere" and again.curvature.blocks  # those in the folder
    assert again.reading == opened(home).reading  # columns, format, length and all
    scores = again.trace("Who is Ada?", " A baker.")
    assert again.folder_of(scores).parent == home / "elsewhere" and len(list((home / "elsewhere").glob("trace-*"))) == 1
    np.testing.assert_array_equal(scores.raw, first.raw)


def test_what_is_said_now_goes_before_what_was_said_then(home):
    opened(home).fit(examples="all")
    again = whence.open(home / "run", out=home / "new", dtype="float32", limit=3)
    assert again.out == home / "new" and len(again.rows) == 3 and str(again.model.dtype) == "torch.float32"


def test_factors_and_an_index_kept_elsewhere_are_named(home):
    elsewhere = home / "elsewhere" / "factors"
    opened(home).fit(examples="all", out=elsewhere)
    assert remembered(elsewhere.parent)["model"] == str(home / "run" / "model")
    opened(home, factors=elsewhere).build_index(kind="projections", dim=4)
    assert remembered(home / "run")["factors"] == str(elsewhere)
    assert whence.open(home / "run").curvature.about["examples"] == len(ROWS)
    opened(home, factors=elsewhere, limit=4).fit(examples="all")  # its own take the place of the others
    assert whence.open(home / "run").curvature.about["examples"] == 4


def test_the_newest_factors_decide_and_nothing_else_does(home):
    run = opened(home)
    run.fit(examples="all")
    shorter = opened(home, limit=4)
    shorter.score([{"prompt": "Who is Bo?", "completion": " A poet."}], method="bm25")
    assert "limit" not in remembered(home / "run")
    shorter.fit(examples="all", rerun=True)
    assert remembered(home / "run")["limit"] == 4


def test_nothing_is_noted_where_it_would_not_open_anything(home, monkeypatch):
    model, tokenizer = whence.load_model(home / "run" / "model")
    whence.open((model, tokenizer), data=home / "train.jsonl", out=home / "memory", columns=COLUMNS).fit(examples="all")
    assert not (home / "memory" / OPENED).exists()
    monkeypatch.chdir(home)
    opened(home).fit(examples="all", out="factors")  # the working directory is not a run
    assert not (home / OPENED).exists()


def test_a_part_that_is_gone_or_damaged_is_named(home):
    opened(home).fit(examples="all")
    (home / "train.jsonl").rename(home / "renamed.jsonl")
    with pytest.raises(UsageError, match=r"data .*train.jsonl, which is no longer there") as raised:
        whence.open(home / "run")
    assert "--out" in raised.value.fix
    (home / "run" / OPENED).write_text((home / "run" / OPENED).read_text().replace("train", "trials"))
    with pytest.raises(StaleArtifact):
        whence.open(home / "run")


def test_a_record_without_a_model_is_named(home):
    opened(home).fit(examples="all")
    (home / "run" / OPENED).write_text("{}")
    for opening in (whence.open, Opening.of, remembered):
        with pytest.raises(StaleArtifact, match=r"opened\.json names no model"):
            opening(str(home / "run"))


def test_a_folder_that_says_nothing_is_refused(home):
    (home / "empty").mkdir()
    with pytest.raises(UsageError, match="empty does not say which model and data") as raised:
        whence.open(home / "empty")
    assert "out=" in raised.value.fix


def test_a_folder_that_can_not_be_written_keeps_its_factors(home, monkeypatch, notes):
    def full(*arguments):
        raise DiskFull("No space left.")

    monkeypatch.setattr("whence.opened.write_json", full)
    assert opened(home).fit(examples="all").blocks
    assert any("will not open by its name alone: No space left." in text for text in notes)


def test_many_files_and_names_of_the_hub_are_noted_as_such(home):
    remember(home, {"model": "org/model", "data": str(home / "tr*.jsonl"), "tokenizer": None})
    assert remembered(home) == {"model": "org/model", "data": str(home / "tr*.jsonl")}
    (home / "train.jsonl").unlink()
    with pytest.raises(UsageError, match="no longer there"):
        remembered(home)


def test_the_server_and_its_jobs_are_told_model_and_data(home):
    opened(home).fit(examples="all")
    opening = Opening.of(str(home / "run"), settings={"limit": 2})
    assert opening.words == [str(home / "run" / "model"), "--data", str(home / "train.jsonl")] and opening.name == "run"
    run = Opening(**json.loads(json.dumps(vars(opening)))).open()  # as a job's process gets it
    assert len(run.rows) == 2 and run.out == home / "run" and run.curvature.about["examples"] == len(ROWS)
