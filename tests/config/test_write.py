import yaml

from whence.config import Config, checked, commented, json_schema
from whence.config.write import SCHEMA, save_schema
from whence.settings import in_file

GIVEN = {
    "run": "a",
    "model": {"base": "model"},
    "data": {"path": "rows.csv", "columns": {"prompt": "Input", "completion": "Output"}, "normalise": {}},
    "prompts": {"items": ["Who: me?", {"prompt": "a", "completion": " b"}]},
    "train": {},
    "score": {"damping": 0.2},
    "evaluate": {"benchmark": {"tasks": ["mmlu_law"]}},
}


def test_what_is_written_is_read_as_it_was_given():
    assert checked(yaml.safe_load(commented(GIVEN))) == checked(GIVEN)


def test_every_setting_is_there_and_uncommenting_all_of_it_is_valid():
    text = commented(GIVEN)
    lines = [line.removeprefix("# ") if _is_setting(line) else line for line in text.splitlines()]
    everything = yaml.safe_load("\n".join(line for line in lines if not line.startswith("#")))
    everything["prompts"].pop("path")
    config = checked(everything)
    values, given = config.as_json(), checked(GIVEN).as_json()
    for section, setting in (("train", "lora"), ("data", "format")):
        del values[section][setting], given[section][setting]
    assert values == given
    for name, field in in_file(Config).items():
        for setting in in_file(field.section) if field.section else [name]:
            assert f"{setting}:" in text, f"{name}.{setting}"


def _is_setting(line: str) -> bool:
    return line.startswith("# ") and "yaml-language" not in line and line.removeprefix("# ").strip().split(" ")[0].endswith(":")


def test_the_schema_explains_every_setting_it_refuses_others_and_is_where_the_file_says(tmp_path):
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert "mean eigenvalue" in schema["$defs"]["Scoring"]["properties"]["damping"]["description"]
    save_schema(tmp_path)
    assert commented(GIVEN).splitlines()[0].endswith(SCHEMA) and (tmp_path / SCHEMA).exists()
