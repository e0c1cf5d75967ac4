"""YAML that comes from anywhere: read as `yaml.safe_load` does, but for what would never end or take all memory."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST = 100_000
"""Values that a document may have once its aliases are written out."""

EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]\d+")
"""A number such as 5e-5, which is text in YAML 1.1. Without a sign it may be the hash of a commit."""


class Unreadable(ValueError):
    """Text that is not YAML, or not YAML that anybody writes."""


def load_yaml(text: str) -> Any:
    """Read YAML; raises Unreadable for what is not YAML, is nested too deeply, or repeats itself without end."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if (values := _written_out(root, {})) > MOST:
            raise Unreadable(f"its aliases expand to {values:,} values (at most {MOST:,})")
        return loader.construct_document(root)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise Unreadable(str(error).replace("\n", " ")) from error


def value_of(text: str) -> Any:
    """Read a value that is given outside of a file: as YAML, or as the text itself where it is not YAML."""
    if EXPONENT.fullmatch(text):
        return float(text)
    try:
        return load_yaml(text)
    except Unreadable:
        return text


def _written_out(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many values a node stands for, its aliases written out; `counts` remembers those of nodes, and 0 while at one."""
    known = counts.get(id(node))
    if known == 0:
        raise Unreadable(f"line {node.start_mark.line + 1} contains itself")
    if known is None:
        counts[id(node)] = 0
        below = node.value if isinstance(node.value, list) else []
        parts = [part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,))]
        known = counts[id(node)] = 1 + sum(_written_out(part, counts) for part in parts)
    return known
