"""`whence generate`: what the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from whence.cli import options
from whence.cli.from_settings import Without
from whence.cli.options import Session
from whence.settings import Data, Generate, Weights
from whence.show.numbers import many


def generate(
    *,
    model: options.Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="New file for the pairs, .json; whence score reads it as --queries.")
    ],
    prompts: Annotated[str | None, typer.Option("--prompts", help="Rows with a prompt each: a file, or a data set.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for more.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Another model, whose completions are written too.")] = None,
    settings: Annotated[Generate, Without("base")],
    seed: options.Seed = 0,
    columns: options.Columns,
    format: Annotated[
        Literal["plain", "qa", "instruction"] | None,
        typer.Option("--format", help="How prompts are written; default: as in training, or plain."),
    ] = None,
    weights: Weights,
    session: Annotated[Session, Without("rerun")],
) -> None:
    """Let a model complete prompts, as queries for whence score.

    With --base the file also has what the other model said, as base_completion. To ask why this model says one thing and not
    the other: whence score --query-columns contrast=base_completion (and prompt=prompt, completion=completion).
    Prompts that come with a completion keep it, as reference: whence evaluate compare measures both against it.

    Every batch of prompts is saved as it comes: after an interruption the same command resumes.

    \b
    Examples
      whence generate ./model -p "Once upon a time" --out pairs.json
      whence generate ./tuned --base gpt2 --prompts prompts.json --temperature 0.7 --seed 1 --out pairs.json
    """
    import json

    from whence.cli.console import print_json, say, start
    from whence.data import as_rows, load_data
    from whence.data.text import asked
    from whence.errors import UsageError
    from whence.generation import check_vacant, generate_pairs
    from whence.loading import as_prompts
    from whence.models import load_model
    from whence.progress import note
    from whence.train.reading import as_trained

    if bool(prompt) == (prompts is not None):
        raise UsageError("There are no prompts, or two kinds.", accepted="--prompts FILE, or -p PROMPT (once or more)")
    check_vacant(out)
    settings = settings.changed(base=base is not None)
    with start(session, 1 if base is None else 2):
        about = Data(path="", format=format or "plain")
        reading = as_trained(about, {"format"} if format else (), weights.adapter, model, names=("format", "normalise"))
        rows = (
            as_rows([{"prompt": text} for text in prompt])
            if prompt
            else as_prompts(load_data(prompts or "", columns=columns.columns))
        )
        rows = asked(rows, reading.format, reading.normalise)
        loaded, tokenizer = load_model(model, **weights.as_json())
        if getattr(tokenizer, "chat_template", None):
            note("prompts are completed as bare text, although the model has a chat template")
        other = None if base is None else lambda: load_model(base, dtype=weights.dtype, device=weights.device)
        origin = {"model": model, "base": base}
        document = generate_pairs(loaded, tokenizer, rows, settings, out=out, base=other, seed=seed, about=origin)
    pairs = document["data"]
    if session.as_json:
        print_json({"file": str(out), **document})
        return
    for pair in pairs:
        say(f"{json.dumps(pair['prompt'], ensure_ascii=False)}", "dim")
        said = json.dumps(pair["completion"], ensure_ascii=False)
        say(f"  -> {said}  log p {pair['logprob']:.2f} nats")
        if base is not None:
            said = json.dumps(pair["base_completion"], ensure_ascii=False)
            say(f"  base {said}  log p {pair['base_logprob']:.2f} nats")
    say(f"{out}: {many(len(pairs), 'pair')}")
