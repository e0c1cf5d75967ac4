"""What to type in a shell, or in Python, to get what a page shows.

Each answer has a `command` and `python`, None where there is no such thing, and a `note` of what to know of the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whence.escapes import command
from whence.opened import OPENED
from whence.run import SETTINGS, Run
from whence.serve.asked import Asked
from whence.serve.asking import METHODS
from whence.serve.opening import Opening
from whence.serve.requests import Question

CANDIDATES = 100
"""Rows that `whence ask` and `Run.find` score where they are not told how many."""

BY_FACTORS = [name for name in METHODS if name != "dot"]
"""Methods that `whence ask` and `Run.trace` ask by."""

PARTS = "from whence.store.scores import part_of"


class Code(str):
    """Python that stands for a value."""

    __repr__ = str.__str__


class Commands:
    """Of one run."""

    def __init__(self, opening: Opening, run: Run):
        assert run.out is not None, "a run without a folder is refused when it is opened"
        self.opening, self.run, self.out = opening, run, run.out.absolute()

    def question(self, found: Asked, top: int, where: Sequence[str]) -> dict[str, Any]:
        """The rows of a question that meet the conditions `where`."""
        if found.question is not None and found.question.row is not None:
            return _answer(None, None, "No command asks about a training row.")
        shell, note = self._show(found, top, where) if found.question is None else self._ask(found, found.question, top, where)
        conditions = list(where) if self._searches(found) else []
        query = 0 if found.saved is None else found.saved.number
        lines = [] if found.saved else [self._opening]
        lines.append(f"scores = {self._scores(found, conditions)}")
        imports = ["import whence"]
        if where and not conditions:
            lines.append(f"scores = part_of(scores, rows=np.flatnonzero(matching(scores.examples, {list(where)!r})))")
            imports = ["import numpy as np", *imports, "from whence.filter.where import matching", PARTS]
        lines += [f"print(scores.top({query}, {top}))", f"print(scores.top({query}, {top}, lowest=True))"]
        return _answer(shell, _script(imports, lines), note)

    def _ask(self, found: Asked, asked: Question, top: int, where: Sequence[str]) -> tuple[str | None, str]:
        """The command that asks the model, and what to know of it."""
        if asked.method not in BY_FACTORS:
            return None, "No command asks a single question by this method: copy it as Python."
        if not self._opens_alone:
            return None, f"{self.out} does not yet say which model and data it belongs to."
        indexed = "index" in vars(self.run)
        if indexed and not self._searches(found):
            return None, "whence ask reads an index of landmarks, made with the factors and the damping of the question."
        options: dict[str, Any] = {"answer": asked.completion, "contrast": asked.contrast}
        if asked.span is not None:
            span = _span(asked)
            options |= {"span": span} if isinstance(span, str) else {"span-at": ",".join(map(str, span))}
        options |= {**self._differs(asked), **_candidates(found)}
        words: list[Any] = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        words += [word for condition in where for word in ("--where", condition)]
        words += ["--top", top]
        places: list[Any] = [self.out, asked.prompt]
        words = [*words, "--", *places] if asked.prompt.startswith("-") else [*places, *words]
        return command("whence", "ask", *words), "" if indexed else "The command builds an index first, once."

    def _show(self, found: Asked, top: int, where: Sequence[str]) -> tuple[str | None, str]:
        """The command that shows saved scores, and what to know of it."""
        saved = found.saved
        assert saved is not None
        staged = bool(found.stages and not found.stage)
        if staged and where:
            return None, "whence show takes conditions on the rows of one training: choose a stage."
        conditions = [word for condition in where for word in ("--where", condition)]
        words = [saved.folder.absolute(), "--query", saved.name, *conditions, "--top", top, "--lowest"]
        return command("whence", "show", *words), "The command shows the rows of each training by themselves." if staged else ""

    def comparison(self, a: Asked, b: Asked, top: int, in_common: bool) -> dict[str, Any]:
        """Two questions side by side; without rows `in_common`, one after the other."""
        lines = [] if a.saved and b.saved else [self._opening]
        for name, found in (("a", a), ("b", b)):
            scores = self._scores(found, every=True)
            lines.append(f"{name} = {scores if found.saved is None else f'part_of({scores}, [{found.saved.number}])'}")
        imports = ["import whence", *([PARTS] if a.saved or b.saved else [])]
        if in_common:
            imports = ["from dataclasses import replace", "", *imports, "from whence.validate.agreement import agreement"]
            lines.append('found = agreement(*(replace(each, queries=each.queries.assign(id="asked")) for each in (a, b)))')
            lines += ["print(found.means())", f"print(found.moved(0, {top}))"]
        else:
            tops = (f"each.top(0, {top})", f"each.top(0, {top}, lowest=True)")
            lines += ["for each in (a, b):", *(f"    print({rows})" for rows in tops)]
        if any(each.scan["how"] == "index" for each in (a, b)):
            lines.insert(0, "# This scores all rows; the page scored those that the index proposed.")
        shell, note = _diff(a, b, top)
        return _answer(shell, _script(imports, lines), note)

    def factors(self, home: Path, damping: float, module: str = "") -> dict[str, Any]:
        """The health of all modules, or of one."""
        chosen = ("--module", module) if module else ()
        lines = [f"for found in health(whence.open_factors({str(home.absolute())!r}), damping={damping!r}):"]
        lines += [f"    if found.module == {module!r}:", "        print(found)"] if module else ["    print(found)"]
        python = _script(["import whence", "from whence.fitting.health import health"], lines)
        return _answer(command("whence", "inspect", home.absolute(), *chosen, "--damping", damping), python)

    def rows(
        self,
        home: Path | None,
        offset: int,
        limit: int,
        sort: str,
        search: str = "",
        source: str | None = None,
        decided: str = "any",
    ) -> dict[str, Any]:
        """Training rows, as `whence.serve.rows.Browser.page` is asked for them; `home` has their self-influence."""
        imports = ["import whence", "from whence.store.scores import row_text"]
        words, last = search.casefold().split(), offset + limit
        lines = [self._opening, "rows = dict(zip(run.all_rows.ids, run.all_rows))"]
        meet = [] if source is None else [f"row.get('source') == {source!r}"]
        meet += [f"({word!r} in row_text(row).casefold() or {word!r} == name.casefold())" for word in words]
        if decided != "any":
            imports.append("from whence.serve.decisions import FILE, Decisions")
            lines.append("decided = Decisions(run.out / FILE).current()")
            among = {"yes": "name in decided", "no": "name not in decided"}
            meet.append(among.get(decided, f"decided.get(name, {{}}).get('verdict') == {decided!r}"))
        lines.append(f"names = [name for name, row in rows.items(){' if ' if meet else ''}{' and '.join(meet)}]")
        if sort == "length":
            lines.append("names.sort(key=lambda name: -len(row_text(rows[name])))")
        if sort == "self" and home is not None:
            lines.append(f"scores = whence.open_scores({str(home.absolute())!r})")
            lines.append("values = dict(zip(scores.example_ids, scores.values_of(0)))")
            lines.append('names.sort(key=lambda name: -values.get(name, float("-inf")))')
        lines += [f"for name in names[{offset}:{last}]:", "    print(name, row_text(rows[name])[:100])"]
        shell, note = None, "No command lists rows in this order: copy it as Python."
        if sort == "self" and home is not None:
            conditions = [*([] if source is None else [f"source={source}"]), *(f"text~{word}" for word in words)]
            where = [word for condition in conditions for word in ("--where", condition)]
            shell = command("whence", "show", home.absolute(), *where, "--top", last)
            note = "" if decided == "any" else "The command shows rows whatever was decided about them."
        return _answer(shell, _script(imports, lines), note)

    # parts of the above

    @property
    def _opens_alone(self) -> bool:
        """Whether the folder says itself of which model and data it is."""
        return any((self.out / name).is_file() for name in (OPENED, SETTINGS))

    def _searches(self, found: Asked) -> bool:
        """Whether the question is answered through an index in Python, too."""
        index = vars(self.run).get("index")
        if index is None or index.kind != "landmarks":
            return False
        return index.about["operator"]["label"] == found.scores.about.get("operator")

    def _scores(self, found: Asked, where: Sequence[str] = (), *, every: bool = False) -> str:
        """The scores of a question in Python: with `every`, of all rows where an index would find some."""
        if found.saved is not None:
            staged = f"whence.open_stages({str(found.saved.folder.absolute())!r}).total()"
            return staged if found.stages and not found.stage else f"whence.open_scores({str(found.saved.folder.absolute())!r})"
        asked = found.question
        assert asked is not None
        words, own = (asked.prompt, asked.completion), self._differs(asked)
        parts: dict[str, Any] = {"contrast": asked.contrast, "span": None if asked.span is None else _span(asked)}
        asking = Code(_call("run.asking.changed", **own)) if own else None
        if asked.method not in BY_FACTORS:
            method = "gradient-dot" if asked.method == "dot" else asked.method
            return _call("run.score", Code(_call("run.question", *words, **parts)), method=method, asking=asking)
        if self._searches(found) and not every:
            found_by = _call("run.find", *words, **parts, asking=asking, **_candidates(found), where=list(where) or None)
            return f"{found_by}.scores"
        return _call("run.trace", *words, **parts, asking=asking)

    def _differs(self, asked: Question) -> dict[str, Any]:
        """What is asked otherwise than the run asks by itself."""
        usual = self.run.asking
        return {name: own for name in ("damping", "measurement") if (own := getattr(asked, name)) != getattr(usual, name)}

    @property
    def _opening(self) -> str:
        """The line of Python that opens the run."""
        if self._opens_alone:
            return f"run = {_call('whence.open', str(self.out))}"
        given = {"data": self.opening.data, "out": str(self.out), **self.opening.settings}
        return f"run = {_call('whence.open', self.opening.model, **given)}"


def _answer(shell: str | None, python: str | None, note: str = "") -> dict[str, Any]:
    return {"command": shell, "python": python, "note": note}


def _script(imports: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([*imports, "", *lines]) + "\n"


def _diff(a: Asked, b: Asked, top: int) -> tuple[str | None, str]:
    """The command that compares saved scores, and what to know of it."""
    if a.saved and b.saved and a.stage and b.stage and a.stage != b.stage:
        homes = [each.saved.folder.parent.parent.absolute() for each in (a, b) if each.saved]
        if homes[0] == homes[1] and a.saved.number == b.saved.number:
            return command("whence", "show", homes[0], "--query", a.saved.name, "--top", top, "--lowest"), ""
    elif a.saved and b.saved and a.saved.folder != b.saved.folder and a.scores.query_ids == b.scores.query_ids:
        folders = [each.absolute() for each in (a.saved.folder, b.saved.folder)]
        return command("whence", "diff", *folders, "--top", top), "The command compares all questions that both have."
    return None, "whence diff compares the same questions in two folders of scores: copy this as Python."


def _span(asked: Question) -> str | tuple[int, int]:
    """The part that is asked about: as text, or by its characters where the text's first occurrence is another one."""
    assert asked.span is not None and asked.completion is not None
    first, last = asked.span
    text = asked.completion[first:last]
    return text if last <= len(asked.completion) and asked.completion.find(text) == first else (first, last)


def _candidates(found: Asked) -> dict[str, int]:
    """How many rows to score exactly, where that is all of them."""
    rows = found.scan["rows"]
    return {"candidates": rows} if found.scan["how"] == "all" and rows > CANDIDATES else {}


def _call(function: str, *arguments: Any, **named: Any) -> str:
    """A call in Python, without what is None."""
    words = [*map(repr, arguments), *(f"{name}={value!r}" for name, value in named.items() if value is not None)]
    return f"{function}({', '.join(words)})"
