"""What the documentation takes from elsewhere when it is built.

The settings of `whence.yaml` come from `whence.settings`, so that the page can't go stale; the tutorial is run, and shows what
it said; the changelog and the benchmark's results lie outside of docs/; formulas become MathML, so that readers' browsers
fetch nothing.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import re
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

BESIDE = {
    "changelog.md": "CHANGELOG.md",
    "benchmarks/results/small.md": "benchmarks/results/small.md",
    "benchmarks/results/small.png": "benchmarks/results/small.png",
    "benchmarks/results/full.md": "benchmarks/results/full.md",
    "benchmarks/results/full.png": "benchmarks/results/full.png",
    "benchmarks/results/gpu.md": "benchmarks/results/gpu.md",
    "benchmarks/results/quality.md": "benchmarks/results/quality.md",
    "benchmarks/results/quality.png": "benchmarks/results/quality.png",
    "benchmarks/results/methods.md": "benchmarks/results/methods.md",
    "benchmarks/results/damping.md": "benchmarks/results/damping.md",
    "benchmarks/results/refinement.md": "benchmarks/results/refinement.md",
    "benchmarks/results/funnel.md": "benchmarks/results/funnel.md",
    "benchmarks/results/stages.md": "benchmarks/results/stages.md",
    "benchmarks/results/prove.md": "benchmarks/results/prove.md",
    "benchmarks/outside/results/facts.md": "benchmarks/outside/results/facts.md",
    "benchmarks/outside/results/mnist-lr.md": "benchmarks/outside/results/mnist-lr.md",
    "benchmarks/outside/results/mnist-mlp.md": "benchmarks/outside/results/mnist-mlp.md",
    "benchmarks/outside/results/adamw-text.md": "benchmarks/outside/results/adamw-text.md",
    "benchmarks/outside/results/adamw-lm.md": "benchmarks/outside/results/adamw-lm.md",
}
"""Files of the repository that the site shows, by their place in it."""

SETTINGS = "<!-- settings -->"
"""Stands in a page where the tables of all settings go."""

NAMED = "[...]"
"""Of a setting that is a list of sections."""

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

STYLED = re.compile(r'<mi mathvariant="(double-struck|script)">([A-Z])</mi>')


def on_files(files: Any, config: Any) -> Any:
    """Add what lies beside docs/."""
    from mkdocs.structure.files import File

    for place, source in BESIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    page, notebook = tutorial((ROOT / "docs" / "tutorial.py").read_text(encoding="utf-8"))
    files.append(File.generated(config, "tutorial.md", content=page))
    files.append(File.generated(config, "tutorial.ipynb", content=notebook))
    files.append(File.generated(config, "gallery.html", content=gallery()))
    return files


@functools.cache
def gallery() -> bytes:
    """The page of `whence serve` with questions to a small world, as one file: what its export gives."""
    import whence
    from whence.data import as_rows
    from whence.demo.model import teach
    from whence.demo.world import make_world
    from whence.serve import Opening
    from whence.serve.export import page
    from whence.serve.requests import Question
    from whence.serve.warm import Warm

    with tempfile.TemporaryDirectory(prefix="whence-gallery-") as scratch:
        home, world = Path(scratch), make_world(people=24, questions=3)
        (home / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.rows), encoding="utf-8")
        teach(as_rows(world.rows), home / "model")
        reading = {"max_length": 32, "append_eos": True}
        whence.open(home / "model", data=home / "corpus.jsonl", out=home / "demo", **reading).fit(examples="all")
        warm = Warm(Opening(str(home / "model"), str(home / "corpus.jsonl"), str(home / "demo"), reading), lambda: None)
        warm.start().result()
        assert warm.asking is not None, warm.error

        def made() -> bytes:
            asked = [warm.ask(Question(prompt=question.prompt, top=10)) for question in world.questions]
            documents = [warm.asking.document(each, 10) for each in asked]
            firsts = [(each, document["query"]["raises"][0]["id"]) for each, document in zip(asked, documents, strict=True)]
            pairs = {f"{each.key} {row}": warm.asking.pair(each, row) for each, row in firsts}
            said = {"folder": "runs/demo", "title": "Questions to a small made-up world"}
            facts = warm.facts() | said
            facts["model"] |= {"name": "the demo's model"}
            facts["data"] |= {"path": "corpus.jsonl"}
            return page(facts, documents, pairs, [], False)

        try:
            return warm.worker.submit(made).result()
        finally:
            warm.close()


@functools.cache
def tutorial(source: str) -> tuple[str, str]:
    """The tutorial as a page and as a notebook, with what its cells said: about half a minute of processor time."""
    spec = importlib.util.spec_from_file_location("docs_notebook", ROOT / "docs" / "notebook.py")
    assert spec and spec.loader
    notebook = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebook)
    cells = notebook.run(source)
    return notebook.as_page(cells), notebook.as_notebook(cells)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the settings in their place, and lead links out of docs/ to where the site has the file."""
    if SETTINGS in markdown:
        from whence.config import json_schema

        markdown = markdown.replace(SETTINGS, settings(json_schema()))
    for place, source in BESIDE.items():
        markdown = markdown.replace(f"](../{source})", f"]({place})")
    return markdown


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Turn TeX into MathML."""
    return FORMULA.sub(_formula, content)


def _formula(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    tag, opening, tex = found.groups()
    spaced = html.unescape(tex).strip().replace(r"\log ", r"\,\log\,")  # TeX leaves room around a function's name
    drawn = STYLED.sub(_letter, convert(spaced, display="block" if opening == "[" else "inline"))
    return f'<div class="math-block">{drawn}</div>' if tag == "div" else drawn


def _letter(found: re.Match[str]) -> str:
    """A styled letter by its own code point, since browsers no longer style others (MathML Core)."""
    style, letter = found[1].upper(), found[2]
    for name in (f"MATHEMATICAL {style} CAPITAL {letter}", f"{style} CAPITAL {letter}"):
        try:
            return f"<mi>{unicodedata.lookup(name)}</mi>"
        except KeyError:  # a few letters are in the other block
            continue
    return found[0]


# settings


def settings(schema: dict[str, Any]) -> str:
    """Every setting of a JSON schema as Markdown: a heading and a table for each section, in their order."""
    return "\n\n".join(_section("", schema, schema))


def _section(path: str, section: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """The section's table, then those of the sections in it; of an entry of a list its own."""
    inner = {
        f"{path}.{name}".strip(".") + NAMED * ("items" in about): found
        for name, about in _fields(section)
        if (found := _within(about, schema))
    }
    required = section.get("required", [])
    rows = [
        f"| `{name}` | {_takes(about, schema)} | {'*required*' if name in required else _default(about)} | "
        f"{_cell(about.get('description') or (_within(about, schema) or {}).get('description', ''))} |"
        for name, about in _fields(section)
    ]
    head = [f"### `{path}`" if path else "### Top level", section.get("description", "")]
    table = "\n".join(["| setting | takes | default | meaning |", "|---|---|---|---|", *rows])
    if path.endswith(NAMED):
        return [*head, table]
    return [*head, table, *(part for name, found in inner.items() for part in _section(name, found, schema))]


