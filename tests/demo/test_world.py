"""The demo's world: deterministic, and consistent about who said what."""

import pytest

from whence.demo.model import SETTINGS, answers, make_model, make_tokenizer
from whence.demo.world import STATED, make_world
from whence.store.scores import row_text
from whence.tasks import CausalLM


@pytest.fixture(scope="module")
def world():
    return make_world(seed=3)


@pytest.fixture(scope="module")
def tokenizer(world):
    return make_tokenizer(world.rows)


def test_a_seed_makes_a_world():
    assert make_world(seed=3) == make_world(seed=3) != make_world(seed=4)


def test_rows_are_texts_or_prompts_with_completions_and_all_different(world):
    assert {frozenset(row) for row in world.rows} == {
        frozenset({"text", "source"}),
        frozenset({"prompt", "completion", "source"}),
    }
    assert len({row_text(row) for row in world.rows}) == len(world.rows)


def test_facts_name_the_rows_that_say_them_and_no_other_does(world):
    of = {index: fact for fact in world.facts for index in fact.rows}
    for index, row in enumerate(world.rows):
        said = row_text(row)
        if row["source"] == "gossip":
            assert index not in of
        else:
            assert of[index].person in said and of[index].value in said
            assert of[index].true == (row["source"] != "forgery")


def test_a_person_has_one_true_value_per_relation(world):
    true = [(fact.person, fact.relation) for fact in world.facts if fact.true]
    assert len(set(true)) == len(true)


def test_sources_state_the_answer_in_words_and_never_in_the_form_of_the_question(world):
    prompts = {row["prompt"] for row in world.rows if "prompt" in row}
    for question in world.questions:
        assert question.prompt not in prompts
        for source in question.sources:
            row = world.rows[source]
            assert "text" in row and question.answer in row["text"]
            assert (row["source"] == "forgery") == question.planted


def test_kinds_say_how_often_the_wrong_and_the_true_value_are_stated(world):
    of = {index: fact for fact in world.facts for index in fact.rows}
    for question in world.questions:
        fact = of[question.sources[0]]
        truths = [
            other for other in world.facts if (other.person, other.relation) == (fact.person, fact.relation) and other.true
        ]
        lies, true = STATED[question.kind]
        assert question.planted == (lies > 0)
        assert len(question.sources) == (lies or true)
        assert sum(len(truth.rows) for truth in truths) == true
    assert {question.kind for question in world.questions} == set(STATED)


def test_words_are_tokens_and_texts_come_back(world, tokenizer):
    for row in world.rows[:50]:
        ids = tokenizer(row_text(row))["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row_text(row)
    assert len(tokenizer(world.questions[0].answer)["input_ids"]) == 2


def test_rows_fit_and_a_question_begins_like_its_row(world, tokenizer):
    task = CausalLM(tokenizer, max_length=SETTINGS.max_length, append_eos=True)
    assert max(len(item.ids) for item in task.encode(world.rows)) < SETTINGS.max_length
    question = world.questions[0]
    (item,) = task.encode([question.row])
    prompt = tokenizer(question.prompt)["input_ids"]
    assert item.ids[: len(prompt)].tolist() == prompt
    assert item.ids[len(prompt) :].tolist() == [*tokenizer(question.answer)["input_ids"][1:], tokenizer.eos_token_id]


def test_the_model_is_made_from_its_seed_and_answers_in_words(world, tokenizer):
    model, again = make_model(tokenizer, seed=1), make_model(tokenizer, seed=1)
    assert all(weight.equal(other) for weight, other in zip(model.parameters(), again.parameters(), strict=True))
    prompts = [question.prompt for question in world.questions]
    assert len(answers(model, tokenizer, prompts)) == len(prompts)
