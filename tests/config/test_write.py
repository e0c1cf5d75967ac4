import yaml

from whence.config import Config, commented, json_schema
from whence.config.read import section_of
from whence.config.write import SCHEMA, save_schema

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
    assert Config.model_validate(yaml.safe_load(commented(GIVEN))) == Config.model_validate(GIVEN)


def test_every_setting_is_there_and_uncommenting_all_of_it_is_valid():
    text = commented(GIVEN)
    lines = [line.removeprefix("# ") if _is_setting(line) else line for line in text.splitlines()]
    everything = yaml.safe_load("\n".join(line for line in lines if not line.startswith("#")))
    everything["prompts"].pop("path")
    config = Config.model_validate(everything)
    assert config.model_dump(exclude={"train": {"lora"}, "data": {"format"}}) == Config.model_validate(GIVEN).model_dump(
        exclude={"train": {"lora"}, "data": {"format"}}
    )
    for name, field in Config.model_fields.items():
        below = section_of(field.annotation)
        for setting in below.model_fields if below else [name]:
            assert f"{setting}:" in text, f"{name}.{setting}"


def _is_setting(line: str) -> bool:
    return line.startswith("# ") and "yaml-language" not in line and line.removeprefix("# ").strip().split(" ")[0].endswith(":")


def test_the_schema_explains_every_setting_it_refuses_others_and_is_where_the_file_says(tmp_path):
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert "mean eigenvalue" in schema["$defs"]["Score"]["properties"]["damping"]["description"]
    save_schema(tmp_path)
    assert commented(GIVEN).splitlines()[0].endswith(SCHEMA) and (tmp_path / SCHEMA).exists()
