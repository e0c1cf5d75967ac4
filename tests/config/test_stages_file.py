"""Trainings in a row, in a file of their own or in a whence.yaml: what is read, and what is said of mistakes."""

import pytest
import yaml

from whence.config import commented, json_schema, runs_of
from whence.config.read import by_name, read_stages, resolve
from whence.config.schema import Config, Stages
from whence.errors import UsageError

RUN = {
    "run": "a",
    "model": {"base": "base"},
    "data": {"path": "questions.csv"},
    "prompts": {"items": ["Who?"]},
    "train": {"epochs": 2},
    "fit": {"modules": "all"},
    "stages": [
        {"name": "pretraining", "data": {"path": "corpus.jsonl"}, "train": {"epochs": 3}},
        {"name": "middle", "model": "middle", "data": {"path": "more.jsonl"}, "fit": {"modules": "mlp"}},
        {"name": "finetuning", "transport": "proximal"},
    ],
}


def resolved(tmp_path, **changes):
    return resolve({**RUN, **changes}, tmp_path, "a.yaml", ("stages.finetuning.proximal=0.5",))


def test_each_training_is_a_run_of_its_own(tmp_path):
    config = resolved(tmp_path).config
    first, middle, last = runs_of(config).values()
    assert (first.model.base, first.data.path, first.train.epochs, first.fit.modules) == ("base", "corpus.jsonl", 3, "all")
    assert (middle.model.path, middle.train, middle.fit.modules) == ("middle", None, "mlp")
    assert (last.model.base, last.data.path, last.train.epochs) == ("middle", "questions.csv", 2)
    assert (config.stages["finetuning"].transport, config.stages["finetuning"].proximal) == ("proximal", 0.5)
    assert list(runs_of(config.changed(stages={}))) == [""]


def test_what_is_written_is_read_as_it_was_given(tmp_path):
    text = commented(by_name(RUN, Config, "here"))
    assert resolve(yaml.safe_load(text), tmp_path, "f").config == resolve(RUN, tmp_path, "f").config
    items = json_schema()["properties"]["stages"]["items"]["$ref"].rpartition("/")[2]
    assert json_schema()["$defs"][items]["required"] == ["name"]
    assert json_schema(Stages)["$defs"]["Trained"]["required"] == ["name", "model", "data"]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [{"name": "a", "data": {"pth": "x"}}, {"name": "b"}],
            "stages.a.data.pth: there is no such setting; did you mean path",
        ),
        ([{"name": "a", "data": {"path": "x"}, "transpot": 1}, {"name": "b"}], "did you mean transport"),
        ([{"name": "a", "data": {"path": "x"}, "transport": "flows"}, {"name": "b"}], "stages.a.transport: should be 'flow'"),
        ([{"name": "a", "data": {"path": "x"}}, {"name": "b", "data": {"path": "x"}}], "is the last training, whose `data`"),
        ([{"name": "a"}, {"name": "b"}], "`stages.a.data` is missing"),
        ([{"name": "b"}], "one training, b"),
        ([{"name": "a/b", "data": {"path": "x"}}, {"name": "b"}], "should match pattern"),
        ({"a": {}}, "must be an ordered list"),
        ([{"name": "a"}, {"name": "a"}], "distinct names"),
        (["a"], "must be an ordered list"),
    ],
)
def test_mistakes_in_a_run(tmp_path, stages, said):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        resolve({**RUN, "stages": stages}, tmp_path, "a.yaml")


def test_a_file_of_stages(tmp_path):
    path = tmp_path / "stages.yaml"
    entry = {"model": "m", "data": {"path": "rows.jsonl"}}
    path.write_text(yaml.safe_dump({"stages": [{"name": "z", **entry}, {"name": "a", **entry, "rates": 0.1}]}))
    (tmp_path / "m").mkdir()
    found = read_stages(path)
    assert list(found.config.stages) == ["z", "a"] and found.place("m") == str(tmp_path / "m")
    path.write_text(yaml.safe_dump({"stages": [{"name": "z", "modl": "m"}, {"name": "a", **entry}]}))
    with pytest.raises(UsageError, match="did you mean model") as raised:
        read_stages(path)
    assert "stages.z.data: is missing" in str(raised.value) and "whence config schema --stages" in raised.value.fix
    path.write_text(yaml.safe_dump({"stages": [{"name": "z", **entry}]}))
    with pytest.raises(UsageError, match="fewer than two trainings"):
        read_stages(path)
    with pytest.raises(UsageError, match=r"did you mean .*stages\.yaml"):
        read_stages(tmp_path / "stage.yaml")
