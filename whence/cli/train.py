"""`whence train`: fine-tune a model, and keep what attribution needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from whence.cli.from_settings import Without
from whence.cli.options import Seed, Session
from whence.errors import UsageError
from whence.settings import Data, Format, Lora, Normalise, Section, Train, Weights, setting
from whence.show.numbers import many


class Adapter(Lora):
    """Whether an adapter is trained, and which."""

    lora: bool = setting(False, "Train a LoRA adapter, not the model.")


class Writing(Section):
    """How the rows are written before they are tokenized."""

    format: Literal["plain", "qa", "instruction"] = setting("plain", "How prompt and completion are written.")
    prompt_template: str | None = setting(None, 'Your own instead, such as "Q: {prompt}".')
    completion_template: str | None = setting(None, 'Such as " A: {completion}".')
    normalise: bool = setting(False, "Plain characters (NFKC) and single spaces, before anything else.")
    lowercase: bool = setting(False, "Lower case, with --normalise.")


def train(
    *,
    model: Annotated[
        str, typer.Argument(metavar="BASE", help="Hub id or folder of the model, or of a LoRA adapter to continue from.")
    ],
    settings: Train,
    adapter: Adapter,
    writing: Writing,
    seed: Seed = 0,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the training, such as runs/a/train.")],
    weights: Annotated[Weights, Without("adapter")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of the weights; bfloat16 loses small updates, but not those of LoRA.")
    ] = "float32",
    session: Session,
) -> None:
    """Fine-tune a model on prompts with completions, texts or conversations; only answers are in the loss.

    In the folder: model/ (weights and tokenizer, or the adapter), checkpoints/, metrics.jsonl, training.json, training.png.
    The same command resumes after a kill, and does nothing when all is done. rows.jsonl has the rows trained on as they were
    written: factors and scores of the model are about those.

    \b
    Examples
      whence train gpt2 --data train.jsonl --out runs/a/train
      whence train ./model --data train.csv -c prompt=Input -c completion=Output --format qa --epochs 3 -o runs/b/train
      whence train ./model --data train.jsonl --lora --lr 2e-4 --dtype bfloat16 -o runs/c/train
    """
    from whence.cli.console import print_json, start
    from whence.loading import rows_of, task_of
    from whence.models import load_model
    from whence.plots.style import save
    from whence.plots.training import training_curves, training_figure
    from whence.train.finetune import finetune
    from whence.train.reading import how_written
    from whence.train.record import read_training

    data = data.changed(**_as_written(writing))
    settings = settings.changed(lora=adapter.part(Lora) if adapter.lora else None)
    with start(session):
        rows = rows_of(data)
        loaded, tokenizer = load_model(model, **weights.as_json() | {"dtype": dtype})
        finetune(
            loaded,
            task_of(loaded, tokenizer, data),
            rows,
            settings,
            out=out,
            seed=seed,
            rerun=session.rerun,
            written_as=how_written(data),
        )
    trained = read_training(out)
    save(training_figure(training_curves(trained.metrics, trained.learning_rates.tolist())), out / "training.png")
    if session.as_json:
        print_json({"model": str(trained.model), **trained.about})
        return
    _show(trained, data)


def _show(trained: Any, data: Data) -> None:
    """Where the model is, what it learnt, and what to do with it."""
    from whence.cli.console import say
    from whence.escapes import command

    about, losses = trained.about, trained.about["loss"]
    work = f"{many(about['steps'], 'step')} on {many(about['rows']['train'], 'row')}"
    say(f"{trained.model}: {work}, {about['epochs']:.3g} epochs")
    for part, name in (("train", "rows trained on"), ("evaluation", "rows held out")):
        if losses["after"][part] is not None:
            say(f"loss on {name}: {losses['before'][part]:.3f} -> {losses['after'][part]:.3f} nats per token")
    say(f"see {trained.path / 'training.png'}")
    reading = [] if data.max_length == 512 else ["--max-length", str(data.max_length)]
    reading += [] if data.chat_template is None else ["--template", data.chat_template]
    reading += ["--append-eos"] if data.append_eos else []
    files = [str(trained.model), "--data", str(trained.rows), "-c", "id=id"]
    say(f"next: {command('whence', 'fit', *files, *reading, '--out', trained.path.parent / 'factors')}")


def _as_written(writing: Writing) -> dict[str, Any]:
    """A format by name, or templates of one's own; and what is done to the texts before."""
    if writing.lowercase and not writing.normalise:
        raise UsageError("--lowercase is a part of --normalise.", fix="--normalise --lowercase")
    templates = {"prompt": writing.prompt_template, "completion": writing.completion_template}
    own = {name: template for name, template in templates.items() if template is not None}
    if own and writing.format != "plain":
        raise UsageError(f"--format {writing.format} has templates already.", fix="omit --format, or the templates")
    normalise = Normalise(lowercase=writing.lowercase) if writing.normalise else None
    return {"format": Format(**own) if own else writing.format, "normalise": normalise}
