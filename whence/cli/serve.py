"""`whence serve`: a local page on a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whence.cli import options
from whence.settings import Data, Weights

if TYPE_CHECKING:
    from whence.serve import Opening

WIDE = "everybody-with-the-address"


def serve(
    *,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder of a run, a whence.yaml, or a model (with --data).", show_default=False)
    ],
    path: options.DataOrNone = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run, for a model with --data; default: runs/MODEL-DATA.")
    ] = None,
    port: Annotated[int, typer.Option("--port", help="Port; the next free one where it is busy, any for 0.")] = 7788,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this machine's need --reachable-by.")
    ] = "127.0.0.1",
    reachable_by: Annotated[
        str | None,
        typer.Option("--reachable-by", metavar=WIDE.upper(), help=f"Give {WIDE} if --host lets other machines in."),
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
    data: Data,
    weights: Weights,
) -> None:
    """Open a local page on a run: ask the model, and see which training rows made it say that.

    Model, factors and index are loaded once and stay. The address that is printed holds a token; without it nobody is
    answered, and no other machine is contacted. Long work is done by jobs, which continue when the page or the server is
    closed. Values are slopes of log p(answer), in nats per copy of a row: first-order estimates.

    \b
    Examples
      whence serve runs/patents
      whence serve ./model --data train.jsonl
      whence serve runs/patents --port 8000 --no-browser
    """
    from whence.errors import UsageError
    from whence.escapes import command
    from whence.opened import is_model
    from whence.serve import Opening
    from whence.serve.guard import LOCAL

    if host not in LOCAL and reachable_by != WIDE:
        raise UsageError(
            f"--host {host} lets other machines ask, and their traffic can be read on the way.",
            accepted=f"127.0.0.1, reached from elsewhere by ssh -L; or --reachable-by {WIDE}",
        )
    if not path and not Path(run).expanduser().exists():
        raise UsageError(f"There is no {run}.", accepted="a folder of a run, a whence.yaml, or a model with --data")
    opening = Opening.of(run, path or None, str(out) if out is not None else None, options.reading_said(data, weights))
    if opening.data is None and not options.says_itself(run):
        model = is_model(run)
        raise UsageError(
            f"{run} does not say which {'data it was trained on' if model else 'model and data it belongs to'}.",
            accepted="the folder of a run by whence run, trace, fit or demo; a model with --data",
            fix=command("whence", "serve", *([run, "--data", "DATA"] if model else ["MODEL", "--data", "DATA", "--out", run])),
        )
    open_page(opening, port, host, browser=not no_browser)


def open_page(opening: Opening, port: int = 7788, host: str = "127.0.0.1", *, at: str = "", browser: bool = True) -> None:
    """Serve a run, and open it in a browser, until Ctrl-C; `at` is what the page shows first, see `whence.serve.serve`."""
    import os
    import webbrowser

    from whence.cli.console import say
    from whence.serve import serve

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read on import, which the server's thread and its jobs do
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    serve(opening, port, host, at=at, said=say, opened=webbrowser.open if browser else lambda address: None)
