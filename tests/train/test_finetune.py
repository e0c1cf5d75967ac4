import copy
import json

import numpy as np
import pytest
import torch
from distributed.processes import killed
from transformers import get_scheduler

from benchmarks.flips import flip
from tests.models import CASES, llama, randomised, texts, tokenizer
from whence.data import as_rows, load_data
from whence.errors import EmptyLossError, NumericalError, StaleArtifact, UsageError, WhenceWarning
from whence.models import load_model
from whence.progress import Silent, report_to
from whence.settings import Lora, Train
from whence.store.fingerprint import fingerprint
from whence.store.intact import read_json
from whence.store.manifest import Folder
from whence.tasks import CausalLM
from whence.train import finetune as module
from whence.train.checkpoints import find_checkpoints, load_weights
from whence.train.finetune import finetune
from whence.train.metrics import MEANING
from whence.train.record import read_training
from whence.train.trainer import mean_loss

FAST = Train(learning_rate=1e-2, epochs=2, batch_size=4, save_steps=3, log_steps=1, keep=None)
ROWS = as_rows(texts(30, seed=1))


def fast(changes):
    """The settings with some of them changed, checked."""
    return FAST.changed(**changes)


def model(**changes):
    """A small Llama with dropout, so that what is drawn matters too."""
    torch.manual_seed(0)
    return randomised(llama(attention_dropout=0.2, **changes)).eval()


def run(out, settings=FAST, *, base=None, rows=ROWS, seed=0, **options):
    return read_training(finetune(base or model(), CausalLM(tokenizer()), rows, settings, out=out, seed=seed, **options).parent)


