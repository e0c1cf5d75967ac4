import json

import pytest
import yaml

from whence.config import read_config
from whence.data import as_rows
from whence.loading import in_turns
from whence.models import load_model
from whence.pipeline.lock import Lock
from whence.pipeline.work import Workshop, generate

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALK = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Turin."}]


def workshop(folder, data, items):
    """A run with a chat template in a file beside it."""
    (folder / "rows-1.json").write_text(json.dumps(data))
    (folder / "rows-2.json").write_text(json.dumps(data))
    (folder / "chat.jinja").write_text(TEMPLATE)
    values = {
        "run": "a",
        "model": {"base": "tiny-llama"},
        "data": {"path": "rows-*.json", "chat_template": "chat.jinja"},
        "prompts": {"items": items},
        "generate": {"max_new_tokens": 2, "base": False},
    }
    (folder / "whence.yaml").write_text(yaml.safe_dump(values))
    return Workshop.of(read_config(folder / "whence.yaml", environment={}))


def test_prompts_for_conversations_are_turns_written_by_the_template(tiny_model_folder, tmp_path, notes):
    shop = workshop(tmp_path, [{"messages": TALK}], ["Who?", {"prompt": "Who?", "completion": "Ada."}, {"messages": TALK}])
    assert len(shop.all_rows) == 2
    asked = [{"role": "user", "content": "Who?"}]
    assert [row["messages"] for row in shop.prompts] == [asked, [*asked, {"role": "assistant", "content": "Ada."}], TALK]
    assert "prompts are asked as a user's turn, since the rows are conversations" in notes
    (tmp_path / "out" / "generate").mkdir(parents=True)
    generate(shop, tmp_path / "out")
    pairs = json.loads((tmp_path / "out" / "generate" / "generated.json").read_text())["data"]
    assert [pair["prompt"] for pair in pairs] == ["user: Who?\nassistant: "] * 2 + ["user: Where?\nassistant: "]
    assert [pair.get("reference") for pair in pairs] == [None, "Ada.", "In Turin."]


def test_of_queries_only_mere_prompts_become_turns(notes):
    """Those with a completion are what the model said to that very text."""
    rows, said = as_rows([{"messages": TALK}]), {"prompt": "Who?", "completion": "Ada."}
    asked = in_turns(as_rows([{"prompt": "Who?"}, said]), rows, mere=True)
    assert asked.rows == ({"messages": [{"role": "user", "content": "Who?"}]}, said)
    assert notes == ["prompts are asked as a user's turn, since the rows are conversations"]
    assert in_turns(as_rows([said]), rows, mere=True).rows == (said,)
    assert in_turns(as_rows([{"prompt": "Who?"}]), as_rows([said])).rows == ({"prompt": "Who?"},)


def test_prompts_for_other_rows_stay_text(tiny_model_folder, tmp_path, notes):
    shop = workshop(tmp_path, [{"prompt": "Where?", "completion": "In Turin."}], ["Who?"])
    assert shop.prompts.rows == ({"prompt": "Who?"},)


def test_a_list_of_texts_is_a_list_of_prompts(tiny_model_folder, tmp_path):
    """They are written in the format of the rows; only where the prompts' own completions are scored is a text one whole."""
    workshop(tmp_path, [{"prompt": "Where?", "completion": "In Turin."}], ["Who?"])
    (tmp_path / "prompts.json").write_text(json.dumps(["Who?"]))
    values = yaml.safe_load((tmp_path / "whence.yaml").read_text()) | {"prompts": {"path": "prompts.json"}}
    for queries, format, expected in (
        ("generated", "qa", {"prompt": "Question: Who?\nAnswer:"}),
        ("prompts", "plain", {"text": "Who?"}),
    ):
        values |= {"score": {"queries": queries}, "data": {"path": "rows-1.json", "format": format}}
        (tmp_path / "whence.yaml").write_text(yaml.safe_dump(values))
        shop = Workshop.of(read_config(tmp_path / "whence.yaml", environment={}))
        assert shop.prompts.rows == (expected,)


@pytest.mark.parametrize(("append_eos", "length", "said"), [(False, 4, 1), (True, 4, 0), (False, 2, 0)])
def test_answers_that_do_not_end_are_told_of(settings, notes, monkeypatch, append_eos, length, said):
    """A model that was trained on answers without an end of text does not learn to stop."""
    shop = Workshop.of(read_config(settings(data={"append_eos": append_eos}), environment={}))
    loaded = load_model(shop.place(shop.config.model.base))
    words = loaded[1].convert_ids_to_tokens([40, 41, 42, 43])[:length]
    monkeypatch.setattr(Workshop, "loaded", loaded)
    monkeypatch.setattr(
        "whence.pipeline.work.generate_pairs", lambda *given, **more: {"data": [{"completion": "".join(words)}]}
    )
    generate(shop, shop.out)
    assert sum("no answer ended by itself within 4 tokens" in note for note in notes) == said


def test_files_with_a_star_are_found_and_hashed_by_their_content(tiny_model_folder, tmp_path):
    shop = workshop(tmp_path, [{"messages": TALK}], ["Who?"])
    place = shop.place("rows-*.json")
    assert place == str(tmp_path / "rows-*.json")
    assert shop.place("nothing-*.json") == "nothing-*.json"
    before = Lock(tmp_path).hash_of(place)
    assert before != place
    (tmp_path / "rows-2.json").write_text(json.dumps([{"messages": TALK[:1]}]))
    assert Lock(tmp_path).hash_of(place) != before
