import json
import sys

import numpy as np
import pytest

from benchmarks.flips import flip
from whence.errors import StaleArtifact, UsageError
from whence.evaluate.benchmark import run_benchmark, summarise
from whence.progress import Silent, report_to
from whence.settings import Benchmark
from whence.store.intact import read_json

pytest.importorskip("lm_eval")

TASKS = ("mmlu_business_ethics", "mmlu_virology")


def settings(mmlu, **changes):
    return Benchmark(**{"tasks": TASKS, "fewshot": 2, "data": str(mmlu), "batch_size": 3, **changes})


def by_task(document, model="tuned"):
    return {row["task"]: row for row in document["results"] if row["model"] == model}


def test_a_model_that_knows_all_answers_has_an_accuracy_of_one(knowing, tiny_tokenizer, mmlu, tmp_path):
    found = by_task(run_benchmark({"tuned": (knowing, tiny_tokenizer)}, settings(mmlu), out=tmp_path / "out"))
    assert [(row["correct"], row["n"], row["accuracy"]) for row in found.values()] == [
        (12, 12, 1.0),
        (8, 8, 1.0),
        (20, 20, 1.0),
    ]
    assert list(found) == [*TASKS, "total"] and found["total"]["low"] == pytest.approx(0.8389, abs=1e-4)
    assert all(row["chance"] == 0.25 and row["cut"] == 0 for row in found.values())
    answers = [json.loads(line) for line in (tmp_path / "out/benchmark/tuned/mmlu_virology.jsonl").read_text().splitlines()]
    assert [row["picked"] for row in answers] == [row["target"] for row in answers] == [0, 1, 2, 3] * 2
    assert answers[3]["text"] == ' test vir 3 "why"? ' and answers[3]["choices"] == ["A", "B", "C", "D"]


def test_base_and_tuned_are_compared_question_by_question(knowing, long_llama, tiny_tokenizer, mmlu, tmp_path):
    import copy

    guessing = copy.deepcopy(long_llama)
    del guessing.forward, guessing.asked
    loads = []

    def load():
        loads.append("base")
        return guessing, tiny_tokenizer

    document = run_benchmark({"base": load, "tuned": (knowing, tiny_tokenizer)}, settings(mmlu), out=tmp_path / "out")
    base, total = by_task(document, "base")["total"], document["differences"][-1]
    assert base["low"] < 0.25 < base["high"] and loads == ["base"]
    assert total["difference"] == pytest.approx(1 - base["accuracy"]) and total["of"] == "tuned minus base"
    assert total["only_tuned"] == 20 - base["correct"] and total["only_base"] == 0
    assert total["p_value"] == pytest.approx(2 * 0.5 ** total["only_tuned"]) and total["low"] > 0
    assert read_json(tmp_path / "out" / "benchmark.json") == json.loads(json.dumps(document))


def test_the_answers_are_those_of_the_plain_log_probabilities(long_llama, tiny_tokenizer, mmlu, tmp_path):
    import torch

    from whence.evaluate.mmlu import local_task

    run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, settings(mmlu, tasks=("virology",), limit=3), out=tmp_path / "out")
    answers = [json.loads(line) for line in (tmp_path / "out/benchmark/tuned/mmlu_virology.jsonl").read_text().splitlines()]
    task = local_task(mmlu, "virology")
    task.set_config("num_fewshot", 2)
    task.build_all_requests(limit=3)
    assert len(answers) == 3
    for number, row in enumerate(answers):
        for choice, instance in enumerate(task.instances[4 * number : 4 * number + 4]):
            context, letter = instance.args
            prompt, whole = (tiny_tokenizer(text, return_tensors="pt")["input_ids"] for text in (context, context + letter))
            with torch.no_grad():
                logp = long_llama(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[prompt.shape[1] - 1 :]
            assert row["logprobs"][choice] == pytest.approx(logp.sum().item(), abs=1e-4)


def test_prompts_that_are_cut_are_counted_and_said(tiny_llama, tiny_tokenizer, mmlu, tmp_path, notes):
    document = run_benchmark({"tuned": (tiny_llama, tiny_tokenizer)}, settings(mmlu, limit=4), out=tmp_path / "out")
    assert by_task(document)["mmlu_virology"]["cut"] == 4 and by_task(document)["total"]["cut"] == 8
    rows = [json.loads(line) for line in (tmp_path / "out/benchmark/tuned/mmlu_virology.jsonl").read_text().splitlines()]
    assert all(row["cut"] == row["tokens"] - 128 > 0 for row in rows)
    (said,) = [text for text in notes if "mmlu_virology" in text]
    assert "4 of 4 prompts of mmlu_virology are longer than the 128 tokens tuned reads" in said
    assert f"up to {max(row['cut'] for row in rows)} tokens" in said


class Breaks(Silent):
    """Ends the work when a stage begins."""

    def __init__(self, name):
        self.name = name

    def begin(self, stage):
        if stage.name == self.name:
            raise KeyboardInterrupt


def test_a_finished_task_is_not_asked_again(knowing, tiny_tokenizer, mmlu, tmp_path):
    models, out = {"tuned": (knowing, tiny_tokenizer)}, tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), report_to(Breaks("tuned virology")):
        run_benchmark(models, settings(mmlu), out=out)
    assert any("bus" in asked for asked in knowing.asked)
    knowing.asked.clear()
    resumed = run_benchmark(models, settings(mmlu), out=out)
    assert knowing.asked and all("vir" in asked for asked in knowing.asked)
    knowing.asked.clear()
    assert run_benchmark(models, settings(mmlu), out=out) == resumed == summarise(out) and not knowing.asked
    whole = run_benchmark(models, settings(mmlu), out=tmp_path / "whole")
    for name in TASKS:
        assert (out / f"benchmark/tuned/{name}.jsonl").read_bytes() == (
            tmp_path / f"whole/benchmark/tuned/{name}.jsonl"
        ).read_bytes()
    assert [row["accuracy"] for row in whole["results"]] == [row["accuracy"] for row in resumed["results"]]