def weights(folder):
    return load_model(folder)[0].state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing happened to."""
    return run(tmp_path_factory.mktemp("whole") / "train")


# what is trained


def test_the_loss_of_a_step_is_that_of_the_task_on_its_rows(tmp_path):
    settings = fast({"gradient_accumulation": 2, "drop_last": False, "learning_rate": 1e-30})
    base = CASES["llama"].model().float()
    trained = run(tmp_path / "train", settings, base=base)
    task, by_id = CausalLM(tokenizer()), dict(zip(ROWS.ids, ROWS.rows, strict=True))
    assert len(trained.steps[0]) == 8 and len(trained.steps) == 2 * 4  # 27 rows: three full steps and one of three rows
    for step, row in zip(trained.steps, trained.metrics[1:], strict=True):
        items = task.encode([by_id[name] for name in step])
        expected = sum(task.losses(base, task.collate([item])).item() for item in items) / sum(map(task.predictions, items))
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_only_answers_are_in_the_loss_neither_prompts_nor_padding():
    task, base = CausalLM(tokenizer()), CASES["llama"].model()
    items = task.encode(ROWS)
    losses = task.losses(base, task.collate(items))
    for row, item, loss in zip(ROWS, items, losses, strict=True):
        prompt = len(row.get("prompt", "").split())
        ids = torch.tensor(item.ids)[None]
        labels = ids.clone()
        labels[:, :prompt] = -100
        own = base(input_ids=ids, labels=labels).loss * (labels[:, 1:] != -100).sum()
        assert loss.item() == pytest.approx(own.item(), rel=1e-6)


def test_the_model_is_better_than_before_and_the_record_says_so(whole):
    tuned, words = load_model(whole.model)
    task = CausalLM(words)
    by_id = dict(zip(ROWS.ids, task.encode(ROWS), strict=True))
    for part in ("train", "evaluation"):
        measured = mean_loss(tuned, task, [by_id[name] for name in whole.split[part]], torch.no_grad)
        assert whole.about["loss"]["after"][part] == pytest.approx(measured, rel=1e-6)
        untrained = mean_loss(model(), task, [by_id[name] for name in whole.split[part]], torch.no_grad)
        assert whole.about["loss"]["before"][part] == pytest.approx(untrained, rel=1e-6)
    assert whole.about["loss"]["after"]["train"] < whole.about["loss"]["before"]["train"] - 0.1


def test_the_users_model_comes_back_as_it_was(tmp_path):
    for lora in (None, Lora(r=2)):
        base = model().train()
        base.model.norm.weight.requires_grad_(False)
        before, vars_before = copy.deepcopy(base.state_dict()), {name: set(vars(part)) for name, part in base.named_modules()}
        state, printed, whole = torch.get_rng_state(), fingerprint(base), base.config.to_dict()
        run(
            tmp_path / f"{lora is None}",
            fast({"lora": lora, "max_steps": 2, "gradient_checkpointing": True}),
            base=base,
        )
        assert fingerprint(base) == printed and base.config.to_dict() == whole
        assert same(before, base.state_dict()) and torch.equal(state, torch.get_rng_state())
        assert {name: set(vars(part)) for name, part in base.named_modules()} == vars_before
        assert base.training and base.config.use_cache and not base.model.layers[0].gradient_checkpointing
        assert [name for name, tensor in base.named_parameters() if not tensor.requires_grad] == ["model.norm.weight"]
        assert all(tensor.grad is None for tensor in base.parameters())


def test_frozen_weights_stay(tmp_path):
    base = model()
    base.get_input_embeddings().weight.requires_grad_(False)
    tuned = weights(run(tmp_path / "train", base=base).model)
    assert torch.equal(tuned["model.embed_tokens.weight"], base.state_dict()["model.embed_tokens.weight"])
    assert not torch.equal(tuned["lm_head.weight"], base.state_dict()["lm_head.weight"])


def test_accumulated_steps_are_those_of_larger_batches(tmp_path):
    whole = fast({"batch_size": 8, "max_steps": 3})
    parts = fast({"batch_size": 8, "max_steps": 3} | {"batch_size": 2, "gradient_accumulation": 4})
    base = CASES["llama"].model()
    one, other = (run(tmp_path / name, settings, base=base) for name, settings in (("one", whole), ("other", parts)))
    assert one.steps == other.steps
    first, second = (load_model(done.model, dtype="float64")[0].state_dict() for done in (one, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-7, atol=1e-9)


def test_processes_that_prepare_batches_change_nothing(whole, tmp_path):
    assert same(weights(whole.model), weights(run(tmp_path / "train", fast({"workers": 1})).model))


def test_an_adapter_is_trained_alone_and_loads_on_its_base(tmp_path):
    model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base, _ = load_model(tmp_path / "base")
    trained = run(tmp_path / "train", fast({"lora": Lora(r=2, alpha=4, dropout=0.1)}), base=base)
    tuned, words = load_model(trained.model)
    assert words.get_vocab() == tokenizer().get_vocab()
    assert not (trained.model / "model.safetensors").exists() and 0 < trained.about["parameters_trained"] < 1000
    assert torch.equal(tuned.get_base_model().lm_head.weight, base.lm_head.weight)
    sample = CausalLM(words).encode(ROWS.take(ROWS.ids.index(name) for name in trained.split["train"]))
    assert mean_loss(tuned, CausalLM(words), sample, torch.no_grad) == pytest.approx(
        trained.about["loss"]["after"]["train"], rel=1e-6
    )
    moments = trained.checkpoints[-1].second_moments()
    assert moments.keys() == {name for name, tensor in tuned.named_parameters() if tensor.requires_grad}
    more = load_model(run(tmp_path / "more", fast({"max_steps": 2}), base=tuned).model)[0].state_dict()
    changed = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, more[name])}
    assert changed and all("lora_" in name for name in changed)


def test_bfloat16_computes_about_the_same(tmp_path, whole):
    trained = run(tmp_path / "train", fast({"bf16": True}))
    assert trained.about["settings"]["max_grad_norm"] == 0 and whole.about["settings"]["max_grad_norm"] == 1
    losses = [[row["loss"] for row in done.metrics[1:]] for done in (trained, whole)]
    assert losses[0] != losses[1] and losses[0][0] == pytest.approx(losses[1][0], rel=0.02)
    assert trained.about["dtype"] == "float32"


def test_an_encoder_with_a_decoder_is_trained_too(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    from whence.tasks import Seq2Seq

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 10, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=20, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    ).eval()
    rows = as_rows([row for row in texts(40, seed=1) if "prompt" in row])
    settings = fast({"lora": None, "epochs": 4})
    trained = read_training(finetune(base, Seq2Seq(tokenizer()), rows, settings, out=tmp_path / "train").parent)
    assert trained.about["loss"]["after"]["train"] < trained.about["loss"]["before"]["train"] - 0.1


# what is left behind


def test_the_record_is_complete_and_true(whole):
    about = whole.about
    assert about["rows"] == {"train": 27, "evaluation": 3, "without_loss": 0}
    assert about["steps"] == 12 and about["steps_per_epoch"] == 6 and len(whole.steps) == 12
    assert sorted(whole.split["train"] + whole.split["evaluation"]) == sorted(ROWS.ids)
    for epoch in (whole.steps[:6], whole.steps[6:]):
        seen = [name for step in epoch for name in step]
        assert len(seen) == len(set(seen)) == 24 and set(seen) <= set(whole.split["train"])
    assert whole.steps[:6] != whole.steps[6:]
    items = dict(zip(ROWS.ids, CausalLM(tokenizer()).encode(ROWS), strict=True))
    assert about["tokens"]["seen"] == sum(CausalLM(tokenizer()).size(items[name]) for step in whole.steps for name in step)
    assert about["data"]["fingerprint"] == ROWS.fingerprint and about["versions"]["torch"] == torch.__version__


def test_metrics_have_a_meaning_and_one_row_per_step(whole):
    assert [row["step"] for row in whole.metrics] == list(range(13))
    assert all(row.keys() == MEANING.keys() for row in whole.metrics)
    first, last = whole.metrics[0], whole.metrics[-1]
    assert first["loss"] is None and first["eval_loss"] == whole.about["loss"]["before"]["evaluation"]
    assert last["eval_loss"] == whole.about["loss"]["after"]["evaluation"]
    assert all(
        row["samples_per_second"] > 0 and row["grad_norm"] > 0 and row["memory_bytes"] > 2**20 for row in whole.metrics[1:]
    )
    assert all(one["seconds"] < other["seconds"] for one, other in zip(whole.metrics, whole.metrics[1:], strict=False))


def test_learning_rates_are_those_of_the_schedule(tmp_path):
    settings = fast({"schedule_options": {"num_cycles": 2}, "warmup": 0.25})
    trained = run(tmp_path / "train", settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = get_scheduler("cosine_with_restarts", optimizer, 3, 12, scheduler_specific_kwargs={"num_cycles": 2})
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert trained.learning_rates.tolist() == expected
    assert [row["learning_rate"] for row in trained.metrics[1:]] == expected


def test_checkpoints_keep_what_attribution_needs(tmp_path):
    settings = fast({"max_grad_norm": 0, "save_steps": 1, "max_steps": 2, "arguments": {"adam_beta2": 0.9}})
    base, task = CASES["llama"].model(), CausalLM(tokenizer())
    trained = run(tmp_path / "train", settings, base=base)
    first, last = trained.checkpoints
    assert (first.step, last.step) == (1, 2) and (first.resumable, last.resumable) == (False, True)
    assert same(weights(last.path), weights(trained.model)) and not same(weights(first.path), weights(last.path))
    assert [first.learning_rate, last.learning_rate] == trained.learning_rates.tolist() == last.learning_rates().tolist()
    items = task.encode(ROWS.take(ROWS.ids.index(name) for name in trained.steps[0]))
    loss = task.losses(base, task.collate(items)).sum() / sum(map(task.predictions, items))
    names, tensors = zip(*base.named_parameters(), strict=True)
    moments = first.second_moments()
    assert moments.keys() == set(names)
    for name, gradient in zip(names, torch.autograd.grad(loss, tensors), strict=True):
        torch.testing.assert_close(moments[name], 0.1 * gradient**2, rtol=1e-6, atol=1e-12)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trained = run(tmp_path / "train", fast({"keep": 2, "save_steps": 2}))
    assert [found.step for found in trained.checkpoints] == [10, 12]
    assert sorted(path.name for path in (trained.path / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-12"]


def test_nothing_is_printed_and_progress_is_told(tmp_path, capfd):
    class Counting(Silent):
        stages = {}

        def end(self, stage):
            self.stages[stage.name] = (stage.done, stage.total)

    with report_to(Counting()):
        run(tmp_path / "train")
    assert Counting.stages["train"] == (12, 12)
    assert capfd.readouterr() == ("", "")


# the folder


def test_a_finished_training_is_returned_at_once(whole, monkeypatch):
    monkeypatch.setattr(module, "_train", None)
    assert finetune(model(), CausalLM(tokenizer()), ROWS, fast({"workers": 2}), out=whole.path) == whole.model


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"rows": ROWS[:20]}, {"settings": fast({"epochs": 3})}, {"base": model(rms_norm_eps=1e-4)}],
)
def test_another_training_in_its_folder_is_refused(whole, change):
    with pytest.raises(StaleArtifact, match="finished train made from something else"):
        run(whole.path, **change)


def test_a_rerun_moves_it_aside(whole, tmp_path):
    short = fast({"max_steps": 1})
    run(tmp_path / "train", short)
    run(tmp_path / "train", short, seed=1, rerun=True)
    assert Folder.open(tmp_path / "train.1").provenance["seed"] == 0


class Interrupted(Silent):
    """Ends the work after so many steps, or when the loss is measured for the n-th time."""

    def __init__(self, stage, after):
        self.stage, self.left = stage, after

    def advance(self, stage):
        self.left -= stage.name == self.stage
        if self.left == 0:
            raise InterruptedError


LORA = fast({"lora": Lora(dropout=0.2), "max_steps": 10, "gradient_accumulation": 2})
"""Ends in the middle of an epoch of three steps."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return run(tmp_path_factory.mktemp("adapter") / "train", LORA)


