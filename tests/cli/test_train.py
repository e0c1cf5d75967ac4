import json

import pytest

from whence import cli
from whence.models import load_model
from whence.settings import Lora, Train
from whence.train.record import read_training


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "train", "whence.cli.train:train")


def quick(model, data, out):
    return ["train", model, "--data", data, "--out", out, "--batch-size", 4, "--lr", "1e-3", "--evaluation", 0.25, "-q"]


def test_it_trains_says_what_came_of_it_and_what_is_next(run, tiny_model_folder, data, tmp_path):
    out = tmp_path / "runs" / "train"
    said = run(*quick(tiny_model_folder, data, out), "--log-steps", 1, "--max-length", 64).stdout.splitlines()
    trained = read_training(out)
    losses = trained.about["loss"]
    assert said[0] == f"{out}/model: 2 steps on 9 rows, 1 epochs"
    assert (
        said[1] == f"loss on rows trained on: {losses['before']['train']:.3f} -> {losses['after']['train']:.3f} nats per token"
    )
    assert said[2].startswith("loss on rows held out: ") and said[3] == f"see {out}/training.png"
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert said[4].startswith("next: whence fit ") and said[4].endswith(f"--max-length 64 --out {out.parent}/factors")
    run(*said[4].removeprefix("next: whence ").split(), "-q")
    again = run(*quick(tiny_model_folder, data, out), "--log-steps", 1, "--max-length", 64)
    assert again.stdout.splitlines() == said


def test_the_document_is_the_record(run, tiny_model_folder, data, tmp_path):
    out = tmp_path / "train"
    document = json.loads(run(*quick(tiny_model_folder, data, out), "--lora", "--lora-r", 2, "--json").stdout)
    assert document.pop("model") == str(out / "model") and document == read_training(out).about
    assert document["settings"]["lora"]["r"] == 2
    assert load_model(out / "model")[0].peft_config["default"].r == 2


def test_every_setting_is_an_option(run, tiny_model_folder, data, tmp_path, monkeypatch):
    seen = {}

    def finetune(model, task, rows, settings, **options):
        seen.update(options, settings=settings, rows=rows, task=task, dtype=model.dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr("whence.train.finetune.finetune", finetune)
    options = {
        "epochs": 2.0, "max-steps": 5, "batch-size": 3, "gradient-accumulation": 2, "learning-rate": 0.1, "weight-decay": 0.2,
        "schedule": "linear", "schedule-option": "a=[1, x]", "warmup": 0.3, "max-grad-norm": 0.5, "optimizer": "sgd",
        "workers": 4, "save-steps": 6, "log-steps": 7, "keep": "all", "evaluation": 0.4, "evaluation-limit": 8, "eval-steps": 9,
        "lora-r": 3, "lora-alpha": 5.0, "lora-dropout": 0.6, "lora-targets": "q_proj,v_proj", "tracker": "wandb",
        "argument": "adam_beta2=0.9", "seed": 11, "max-length": 33, "dtype": "float64", "format": "qa",
    }  # fmt: skip
    flags = ["--bf16", "--gradient-checkpointing", "--no-drop-last", "--lora", "--normalise", "--lowercase", "--rerun"]
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    run("train", tiny_model_folder, "--data", data, "--out", tmp_path / "train", *words, *flags, "-q", code=130)
    assert seen["settings"] == Train(
        epochs=2.0, max_steps=5, batch_size=3, gradient_accumulation=2, learning_rate=0.1, weight_decay=0.2, schedule="linear",
        schedule_options={"a": [1, "x"]}, warmup=0.3, max_grad_norm=0.5, bf16=True, optimizer="sgd",
        gradient_checkpointing=True, workers=4, drop_last=False, save_steps=6, log_steps=7, keep=None,
        evaluation=0.4, evaluation_limit=8, eval_steps=9,
        lora=Lora(r=3, alpha=5.0, dropout=0.6, targets=("q_proj", "v_proj")), tracker="wandb", arguments={"adam_beta2": 0.9},
    )  # fmt: skip
    assert seen["out"] == tmp_path / "train" and seen["seed"] == 11 and seen["rerun"]
    assert seen["task"].max_length == 33 and str(seen["dtype"]) == "torch.float64"
    assert seen["rows"][0] == {
        "prompt": "Question: where was ada velt born?\nAnswer:",
        "completion": " in turin, where else.",
        "source": "T",
    }


def test_without_options_the_settings_are_those_of_the_schema(run, tiny_model_folder, data, tmp_path, monkeypatch):
    def finetune(model, task, rows, settings, **options):
        assert settings == Train()
        raise KeyboardInterrupt

    monkeypatch.setattr("whence.train.finetune.finetune", finetune)
    run("train", tiny_model_folder, "--data", data, "--out", tmp_path / "train", "-q", code=130)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs can't be 0"),
        (["--max-grad-norm", "much"], "--max-grad-norm can't be much"),
        (["--argument", "adam_beta2"], "has no value"),
        (["--argument", "adam_beta_2=0.9"], "did you mean adam_beta2"),
        (["--lowercase"], "--lowercase is a part of --normalise"),
        (["--format", "qa", "--prompt-template", "{prompt}!"], "has templates already"),
        (["--prompt-template", "no place"], "must hold {prompt} once"),
    ],
)
def test_mistakes_are_named(run, tiny_model_folder, data, tmp_path, words, message):
    assert message in run("train", tiny_model_folder, "--data", data, "--out", tmp_path / "train", *words, code=2).stderr
    assert not (tmp_path / "train").exists()
