"""Look at data before anything is computed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whence.cli import options
from whence.cli.from_settings import said
from whence.settings import Data
from whence.show.numbers import many


def preview(
    *,
    path: Annotated[str, typer.Argument(help="File, folder of save_to_disk, or data set of the hub.")],
    model: Annotated[str, typer.Option("--model", help="Model whose tokenizer reads the rows; no weights are loaded.")],
    n: Annotated[int, typer.Option("--top", "-k", "--n", "-n", min=0, metavar="N", help="Rows to show.")] = 5,
    data: Data,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show rows as the model sees them: what is in the loss is coloured, or ⟦marked⟧ where there are no colours."""
    from whence.cli.console import coloured, out, print_json, reporting
    from whence.loading import rows_of
    from whence.models import load_tokenizer
    from whence.progress import note
    from whence.tasks import CausalLM
    from whence.train.reading import as_trained

    with reporting(quiet=quiet):
        data = as_trained(data, said(), model)
        reading = {"chat_template": data.chat_template, "append_eos": data.append_eos}
        task = CausalLM(load_tokenizer(model), data.max_length, **reading)
        rows = rows_of(data)
        items = task.tokenize(rows)
        limit = _context(model)
        longer = [
            (task.size(item), name) for item, name in zip(items, rows.ids, strict=True) if limit and task.size(item) > limit
        ]
        if longer and limit:
            length, name = max(longer)
            made = (
                f"the {limit:,} tokens that the model was made for: {name} has {length:,}; --max-length {limit} cuts them there"
            )
            note(f"warning: {len(longer):,} of {len(rows):,} rows are longer than {made}")
    summary = _summary(task, rows, items)
    shown = [_row(task, rows, items[i], i) for i in range(min(n, len(rows)))]
    if as_json:
        print_json({"summary": summary, "rows": shown})
        return
    for row in shown:
        kept, in_loss = len(row["tokens"]), sum(token["in_loss"] for token in row["tokens"])
        source = f"  {row['source']}" if row["source"] else ""
        cut = f", cut from {row['length']:,}" if row["length"] > kept else ""
        heading = f"row {row['row']}  {row['id']}{source}  {many(kept, 'token')}, {in_loss:,} in the loss{cut}"
        out.print(heading, markup=False, style="bold", soft_wrap=True)
        out.print(_text(row, coloured()), soft_wrap=True)
        out.print()
    counted = (
        f"{many(summary['rows'], 'row')}, {many(summary['tokens'], 'token')}, {summary['in_loss']:,} in the loss; "
        f"{many(summary['truncated'], 'row')} truncated at {summary['max_length']} (longest {summary['longest']:,}), "
        f"{many(summary['copies'], 'exact copy', 'exact copies')}, {summary['empty']:,} without a token in the loss"
    )
    out.print(counted, markup=False, soft_wrap=True)


def _context(model: str) -> int | None:
    """The tokens that the model was made for; None where it doesn't say, or where there is only a tokenizer."""
    from transformers import AutoConfig

    from whence.tasks.context import length_in

    try:
        return length_in(AutoConfig.from_pretrained(model, trust_remote_code=False))
    except (OSError, ValueError):
        return None


def _summary(task: Any, rows: Any, items: list[Any]) -> dict[str, int]:
    """Count rows and tokens, and what is lost or duplicated."""
    return {
        "rows": len(rows),
        "tokens": sum(len(item.ids) for item in items),
        "in_loss": sum(int(item.in_loss.sum()) for item in items),
        "truncated": sum(item.length > task.max_length for item in items),
        "longest": max(item.length for item in items),
        "max_length": task.max_length,
        "copies": len(rows) - round(sum(1 / copies for copies in rows.copies)),
        "empty": sum(task.size(item) == 0 for item in items),
    }


def _row(task: Any, rows: Any, item: Any, index: int) -> dict[str, Any]:
    """Describe one row for people and for JSON; `special` tells tokens that spell nothing in the text."""
    specials = set(task.tokenizer.all_special_ids)
    tokens = []
    for token, (piece, in_loss) in zip(item.ids.tolist(), task.display(item), strict=True):
        special = not piece and token in specials
        text = task.tokenizer.convert_ids_to_tokens(token) if special else piece
        tokens.append({"text": text, "in_loss": in_loss, "special": special})
    return {
        "row": index + 1,
        "id": rows.ids[index],
        "source": rows[index].get("source"),
        "length": item.length,
        "tokens": tokens,
    }


def _text(row: dict[str, Any], coloured: bool) -> Any:
    """Join the tokens to a text where the loss can be seen, in colour or between brackets."""
    from rich.text import Text

    from whence.escapes import visible

    text, inside = Text(), False
    for token in row["tokens"]:
        if not coloured and token["in_loss"] != inside:
            text.append("⟦" if token["in_loss"] else "⟧")
        inside = token["in_loss"]
        text.append(visible(token["text"]), ("green" if inside else "dim") + (" italic" if token["special"] else ""))
    if not coloured and inside:
        text.append("⟧")
    return text
