"""`whence train`: fine-tune a model, and keep what attribution needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from whence.cli import options
from whence.errors import UsageError


def train(
    model: Annotated[
        str, typer.Argument(metavar="BASE", help="Hub id or folder of the model, or of a LoRA adapter to go on from.")
    ],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the training, such as runs/a/train.")],
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, metavar="X", help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, metavar="N", help="Stop after so many steps.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, metavar="N", help="Rows at a time.")] = 8,
    gradient_accumulation: Annotated[
        int, typer.Option("--gradient-accumulation", min=1, metavar="N", help="Batches that make a step.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", metavar="X", help="The highest.")] = 2e-5,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, metavar="X")] = 0.01,
    schedule: Annotated[
        str, typer.Option("--schedule", help="A learning-rate schedule of transformers.")
    ] = "cosine_with_restarts",
    schedule_option: Annotated[
        list[str] | None, typer.Option("--schedule-option", metavar="NAME=VALUE", help="Such as num_cycles=2; may be repeated.")
    ] = None,
    warmup: Annotated[
        float, typer.Option("--warmup", min=0.0, metavar="X", help="Steps over which the rate rises; a share of all below 1.")
    ] = 0.0,
    max_grad_norm: Annotated[
        str,
        typer.Option(
            "--max-grad-norm", metavar="X|auto", help="Clip gradients there; 0 never; auto: 1, and never in bfloat16."
        ),
    ] = "auto",
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; if not said, where the GPU has it.")
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="An optimizer of transformers.")] = "adamw_torch_fused",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=0, metavar="N", help="Processes that prepare batches.")] = 0,
    drop_last: Annotated[
        bool, typer.Option("--drop-last/--no-drop-last", help="Leave out the last, incomplete batch of an epoch.")
    ] = True,
    save_steps: Annotated[int, typer.Option("--save-steps", min=1, metavar="N", help="Steps between checkpoints.")] = 100,
    log_steps: Annotated[
        int, typer.Option("--log-steps", min=1, metavar="N", help="Steps between lines of metrics.jsonl.")
    ] = 20,
    keep: Annotated[str, typer.Option("--keep", metavar="N|all", help="Checkpoints to keep, the newest.")] = "3",
    evaluation: Annotated[
        float,
        typer.Option("--evaluation", min=0.0, max=1.0, metavar="X", help="Share of the rows kept out to measure the loss on."),
    ] = 0.1,
    evaluation_limit: Annotated[
        int, typer.Option("--evaluation-limit", min=1, metavar="N", help="Rows kept out at most.")
    ] = 7000,
    eval_steps: Annotated[
        int | None, typer.Option("--eval-steps", min=1, metavar="N", help="Measure that often too, not only at the end.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter, not the model.")] = False,
    lora_r: Annotated[int, typer.Option("--lora-r", min=1, metavar="N", help="Its rank.")] = 8,
    lora_alpha: Annotated[float, typer.Option("--lora-alpha", metavar="X")] = 16.0,
    lora_dropout: Annotated[float, typer.Option("--lora-dropout", min=0.0, max=1.0, metavar="X")] = 0.0,
    lora_targets: Annotated[
        str, typer.Option("--lora-targets", help="Names of the layers that get one, joined by commas.")
    ] = "all-linear",
    tracker: Annotated[
        Literal["none", "tensorboard", "trackio", "wandb"],
        typer.Option("--tracker", help="Where metrics go besides the files."),
    ] = "none",
    argument: Annotated[
        list[str] | None,
        typer.Option("--argument", metavar="NAME=VALUE", help="Any other of transformers.TrainingArguments; may be repeated."),
    ] = None,
    format: Annotated[
        Literal["plain", "qa", "instruction"], typer.Option("--format", help="How prompt and completion are written.")
    ] = "plain",
    prompt_template: Annotated[
        str | None, typer.Option("--prompt-template", help='Of your own instead, such as "Q: {prompt}".')
    ] = None,
    completion_template: Annotated[
        str | None, typer.Option("--completion-template", help='Such as " A: {completion}".')
    ] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Plain characters (NFKC) and single blanks, before anything else.")
    ] = False,
    lowercase: Annotated[bool, typer.Option("--lowercase", help="Small letters, with --normalise.")] = False,
    seed: options.Seed = 0,
    columns: options.Columns = None,
    split: options.Split = "train",
    limit: options.Limit = None,
    max_length: options.MaxLength = 512,
    template: options.Template = None,
    append_eos: options.AppendEos = False,
    tokenizer: options.Tokenizer = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Number format of the weights; bfloat16 loses small updates, but not those of LoRA.")
    ] = "float32",
    device: options.Device = None,
    rerun: options.Rerun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fine-tune a model on prompts with completions, texts or conversations; only answers are in the loss.

    In the folder: model/ (weights and tokenizer, or the adapter), checkpoints/, metrics.jsonl, training.json, training.png.
    The same command goes on after a kill, and does nothing when all is done. rows.jsonl has the rows trained on as they were
    written: factors and scores of the model are about those.

    \b
    Examples
      whence train gpt2 --data train.jsonl --out runs/a/train
      whence train ./model --data train.csv -c prompt=Input -c completion=Output --format qa --epochs 3 -o runs/b/train
      whence train ./model --data train.jsonl --lora --lr 2e-4 --dtype bfloat16 -o runs/c/train
    """
    import json

    from whence.cli.session import session
    from whence.data import load_data
    from whence.data.text import written
    from whence.models import load_model
    from whence.plots.style import save
    from whence.plots.training import training_curves, training_figure
    from whence.settings import Lora, Normalise, Train
    from whence.tasks import task_for
    from whence.train.finetune import finetune
    from whence.train.record import read_training

    if lowercase and not normalise:
        raise UsageError("--lowercase is a part of --normalise.", fix="--normalise --lowercase")
    targets = lora_targets if lora_targets == "all-linear" else tuple(lora_targets.split(","))
    settings = _checked(
        Train,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        schedule_options=_values(schedule_option, "--schedule-option"),
        warmup=warmup,
        max_grad_norm=_number(max_grad_norm, "--max-grad-norm", float, "auto", "auto"),
        bf16="auto" if bf16 is None else bf16,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        workers=workers,
        drop_last=drop_last,
        save_steps=save_steps,
        log_steps=log_steps,
        keep=_number(keep, "--keep", int, "all", None),
        evaluation=evaluation,
        evaluation_limit=evaluation_limit,
        eval_steps=eval_steps,
        lora=_checked(Lora, r=lora_r, alpha=lora_alpha, dropout=lora_dropout, targets=targets) if lora else None,
        tracker=tracker,
        arguments=_values(argument, "--argument"),
    )
    with session(quiet=quiet, verbose=verbose):
        rows = load_data(data, columns=options.mapping(columns), split=split, limit=limit)
        rows = written(
            rows, _format(format, prompt_template, completion_template), Normalise(lowercase=lowercase) if normalise else None
        )
        loaded, words = load_model(model, dtype=dtype, device=device, tokenizer=tokenizer)
        task = task_for(loaded, words, max_length, chat_template=template, append_eos=append_eos)
        finetune(loaded, task, rows, settings, out=out, seed=seed, rerun=rerun)
    trained = read_training(out)
    save(training_figure(training_curves(trained.metrics, trained.learning_rates.tolist())), out / "training.png")
    if as_json:
        print(json.dumps({"model": str(trained.model), **trained.about}))
        return
    _show(trained, _reading(max_length, template, append_eos))