@pytest.mark.parametrize("name", ["tuned/mmlu_virology.jsonl", "tuned/mmlu_virology.json", "tuned/config.json"])
def test_answers_with_a_flipped_bit_are_not_summed_up(knowing, tiny_tokenizer, mmlu, tmp_path, name):
    run_benchmark({"tuned": (knowing, tiny_tokenizer)}, settings(mmlu), out=tmp_path / "out")
    flip(tmp_path / "out" / "benchmark" / name, 600)
    with pytest.raises(StaleArtifact, match=f"{name} is damaged"):
        run_benchmark({"tuned": (knowing, tiny_tokenizer)}, settings(mmlu), out=tmp_path / "out")
    with pytest.raises(StaleArtifact, match=f"{name} is damaged"):
        summarise(tmp_path / "out")
    if name != "tuned/config.json":
        (tmp_path / "out" / "benchmark" / name).unlink()
        again = by_task(run_benchmark({"tuned": (knowing, tiny_tokenizer)}, settings(mmlu), out=tmp_path / "out"))
        assert again["total"]["correct"] == 20


def test_another_model_other_questions_and_other_settings_are_refused(long_llama, tiny_llama, tiny_tokenizer, mmlu, tmp_path):
    out, one = tmp_path / "out", settings(mmlu, tasks=("virology",), limit=2)
    before = run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, one, out=out)
    with pytest.raises(StaleArtifact, match="model"):
        run_benchmark({"tuned": (tiny_llama, tiny_tokenizer)}, one, out=out)
    with pytest.raises(StaleArtifact, match="fewshot 2 -> 1"):
        run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, settings(mmlu, fewshot=1, limit=2), out=out)
    added = run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, settings(mmlu, tasks=("business_ethics",), limit=2), out=out)
    assert set(by_task(added)) == {*TASKS, "total"} and by_task(added)["mmlu_virology"] == by_task(before)["mmlu_virology"]
    with (mmlu / "test" / "virology_test.csv").open("a") as file:
        file.write("One more?,a,b,c,d,A\n")
    with pytest.raises(StaleArtifact, match="other questions of mmlu_virology"):
        run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, one, out=out)
    again = run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, one, out=out, rerun=True)
    assert list(again["models"]) == ["tuned"] and set(by_task(again)) == {"mmlu_virology"}
    assert (out / "benchmark" / "tuned.1" / "mmlu_virology.jsonl").exists()


def test_no_answers_are_no_benchmark(long_llama, tiny_tokenizer, mmlu, tmp_path):
    with pytest.raises(UsageError, match="No model has answered"):
        run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, settings(mmlu, tuned=False), out=tmp_path / "out")


def test_the_model_is_given_back_as_it_was(long_llama, tiny_tokenizer, mmlu, tmp_path):
    long_llama.train()
    padding, side = tiny_tokenizer.pad_token, tiny_tokenizer.padding_side
    drawn = np.random.get_state()[1].copy()
    run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, settings(mmlu, limit=2), out=tmp_path / "out")
    assert all(module.training for module in long_llama.modules())
    assert (tiny_tokenizer.pad_token, tiny_tokenizer.padding_side) == (padding, side)
    assert np.array_equal(np.random.get_state()[1], drawn)


def test_without_lm_eval_it_says_what_to_install(monkeypatch, mmlu, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UsageError, match=r"pip install 'lm-eval\[hf\]'"):
        run_benchmark({}, settings(mmlu), out=tmp_path / "out")


@pytest.fixture
def few_tasks(monkeypatch):
    """lm-eval's index of the MMLU tasks alone: reading all of them takes long."""
    from pathlib import Path

    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    home = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: whole(include_path=str(home), include_defaults=False))


def test_a_hub_that_gives_nothing_is_said_with_the_way_round(few_tasks, monkeypatch, long_llama, tiny_tokenizer, tmp_path):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UsageError, match=r"(?s)mmlu_virology can't be loaded from the hub.*--data FOLDER"):
        run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, Benchmark(tasks=("mmlu_virology",)), out=tmp_path / "out")
    with pytest.raises(UsageError, match="did you mean mmlu_virology"):
        run_benchmark({"tuned": (long_llama, tiny_tokenizer)}, Benchmark(tasks=("mmlu_virologie",)), out=tmp_path / "out")


def test_the_hubs_questions_are_asked_like_those_of_files(few_tasks, monkeypatch, knowing, tiny_tokenizer, mmlu, tmp_path):
    import datasets

    from whence.evaluate.mmlu import read_questions

    hub = {split: datasets.Dataset.from_list(read_questions(mmlu, "virology", split)) for split in ("dev", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub)
    from_hub, from_files = (
        run_benchmark(
            {"tuned": (knowing, tiny_tokenizer)}, settings(data, tasks=("mmlu_virology",), data=data), out=tmp_path / name
        )
        for name, data in (("hub", None), ("files", str(mmlu)))
    )
    assert by_task(from_hub)["mmlu_virology"]["accuracy"] == 1.0
    one, other = (tmp_path / name / "benchmark/tuned/mmlu_virology.jsonl" for name in ("hub", "files"))
    assert one.read_bytes() == other.read_bytes() and by_task(from_files)["mmlu_virology"]["n"] == 8
