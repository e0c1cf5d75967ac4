"""Options that several commands share, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from whence.errors import UsageError

File = Annotated[Path, typer.Argument(metavar="[FILE]", help="The settings of the run, whence.yaml.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting over the file's, such as score.damping=0.2; repeat for more."),
]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder of a model, or folder of a LoRA adapter.")]
Adapter = Annotated[str | None, typer.Option("--adapter", help="LoRA adapter to put on MODEL.")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer, for models that come without.")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Number format of the model: float32, bfloat16, float16, float64."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; the GPU if there is one.")]

Data = Annotated[str, typer.Option("--data", "-d", help="Training data: file, folder of save_to_disk, or data set of the hub.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", "-c", metavar="PART=COLUMN", help="Such as prompt=Input; repeat for each part."),
]
Split = Annotated[str, typer.Option("--split", help="Split of a data set that has several.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Read only the first rows.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, metavar="N", help="Tokens at which a row is cut.")]
Template = Annotated[str | None, typer.Option("--template", help="Chat template: chatml, or one in Jinja.")]
AppendEos = Annotated[bool, typer.Option("--append-eos", help="End rows with the end-of-text token, as in training.")]

Method = Annotated[str, typer.Option("--method", help="ekfac, kfac, shampoo, diagonal or identity.")]
Modules = Annotated[
    str | None,
    typer.Option("--modules", "-m", help="mlp, attention, all, lora, last-K, or globs on names, joined by commas."),
]
Examples = Annotated[
    str | None,
    typer.Option("--examples", metavar="N|all", help="Rows to fit the factors on; if not said, enough for steady scores."),
]
Labels = Annotated[
    Literal["model", "data"], typer.Option("--labels", help="Labels drawn from the model (true Fisher), or the data's own.")
]
Draws = Annotated[
    int,
    typer.Option(
        "--draws", min=1, metavar="N", help="Labels drawn for each row: less noise where rows are few, N times the cost."
    ),
]
Damping = Annotated[
    float, typer.Option("--damping", min=0, metavar="X", help="Damping, in units of each module's mean eigenvalue.")
]
Measurement = Annotated[
    Literal["logprob", "margin", "loss"],
    typer.Option("--measurement", help="What is asked about the answer: its log-probability, log-odds, or loss."),
]
Rank = Annotated[str, typer.Option("--rank", help="Rank of the queries' gradients: a number, full or auto.")]
Rescore = Annotated[
    int,
    typer.Option("--rescore", min=0, metavar="N", help="Compute each query's K highest and lowest scores again at full rank."),
]
Norms = Annotated[
    list[str] | None,
    typer.Option("--norm", metavar="NORM", help="Also compute what normalising needs: cosine or relatif; repeat for both."),
]
Norm = Annotated[
    Literal["cosine", "relatif", "length"] | None,
    typer.Option("--norm", help="Divide by what makes long or odd rows score high."),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens to generate at most.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn.")]

BatchTokens = Annotated[
    int | None,
    typer.Option("--batch-tokens", min=1, help="Positions per batch; halved by itself if it does not fit."),
]
Groups = Annotated[
    int,
    typer.Option("--groups", min=1, metavar="N", help="Groups of modules fitted one after the other: less memory."),
]
Chunks = Annotated[
    int,
    typer.Option("--chunks", min=1, metavar="N", help="Parts of the data after which the work is saved."),
]
Format = Literal["float64", "float32", "bfloat16", "float16"]

Products = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option("--products", help="Format to multiply in; auto takes bfloat16 where it is fast and hardly moves scores."),
]

Top = Annotated[int, typer.Option("--top", "-k", min=1, metavar="N", help="Rows to show that raise it most.")]
Rerun = Annotated[bool, typer.Option("--rerun", help="Move a folder made from something else aside and start again.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, notes or warnings.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also what the libraries beneath say.")]


def mapping(options: list[str] | None) -> dict[str, str]:
    """Read PART=COLUMN options."""
    for option in options or []:
        if "=" not in option:
            raise UsageError(
                f"--columns {option} names no column.", accepted="PART=COLUMN", fix="for example --columns prompt=Input"
            )
    return dict(option.split("=", 1) for option in options or [])


def rank_of(text: str) -> int | None | Literal["auto"]:
    """Read --rank."""
    if text == "auto":
        return "auto"
    if text == "full":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--rank {text} is no rank.", accepted="a number above zero, full, or auto")
    return int(text)


def sample_of(text: str | None, option: str) -> Literal["all"] | int | None:
    """Read the size of a sample."""
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{option} {text} is no number of rows.", accepted="a number above zero, or all")
    return int(text)
