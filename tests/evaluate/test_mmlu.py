import importlib.util
from pathlib import Path

import pytest

from whence.errors import UsageError
from whence.evaluate.mmlu import fingerprint_subject, local_task, read_questions, select, subjects

pytest.importorskip("lm_eval")


def test_questions_are_read_as_they_are(mmlu):
    first = read_questions(mmlu, "virology", "test")[0]
    assert first == {
        "question": ' test vir 0 "why"? ',
        "subject": "virology",
        "choices": ["v0a, said", "v0b, said", "v0c, said", "v0d, said"],
        "answer": 0,
    }


def prompts(task, fewshot):
    task.set_config("num_fewshot", fewshot)
    task.build_all_requests(limit=None)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("fewshot", [0, 5])
def test_prompts_are_those_of_lm_evals_own_task_byte_for_byte(mmlu, monkeypatch, fewshot):
    import datasets
    from lm_eval.tasks import TaskManager

    hub = {split: datasets.Dataset.from_list(read_questions(mmlu, "business_ethics", split)) for split in ("dev", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **_: hub if (path, name) == HUB else None)
    home = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "mmlu" / "default"
    own = TaskManager(include_path=str(home), include_defaults=False).load(["mmlu_business_ethics"])
    expected = prompts(own["tasks"]["mmlu_business_ethics"], fewshot)
    assert prompts(local_task(mmlu, "business_ethics"), fewshot) == expected and len(expected) == 4 * 12


HUB = ("cais/mmlu", "business_ethics")


def test_a_prompt_word_for_word(mmlu):
    context, choice = prompts(local_task(mmlu, "virology"), 1)[1]
    assert choice == " B" and context == (
        "The following are multiple choice questions (with answers) about virology.\n\n"
        'dev vir 0 "why"?\nA. v0a, said\nB. v0b, said\nC. v0c, said\nD. v0d, said\nAnswer: D\n\n'
        'test vir 0 "why"?\nA. v0a, said\nB. v0b, said\nC. v0c, said\nD. v0d, said\nAnswer:'
    )


def test_a_subject_of_ones_own_gets_the_same_form(mmlu):
    for split in ("dev", "test"):
        (mmlu / split / f"house_plants_{split}.csv").write_text("Green?,yes,no,maybe,never,A\n")
    task = local_task(mmlu, "house_plants")
    context, _ = prompts(task, 0)[0]
    assert context.startswith(
        "The following are multiple choice questions (with answers) about house plants.\n\nGreen?\nA. yes"
    )
    assert task.config.task == "mmlu_house_plants"


def test_which_subjects_are_meant(mmlu):
    assert subjects(mmlu) == ["business_ethics", "virology"]
    assert select(mmlu, ["mmlu"]) == ["business_ethics", "virology"]
    assert select(mmlu, ["virology", "mmlu_virology"]) == ["virology"]
    assert select(mmlu, ["mmlu_other"]) == ["business_ethics", "virology"] and select(mmlu, ["mmlu_stem"]) == []
    with pytest.raises(UsageError, match="did you mean mmlu_virology"):
        select(mmlu, ["mmlu_virologie"])
    with pytest.raises(UsageError, match="no MMLU questions"):
        select(mmlu.parent, ["mmlu"])


def test_a_line_that_is_no_question_is_named(mmlu):
    before = fingerprint_subject(mmlu, "virology")
    with (mmlu / "test" / "virology_test.csv").open("a") as file:
        file.write("question,A,B,C,D,answer\n")
    assert fingerprint_subject(mmlu, "virology") != before
    with pytest.raises(UsageError, match=r"Row 9 of .*virology_test.csv"):
        read_questions(mmlu, "virology", "test")
    (mmlu / "dev" / "business_ethics_dev.csv").unlink()
    with pytest.raises(UsageError, match="is missing"):
        local_task(mmlu, "business_ethics")


def test_all_57_real_subjects_can_be_asked(shared_data):
    folder = shared_data / "mmlu"
    names = subjects(folder)
    assert len(names) == 57
    groups = [select(folder, [f"mmlu_{group}"]) for group in ("stem", "other", "social_sciences", "humanities")]
    assert sorted(sum(groups, [])) == names and all(groups)
    for name in names:
        assert len(read_questions(folder, name, "dev")) == 5 and len(read_questions(folder, name, "test")) >= 100
