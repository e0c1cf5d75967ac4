"""A training that a plain Trainer made is repeated as far as its files and its arguments tell."""

import json
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from models import llama, randomised, texts, tokenizer
from transformers import Trainer, TrainingArguments, set_seed

import whence
from whence.config import read_config
from whence.data import as_rows
from whence.engine.point import Point
from whence.engine.queries import encode_queries
from whence.errors import NumericalError, StaleArtifact, UsageError
from whence.models import fresh_adapter, load_model
from whence.pipeline import run_pipeline
from whence.pipeline.retraining import Elsewhere, check_run
from whence.tasks import CausalLM
from whence.train.retrain import retrain
from whence.train.state import read_state, repeatable
from whence.validate.without import Removals

ROWS, TASK = as_rows(texts(11, seed=1)), CausalLM(tokenizer())
ARGUMENTS = {
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "seed": 7,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = base_of(tmp_path_factory)
    trained_plainly(load_model(home / "base")[0], home)
    return home


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Of an adapter that was drawn after a seed was set, as scripts do at their top, and saved before it was trained."""
    from peft import LoraConfig, get_peft_model

    home = base_of(tmp_path_factory)
    with torch.random.fork_rng():
        set_seed(5)
        model = load_model(home / "base")[0]
        chosen = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, chosen)
        model.save_pretrained(str(home / "before"))
        trained_plainly(model, home, learning_rate=0.05)
    return home


def base_of(tmp_path_factory):
    home = tmp_path_factory.mktemp("plain")
    base: Any = randomised(llama())
    base.save_pretrained(home / "base")
    tokenizer().save_pretrained(home / "base")
    return home


def trained_plainly(model: Any, home, learning_rate=1e-2):
    """Train with the Trainer, in HOME/out."""

    def collate(chosen):
        """As a plain collator pads: labels are the ids, which the model shifts."""
        ids = [torch.tensor(item.ids) for item in chosen]
        labels = [torch.tensor(np.where(item.in_loss, item.ids, -100)) for item in chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, True, 0),
            "attention_mask": pad([torch.ones_like(each) for each in ids], True, 0),
            "labels": pad(labels, True, -100),
        }

    given = TrainingArguments(
        str(home / "out"),
        per_device_train_batch_size=2,
        num_train_epochs=3,
        learning_rate=learning_rate,
        logging_steps=1,
        save_steps=100,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        optim="adamw_torch",
        **ARGUMENTS,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(model, given, collate, list(TASK.encode(ROWS))).train()  # type: ignore[arg-type]


def point_of(folder):
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    tokenizer().save_pretrained(checkpoint)
    return checkpoint, Point(load_model(checkpoint)[0], TASK, ROWS)


def test_it_is_repeated(folder):
    checkpoint, point = point_of(folder)
    base, before = load_model(folder / "base")[0], torch.random.get_rng_state()
    found = repeatable(read_state(checkpoint, point), point, base, ARGUMENTS)
    assert torch.equal(before, torch.random.get_rng_state())
    queries = encode_queries(TASK, as_rows(texts(2, seed=2)), point.model)
    weights = np.ones(len(ROWS))
    weights[3] = 0
    made = retrain(found, weights, point, queries, together=1)
    assert made.repeated and made.repeated.drift < 1e-3 and made.repeated.logged == 9
    assert made.repeated.loss is not None and made.repeated.loss < 1e-3
    assert np.abs(made.falls).min() > 1e-4
    other = repeatable(read_state(checkpoint, point), point, base, {**ARGUMENTS, "seed": 8})
    with pytest.raises(NumericalError, match="does not end at the model"):
        retrain(other, weights, point, queries, together=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_scheduler_type": "linear"}, "was logged"),
        ({"learning_rate": 2e-2}, "was logged"),
        ({"learning_rat": 2e-2}, "learning_rat"),
    ],
)
def test_other_arguments_are_noticed(folder, changes, said):
    checkpoint, point = point_of(folder)
    with pytest.raises(UsageError, match=said):
        repeatable(read_state(checkpoint, point), point, load_model(folder / "base")[0], {**ARGUMENTS, **changes})


def run_of(folder, place):
    """A run with scores of what the Trainer made."""
    checkpoint, _ = point_of(folder)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {
        "run": "plain",
        "model": {"base": str(folder / "base"), "path": str(checkpoint)},
        "data": {"path": "rows.jsonl"},
        "prompts": {"items": list(as_rows(texts(2, seed=2)))},
        "fit": {"examples": "all"},
        "score": {"queries": "prompts", "check": False},
        "evaluate": None,
    }
    (place / "whence.yaml").write_text(yaml.safe_dump(config))
    resolved = read_config(place / "whence.yaml", environment={})
    run_pipeline(resolved, ["score"])
    return checkpoint, resolved


def test_a_run_of_such_a_model_is_retrained(folder, tmp_path):
    checkpoint, resolved = run_of(folder, tmp_path)
    with pytest.raises(UsageError, match="How the model"):
        check_run(resolved, Removals(rows=1))
    elsewhere = Elsewhere(checkpoint, ARGUMENTS)
    result, _ = check_run(resolved, Removals(rows=1, draws=1), trainer=elsewhere)
    assert result.about["repeated"]["drift"] < 1e-3 and "stand" in result.says[0]
    scores = whence.mirror(resolved.out, training=checkpoint, arguments=ARGUMENTS, together=1)
    assert scores.shape == (2, len(ROWS)) and scores.about["own gain"] > 0
    patched, _ = check_run(resolved, Removals(rows=1, draws=1), patch=1, trainer=Elsewhere(checkpoint))
    assert "rises by" in patched.says[0] and patched.about["learning_rate"] < 1e-2


def test_what_logged_no_rate_is_repeated_where_the_rate_is_given(folder, tmp_path):
    checkpoint, resolved = run_of(folder, tmp_path)
    silent = shutil.copytree(checkpoint, tmp_path / "silent")
    state = json.loads((silent / "trainer_state.json").read_text())
    (silent / "trainer_state.json").write_text(json.dumps({**state, "log_history": []}))
    with pytest.raises(UsageError, match="tells no learning rate") as raised:
        check_run(resolved, Removals(rows=1, draws=1), trainer=Elsewhere(silent, ARGUMENTS))
    assert "--argument learning_rate=" in raised.value.fix
    known = Elsewhere(silent, {**ARGUMENTS, "learning_rate": 1e-2})
    result, _ = check_run(resolved, Removals(rows=1, draws=1), trainer=known)
    assert result.about["repeated"]["drift"] < 1e-3 and result.about["repeated"]["logged"] == 0
    with pytest.raises(UsageError, match="tells no learning rate"):
        check_run(resolved, Removals(rows=1, draws=1), patch=1, trainer=known)


def test_an_adapter_is_retrained_from_how_it_began(adapted, tmp_path):
    checkpoint, resolved = run_of(adapted, tmp_path)
    drifts = []
    for began in (str(adapted / "before"), "5"):
        elsewhere = Elsewhere(checkpoint, ARGUMENTS, began)
        result, _ = check_run(resolved, Removals(rows=1, draws=1), trainer=elsewhere, out=tmp_path / f"from-{len(drifts)}")
        drifts.append(result.about["repeated"]["drift"])
    assert max(drifts) < 1e-3 and drifts[0] == drifts[1]
    given: Any = {"training": checkpoint, "arguments": ARGUMENTS, "together": 1}
    assert whence.mirror(resolved.out, initial_adapter=5, **given).about["own gain"] > 0
    with pytest.raises(NumericalError, match="does not end at the model"):
        whence.mirror(resolved.out, initial_adapter=6, out=tmp_path / "wrong", **given)
    with pytest.raises(UsageError, match="which weights the training began with") as raised:
        whence.mirror(resolved.out, out=tmp_path / "none", **given)
    assert "--initial-adapter" in raised.value.fix
    with pytest.raises(UsageError, match="not the checkpoint"):
        whence.mirror(resolved.out, initial_adapter=5)
    with pytest.raises(StaleArtifact, match="training"):
        check_run(resolved, Removals(rows=1, draws=1), trainer=Elsewhere(checkpoint, ARGUMENTS, 6), out=tmp_path / "from-0")


def test_an_adapter_is_drawn_for_one_only(folder):
    _, point = point_of(folder)
    with pytest.raises(UsageError, match="which adapter"):
        fresh_adapter(load_model(folder / "base")[0], point.model, 5)


def test_without_arguments_it_says_what_to_add(folder):
    checkpoint, point = point_of(folder)
    with pytest.raises(UsageError, match="which rows each step read"):
        read_state(checkpoint, point).replay()
