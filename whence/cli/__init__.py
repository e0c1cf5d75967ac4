"""The command line: `whence COMMAND ...`.

A command is a function here; it imports what is heavy in its body and is listed in `COMMANDS`. A parameter of it that is a
section of settings stands for the section's options (`whence.cli.from_settings`).
Results go to stdout, all else to stderr. Exit codes: 0 done, 1 failed, 2 usage, 3 does not fit, 4 stale artefacts,
130 interrupted (the same command resumes).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from whence import dist
from whence.cli.from_settings import as_settings, from_settings
from whence.errors import WhenceError
from whence.escapes import command as command_line
from whence.progress import as_told
from whence.shortage import shortage
from whence.version import __version__

COMMANDS = {
    "demo": "whence.cli.demo:demo",
    "trace": "whence.cli.trace:trace",
    "init": "whence.cli.init:init",
    "run": "whence.cli.run:run",
    "recipes ls": "whence.cli.recipes:ls",
    "recipes cat": "whence.cli.recipes:cat",
    "recipes cp": "whence.cli.recipes:cp",
    "config show": "whence.cli.config:show",
    "config schema": "whence.cli.config:schema",
    "train": "whence.cli.train:train",
    "data preview": "whence.cli.data:preview",
    "generate": "whence.cli.generate:generate",
    "plan": "whence.cli.plan:plan",
    "fit": "whence.cli.fit:fit",
    "inspect": "whence.cli.inspect:inspect",
    "score": "whence.cli.score:score",
    "methods ls": "whence.cli.methods:ls",
    "methods show": "whence.cli.methods:show",
    "compare": "whence.cli.compare:compare",
    "mirror": "whence.cli.mirror:mirror",
    "show": "whence.cli.show:show",
    "diff": "whence.cli.compare:diff",
    "index build": "whence.cli.index:build",
    "index search": "whence.cli.index:search",
    "index add": "whence.cli.index:add",
    "ask": "whence.cli.ask:ask",
    "evaluate benchmark": "whence.cli.evaluate:benchmark",
    "evaluate compare": "whence.cli.evaluate:compare",
    "validate": "whence.cli.validate:validate",
    "export": "whence.cli.show:export",
    "report": "whence.cli.report:report",
    "serve": "whence.cli.serve:serve",
    "verify": "whence.cli.verify:verify",
    "doctor": "whence.cli.doctor:doctor",
    "explain": "whence.cli.explain:explain",
}
"""Where each command lives; a name of two words ("data preview") makes a group."""

SHARED = {"fit", "score", "compare", "mirror", "trace", "run", "index build", "index add", "validate"}
"""Commands whose work several processes share out; of validate that of a run's retraining."""

HELP = """Which training examples made the model say that, by how much, and how far can you trust the answer?

A score above 0 means: more copies of the training example raise the log-probability of the answer. It is the slope at these
weights, in nats per copy: a first-order estimate."""


def main() -> None:
    """Run the command that the arguments name; in several processes where torchrun starts them."""
    gc.set_threshold(700, 10, 100)  # torch and transformers make a million objects that stay: looking through them takes .5 s
    if dist.world() == 1:
        build()(prog_name="whence")
        return
    from whence.cli.console import as_one

    with as_one():
        build()(prog_name="whence")


def build() -> typer.Typer:
    """Assemble the commands; the modules they live in are light to import."""
    app = _group(HELP)
    app.callback()(_root)
    groups: dict[str, typer.Typer] = {}
    for name, home in COMMANDS.items():
        module, function = home.split(":")
        *group, verb = name.split()
        parent = app
        if group:
            (noun,) = group
            if noun not in groups:
                groups[noun] = _group(importlib.import_module(module).__doc__)
                groups[noun].callback()(_no_options)
                app.add_typer(groups[noun], name=noun)
            parent = groups[noun]
        parent.command(verb, cls=_Command)(_guarded(from_settings(getattr(importlib.import_module(module), function)), name))
    return app


FORMER = {"-q": "--quiet", "-m": "--model"}
"""Short options that meant something else in other commands, no longer shown: scripts may still use them."""


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {flag for option in self.params for flag in option.opts}
        former = {short: long for short, long in FORMER.items() if short not in own and long in own}
        return super().parse_args(ctx, [former.get(word, word) for word in args])


def _group(text: str | None) -> typer.Typer:
    """A group of commands; its help is plain text, which is quick and can be copied."""
    options = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings=options,
        rich_markup_mode=None,
    )


def _version(asked: bool) -> None:
    if asked:
        print(f"whence {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def _no_options() -> None:
    """Keep a group with one command a group."""


def _guarded(command: Callable[..., None], name: str) -> Callable[..., None]:
    """Turn a user's mistake into its message and exit code, and Ctrl-C into how to resume; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(*arguments: object, context: typer.Context, **options: object) -> None:
        try:
            if name not in SHARED:
                dist.only_one_process(f"whence {name}")
            with as_told():  # commands with work to show say where (whence.cli.console.start)
                command(*arguments, context=context, **options)
            sys.stdout.flush()
        except Exception as raised:
            error = shortage(raised) or raised
            if not isinstance(error, WhenceError):
                raise
            own = {flag for option in context.command.params for flag in option.opts}
            if "--set" in own:  # its settings are in a file
                error.fix = as_settings(error.fix, own)
            with contextlib.suppress(OSError):
                print(error, file=sys.stderr)
            _drop_output()
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            again = command_line("whence", *sys.argv[1:])
            print(f"\ninterrupted; what was finished is kept. Continue: {again}", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


def _drop_output() -> None:
    """Drop what stdout does not take, or Python fails again when it ends, with its own exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