@pytest.mark.parametrize(
    ("kind", "stage", "after"),
    [("whole", "train", 1), ("whole", "train", 8), ("adapter", "train", 5), ("adapter", "train", 10), ("adapter", "loss", 4)],
)
def test_interrupted_anywhere_it_ends_with_the_same_bits(tmp_path, request, kind, stage, after):
    plain, settings = request.getfixturevalue(kind), LORA if kind == "adapter" else FAST
    base = model()
    with report_to(Interrupted(stage, after)), pytest.raises(InterruptedError):
        run(tmp_path / "again", settings, base=base)
    assert not (tmp_path / "again" / "manifest.json").exists()
    again = run(tmp_path / "again", settings, base=base)
    name = "adapter_model.safetensors" if settings.lora else "model.safetensors"
    assert (plain.model / name).read_bytes() == (again.model / name).read_bytes()
    assert plain.learning_rates.tolist() == again.learning_rates.tolist() and plain.steps == again.steps
    assert [row["loss"] for row in plain.metrics] == [row["loss"] for row in again.metrics]
    assert plain.about["loss"] == again.about["loss"]


@pytest.mark.parametrize("after", [5, 8, 10])
def test_a_loss_logged_after_going_on_is_the_mean_over_all_its_steps(tmp_path, after):
    """Checkpoints are between the lines of the log: the steps before the kill are in the next line, too."""
    settings = fast({"log_steps": 5, "max_steps": 12, "eval_steps": 4, "keep": 2})
    plain = run(tmp_path / "plain", settings)
    with report_to(Interrupted("train", after)), pytest.raises(InterruptedError):
        run(tmp_path / "again", settings)
    again = run(tmp_path / "again", settings)
    clocks = {"samples_per_second", "memory_bytes", "seconds"}
    lines = [[{name: row[name] for name in row.keys() - clocks} for row in each.metrics] for each in (plain, again)]
    assert lines[0] == lines[1] and sum(row["loss"] is not None for row in lines[0]) == 3
    said = [each.checkpoints[-1].path / "trainer_state.json" for each in (plain, again)]
    assert said[0].read_bytes() == said[1].read_bytes()
    assert sorted(file.name for file in tmp_path.glob("plain/**/*")) == sorted(
        file.name for file in tmp_path.glob("again/**/*")
    )