def _show(trained: Any, reading: list[str]) -> None:
    """Where the model is, what it learnt, and what to do with it."""
    import shlex

    from whence.cli.console import say

    about, losses = trained.about, trained.about["loss"]
    say(f"{trained.model}: {about['steps']:,} steps on {about['rows']['train']:,} rows, {about['epochs']:.3g} epochs")
    for part, name in (("train", "rows trained on"), ("evaluation", "rows kept out")):
        if losses["after"][part] is not None:
            say(f"loss on {name}: {losses['before'][part]:.3f} -> {losses['after'][part]:.3f} nats per token")
    say(f"see {trained.path / 'training.png'}")
    files = [str(trained.model), "--data", str(trained.rows), "-c", "id=id"]
    say(f"next: {shlex.join(['whence', 'fit', *files, *reading, '--out', str(trained.path.parent / 'factors')])}")


def _reading(max_length: int, template: str | None, append_eos: bool) -> list[str]:
    """Options with which later commands make the same tokens of the rows."""
    words = [] if max_length == 512 else ["--max-length", str(max_length)]
    words += [] if template is None else ["--template", template]
    return words + (["--append-eos"] if append_eos else [])


def _format(name: str, prompt: str | None, completion: str | None) -> Any:
    """A format by name, or templates of one's own."""
    from whence.settings import Format

    if prompt is None and completion is None:
        return name
    if name != "plain":
        raise UsageError(f"--format {name} has templates already.", fix="leave out --format, or the templates")
    return Format(prompt=prompt or "{prompt}", completion=completion or "{completion}")


def _checked(section: Any, **values: Any) -> Any:
    """Settings, or a UsageError for a value that can't be."""
    from pydantic import ValidationError

    try:
        return section(**values)
    except ValidationError as error:
        (first, *_) = error.errors()
        name = "-".join(str(part) for part in first["loc"][:1]).replace("_", "-")
        raise UsageError(f"--{name} can't be {first['input']}.", accepted=first["msg"]) from None


def _number(text: str, option: str, kind: type, word: str, meaning: Any) -> Any:
    """Read an option that is a number or one word."""
    if text == word:
        return meaning
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{option} {text} is no number.", accepted=f"a number, or {word}") from None


def _values(given: list[str] | None, option: str) -> dict[str, Any]:
    """Read NAME=VALUE options; values are written as in YAML."""
    import yaml

    for entry in given or []:
        if "=" not in entry:
            raise UsageError(f"{option} {entry} has no value.", accepted="NAME=VALUE", fix=f"{option} {entry}=...")
    pairs = (entry.split("=", 1) for entry in given or [])
    return {name: yaml.safe_load(value) for name, value in pairs}
