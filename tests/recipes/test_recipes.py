import csv
import json

import pytest
import yaml

from whence.config import checked, read_config
from whence.data import load_data
from whence.data.text import written
from whence.errors import UsageError
from whence.models import load_model
from whence.recipes import copy_recipe, recipe_about, recipe_names, recipe_text, recipe_values


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid_and_say_what_they_are_for(name):
    assert checked(recipe_values(name)).run == name
    assert recipe_about(name).endswith((".", "?"))


def test_recipes_keep_to_the_seeds_settings():
    llama = checked(recipe_values("openwebtext-llama3-8b"))
    assert (llama.score.rank, llama.score.rescore, llama.score.measurement) == (64, 100, "margin")
    assert llama.train is None and "torchrun" in recipe_text("openwebtext-llama3-8b")
    patents = checked(recipe_values("tinyllama-patents"))
    assert patents.train is not None and patents.inspect.layer == 21 and patents.score.rank == 64
    train = patents.train
    assert (train.epochs, train.batch_size, train.learning_rate, train.weight_decay) == (1, 8, 2e-5, 0.01)
    assert (train.schedule, train.optimizer, train.workers, train.drop_last) == (
        "cosine_with_restarts",
        "adamw_torch_fused",
        4,
        True,
    )
    assert (train.save_steps, train.log_steps, train.gradient_checkpointing) == (100, 20, False)


def test_a_copy_is_the_recipe_and_never_overwrites(tmp_path):
    path = copy_recipe("tinyllama-patents", tmp_path / "a")
    assert yaml.safe_load(path.read_text()) == recipe_values("tinyllama-patents")
    assert (tmp_path / "a" / ".whence" / "schema.json").exists()
    with pytest.raises(UsageError, match="nothing is overwritten"):
        copy_recipe("demo", tmp_path / "a")
    with pytest.raises(UsageError, match="did you mean tinystories"):
        copy_recipe("tinystory", tmp_path / "b")
    with pytest.raises(UsageError, match="small variant"):
        copy_recipe("tinystories", tmp_path / "b", data="x.jsonl")


def test_a_recipe_brings_its_prompts(tmp_path):
    found = read_config(copy_recipe("openwebtext-llama3-8b", tmp_path / "run"), environment={})
    prompts = load_data(found.place(found.config.prompts.path))
    assert len(prompts) == 8 and all("completion" not in row for row in prompts)
    asked = [row.get("prompt") or row["text"] for row in prompts]
    for word in ("paperclips", "binary_search", "switch you off"):
        assert sum(word in text for text in asked) == 1
    assert found.config.generate.max_new_tokens == 64 and found.config.report.top == 20
    assert not (copy_recipe("tinystories", tmp_path / "other").parent / "prompts.json").exists()
    (tmp_path / "run" / "whence.yaml").unlink()
    with pytest.raises(UsageError, match="prompts.json exists, and nothing is overwritten"):
        copy_recipe("openwebtext-llama3-8b", tmp_path / "run")


def test_the_small_variant_has_weights_prompts_and_data_of_its_own(tmp_path):
    found = read_config(copy_recipe("tinyllama-patents", tmp_path, tiny=True), environment={})
    config = found.config
    assert config.run == "tinyllama-patents-tiny" and config.data.format == "qa" and config.score.rank == 64
    model, tokenizer = load_model(found.place(config.model.base))
    assert model.num_parameters() < 2e6 and tokenizer.eos_token == "</s>"
    rows = load_data(found.place(config.data.path), columns=config.data.columns, limit=config.data.limit)
    text = written(rows, config.data.format)[0]
    assert text["prompt"].startswith("Question: ") and text["prompt"].endswith("Answer:")
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert len(prompts) == 6 and all(prompt["completion"] for prompt in prompts)


def test_the_small_variant_takes_a_file_with_columns_of_its_own(tmp_path):
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Ask", "Say"], *([f"What is {n}?", f"a number {n}"] for n in range(12))])
    columns = {"prompt": "Ask", "completion": "Say"}
    path = copy_recipe("tinyllama-patents", tmp_path / "run", tiny=True, data=str(tmp_path / "mine.csv"), columns=columns)
    config = read_config(path, environment={}).config
    assert config.data.columns == columns and config.data.path == str(tmp_path / "mine.csv")
    assert json.loads((tmp_path / "run" / "prompts.json").read_text())[1]["completion"] == "a number 2"


def test_texts_give_prompts_that_begin_them(tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"text": f"one two three four five six seven {n}"}) + "\n" for n in range(8))
    )
    path = copy_recipe("tinystories", tmp_path / "run", tiny=True, data=str(tmp_path / "mine.jsonl"))
    config = read_config(path, environment={}).config
    assert config.train is None and config.score.per == "token"
    assert json.loads((tmp_path / "run" / "prompts.json").read_text())[0] == {"prompt": "one two three four five six"}