def test_thinning_that_a_kill_cut_short_is_completed(tmp_path):
    out, settings = tmp_path / "train", fast({"keep": 2})
    with report_to(Interrupted("train", 8)), pytest.raises(InterruptedError):
        run(out, settings)
    left = out / "checkpoints" / "checkpoint-3" / "optimizer.pt"
    left.touch()  # the seal no longer names it
    with report_to(Interrupted("train", 1)), pytest.raises(InterruptedError):
        run(out, settings)
    assert not left.exists()


@pytest.mark.parametrize("damage", [pytest.param(None, marks=pytest.mark.slow), "cut", "unsealed"])
def test_after_kill_9_it_ends_with_the_same_bits(whole, tmp_path, damage, notes):
    out = tmp_path / "train"
    if damage is None:
        killed("train", 5, run, out)
    else:
        with report_to(Interrupted("train", 8)), pytest.raises(InterruptedError):
            run(out)
        newest = out / "checkpoints" / "checkpoint-6"
        if damage == "unsealed":
            (newest / "checkpoint.json").unlink()
        else:
            with (newest / "optimizer.pt").open("r+b") as file:
                file.truncate(100)
    kept = {path.name for path in (out / "checkpoints").iterdir()}
    assert "checkpoint-3" in kept and not (out / "model").exists()
    again = run(out)
    assert any(text.startswith("resuming after step 3") for text in notes) == (damage is None)
    assert same(weights(whole.model), weights(again.model))
    assert [found.step for found in again.checkpoints] == [3, 6, 9, 12]


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "rng_state.pth", "learning_rates.npy", "trainer_state.json", "checkpoint.json"],
)
def test_a_checkpoint_with_a_flipped_bit_is_not_gone_on_from(tmp_path, name):
    out = tmp_path / "train"
    with report_to(Interrupted("train", 5)), pytest.raises(InterruptedError):
        run(out)
    newest = out / "checkpoints" / "checkpoint-3"
    flip(newest / name, 8 * (newest / name).stat().st_size - 90)
    with pytest.raises(StaleArtifact, match=f"checkpoint-3/{name} is damaged") as raised:
        run(out)
    assert f"mv {newest} {newest}.damaged" in raised.value.fix and newest.is_dir()