def _fields(section: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(section.get("properties", {}).items())


def _within(about: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a setting holds, or may hold."""
    for option in [about, *about.get("anyOf", []), about.get("items", {})]:
        if "$ref" in option:
            return schema["$defs"][option["$ref"].rpartition("/")[2]]
    return None


def _takes(about: dict[str, Any], schema: dict[str, Any]) -> str:
    """What may be written, in words."""
    if options := about.get("anyOf"):
        return ", ".join(dict.fromkeys(_takes(option, schema) for option in options))
    if "$ref" in about:
        return "section"
    if "enum" in about or "const" in about:
        return ", ".join(f"`{value}`" for value in about.get("enum", [about.get("const")]))
    kind = about.get("type")
    if kind in ("integer", "number"):
        return {"integer": "whole number", "number": "number"}[kind] + _bounds(about)
    if kind == "array":
        each = about.get("items") or (about.get("prefixItems") or [{}])[0]
        return f"list of {_takes(each, schema)}"
    if kind == "object":
        return "mapping"
    return {"string": "text", "boolean": "true, false", "null": "null"}.get(str(kind), "anything")


def _bounds(about: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {about[key]:g}" for key, sign in words.items() if key in about)


def _default(about: dict[str, Any]) -> str:
    value = about.get("default")
    if value is None:
        return "-"
    if isinstance(value, dict) and value:
        return "its own defaults"
    if isinstance(value, list) and value:
        return ", ".join(f"`{item}`" for item in value)
    return "empty" if value in ([], {}) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
