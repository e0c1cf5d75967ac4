"""The settings of a run: what a `whence.yaml` may say, and how it is read and written."""

from whence.config.read import Resolved, checked, read_config, resolve
from whence.config.schema import Config, runs_of
from whence.config.write import commented, json_schema

__all__ = ["Config", "Resolved", "checked", "commented", "json_schema", "read_config", "resolve", "runs_of"]