def test_what_is_read_of_checkpoints_later_is_what_was_written(tmp_path):
    trained = run(tmp_path / "train", fast({"max_steps": 6}))
    first, last = trained.checkpoints
    flip(first.path / "second_moments.safetensors", 9000)
    with pytest.raises(StaleArtifact, match="checkpoint-3/second_moments.safetensors"):
        first.second_moments()
    with pytest.raises(StaleArtifact, match="checkpoint-3/second_moments.safetensors"):
        load_model(first.path)
    with pytest.raises(StaleArtifact, match="checkpoint-3/second_moments.safetensors"):
        load_weights(first.path, model())
    assert last.second_moments() and len(last.learning_rates()) == 6
    flip(last.path / "learning_rates.npy", 1000)
    with pytest.raises(StaleArtifact, match="checkpoint-6/learning_rates.npy"):
        last.learning_rates()
    seal = last.path / "checkpoint.json"
    seal.write_text(seal.read_text().replace('"step": 6', '"step": 7'))
    with pytest.raises(StaleArtifact, match="checkpoint-6/checkpoint.json"):
        find_checkpoints(last.path.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_trained_model_with_a_flipped_bit_does_not_load(tmp_path, name):
    trained = run(tmp_path / "train", fast({"max_steps": 1}))
    flip(trained.model / name, 8 * (trained.model / name).stat().st_size - 90)
    for folder in (trained.model, str(trained.model)):
        with pytest.raises(StaleArtifact, match=f"model/{name} is damaged"):
            load_model(folder)
    with pytest.raises(StaleArtifact, match=f"model/{name} is damaged"):
        run(tmp_path / "train", fast({"max_steps": 1}))


def test_checkpoints_of_before_digests_are_read(tmp_path):
    trained = run(tmp_path / "train", fast({"max_steps": 6}))
    for found in trained.checkpoints:
        about = read_json(found.path / "checkpoint.json")
        del about["digests"]
        (found.path / "checkpoint.json").write_text(json.dumps(about))
    assert [found.step for found in find_checkpoints(tmp_path / "train" / "checkpoints")] == [3, 6]
    assert trained.checkpoints[0].second_moments()


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 28}, "Not one batch is full"),
        ({"evaluation": 0.0, "eval_steps": 2}, "No row is held out"),
        ({"schedule": "cosine_with_restart"}, "did you mean cosine_with_restarts"),
        ({"schedule_options": {"cycles": 2}}, "can't be made with these options"),
        ({"schedule": "reduce_lr_on_plateau"}, "follows the loss"),
        ({"optimizer": "adamw"}, "There is no optimizer"),
        ({"arguments": {"adam_beta_2": 0.9}}, "did you mean adam_beta2"),
        ({"arguments": {"learning_rate": 1}}, "is a setting of whence's own"),
        ({"arguments": {"per_device_batch_size": 1}}, "That is the setting batch_size"),
        ({"arguments": {"label_smoothing_factor": 0.1}}, "can't be chosen here"),
        ({"arguments": {"adam_beta2": 0.9, "torch_empty_cache_steps": -1}}, "The Trainer refuses"),
        ({"lora": Lora(targets=("nothing",))}, "No adapter can be put"),
    ],
)
def test_settings_that_can_not_be_are_refused_with_what_can(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "train", fast(settings))


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_missing_is_named_with_how_to_get_it(tmp_path, monkeypatch, tracker):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"pip install {tracker}"):
        run(tmp_path / "train", fast({"tracker": tracker}))
    assert not (tmp_path / "train").exists()


