"""The folder of a whence run, opened: its stages, its scores and its factors are there without anything being computed."""

import yaml

from serve.conftest import write_run
from whence.config import read_config
from whence.pipeline import run_pipeline
from whence.serve import Opening
from whence.serve.jobs import Jobs
from whence.serve.requests import NewJob, Question
from whence.serve.warm import Warm
from whence.serve.work import WORK


def test_a_finished_run(tmp_path, tiny_tokenizer_file):
    made = write_run(tmp_path, tiny_tokenizer_file)
    questions = [{"prompt": "Where was Bo Quist born?", "completion": " In Oslo."}]
    config = {
        "run": "a",
        "model": {"base": made.model, "path": made.model, "dtype": "float32"},
        "data": {"path": made.data, "columns": {"id": "id"}, "max_length": 64},
        "prompts": {"items": questions},
        "generate": {"max_new_tokens": 3},
        "train": None,
        "fit": {"examples": "all", "products": "float32"},
        "score": {"queries": "prompts", "per": "token", "products": "float32", "check": False, "self_influence": True},
        "evaluate": None,
    }
    (tmp_path / "whence.yaml").write_text(yaml.safe_dump(config | {"out": str(tmp_path / "a")}))
    run_pipeline(read_config(tmp_path / "whence.yaml"), ["score"])
    heard = []
    warm = Warm(Opening(str(tmp_path / "a")), lambda: heard.append(warm.what))
    warm.start().result()
    try:
        facts = warm.facts()
        assert (facts["state"], facts["name"], heard[-1]) == ("ready", "a", "")
        states = {stage["stage"]: stage["state"] for stage in facts["stages"]}
        assert states["fit"] == states["score"] == "done" and states["report"] == "todo"
        assert facts["has"]["factors"] and facts["has"]["self"] and facts["data"]["rows"] == 9
        saved = warm.asking.document(warm.asking.saved("scores", 0), 3)
        asked = warm.ask(Question(**questions[0], top=3))
        shown = warm.asking.document(asked, 3)
        assert [row["id"] for row in shown["query"]["raises"]] == [row["id"] for row in saved["query"]["raises"]]
        assert saved["query"]["raises"][0]["token_values"] and warm.state.question(asked.key) == asked.question
        first = warm.browser.review(0, 9)["rows"]
        assert first[0]["self_rank"] == 1 and first[0]["self"] >= first[1]["self"]
        jobs = Jobs(warm.opening, warm.state, True, lambda job: None, lambda job: None)
        job = jobs.create(NewJob(kind="fit"))
        assert job["kind"] == "run" and job["settings"] == {"stages": ["fit"]} and job["command"].endswith("whence.yaml fit")
    finally:
        warm.worker.submit(warm.close).result()


def test_a_question_is_scored_through_all_trainings_of_a_run(tmp_path, tiny_tokenizer_file):
    made = write_run(tmp_path, tiny_tokenizer_file)
    question = Question(prompt="Where was Bo Quist born?", completion=" In Oslo.")
    rows = {"path": made.data, "columns": {"id": "id"}, "max_length": 64}
    config = {
        "run": "a",
        "model": {"base": made.model, "path": made.model, "dtype": "float32"},
        "data": rows,
        "stages": [{"name": "pretraining", "data": rows | {"limit": 5}}, {"name": "finetuning", "rates": 0.1}],
        "prompts": {"items": [question.prompt]},
        "generate": {"max_new_tokens": 3},
        "train": None,
        "fit": {"examples": "all", "products": "float32"},
        "score": {"products": "float32", "check": False},
        "evaluate": None,
    }
    (tmp_path / "whence.yaml").write_text(yaml.safe_dump(config | {"out": str(tmp_path / "a")}))
    run_pipeline(read_config(tmp_path / "whence.yaml"), ["pretraining/fit", "fit"])
    opening = Opening(str(tmp_path / "a"))
    key = WORK["score"](opening, question.model_dump())["key"]
    warm = Warm(opening, lambda: None)
    warm.start().result()
    try:
        _, name, number = key.split(":")
        shown = warm.asking.document(warm.asking.saved(name, int(number)), 20)
        assert [part["stage"] for part in shown["stages"]] == ["pretraining", "finetuning"]
        assert [part["rows"] for part in shown["stages"]] == [5, 9] and shown["scan"]["rows"] == 9  # five are rows of both
        stages = [row["stage"] for side in ("raises", "lowers") for row in shown["query"][side]]
        assert sorted(stages) == ["finetuning"] * 4 + ["pretraining+finetuning"] * 5
    finally:
        warm.worker.submit(warm.close).result()
