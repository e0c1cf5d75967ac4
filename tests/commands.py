"""All commands of whence, assembled once: that takes longer than most of them."""

import functools

import typer.testing

from whence import cli

assembled = functools.cache(cli.build)

typer.testing._get_command = functools.cache(typer.testing._get_command)  # which assembles them a second time