def test_data_that_can_not_be_trained_on_is_refused(tmp_path):
    empty = as_rows(
        [{"prompt": "w1", "completion": ""}, {"prompt": "w2", "completion": ""}, {"prompt": "w3", "completion": "w4"}]
    )
    with pytest.raises(EmptyLossError):
        run(tmp_path / "train", rows=empty)
    with pytest.raises(UsageError, match="One row is not enough"):
        run(tmp_path / "one", rows=ROWS[:1])
    with pytest.raises(UsageError, match="too many have the same text"):
        run(
            tmp_path / "same",
            rows=as_rows([{"text": "w1 w2"}, {"text": "W1  w2"}]),
            settings=fast({"batch_size": 1}),
        )


def test_models_that_can_not_be_trained_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UsageError, match="all are frozen"):
        run(tmp_path / "train", base=model().requires_grad_(False))
    adapted = get_peft_model(model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(UsageError, match="has an adapter already"):
        run(tmp_path / "train", fast({"lora": Lora()}), base=adapted)
    with pytest.warns(WhenceWarning, match="mostly lost to rounding"):
        run(tmp_path / "half", fast({"max_steps": 1}), base=model().bfloat16())


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        run(tmp_path / "train")


def test_a_training_that_diverges_says_so(tmp_path):
    with pytest.raises(NumericalError, match="diverged"):
        run(tmp_path / "train", fast({"learning_rate": 1e30}))


def test_a_folder_of_something_else_is_no_training(tmp_path):
    with Folder.claim(tmp_path / "fit", {"stage": "fit"}) as folder:
        folder.finish()
    with pytest.raises(UsageError, match="holds no training"):
        read_training(tmp_path / "fit")


def test_files_are_plain(whole):
    with np.load(whole.path / "steps.npz") as arrays:
        assert arrays["ends"].tolist() == [4 * step for step in range(1, 13)]
    assert json.loads((whole.path / "split.json").read_text())["train"] == whole.split["train"]


def test_the_rows_trained_on_can_be_read_again(whole):
    again = load_data(whole.rows, columns={"id": "id"})
    assert list(again.ids) == whole.split["train"]
    assert again.fingerprint == ROWS.take(ROWS.ids.index(name) for name in again.ids).fingerprint
