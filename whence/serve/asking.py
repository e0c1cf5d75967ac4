"""Questions to a model that stays warm: answers with their tokens, the rows behind them, and what other rows would do.

Everything here runs in one thread, one question after the other. What comes out is the report's document of one question
(`whence.report.model.Query`) with what a page needs besides.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from whence.coverage import cover
from whence.data import Rows, as_rows
from whence.data.load import places
from whence.data.rows import with_contents
from whence.engine.point import Point
from whence.engine.stream import to_device
from whence.errors import UsageError
from whence.escapes import command
from whence.filter.where import matching
from whence.finding import DEPTHS
from whence.indexing import Index
from whence.methods.base import recipe_named, recipes, request_scores
from whence.operators import Identity, Operator
from whence.report import build_report, words
from whence.report.build import grid, layer_and_module, spread, strengths
from whence.report.gather import has_stages, open_all
from whence.report.html import WINDOW
from whence.run import Run
from whence.scoring.score import score_points
from whence.serve.asked import Asked, Saved
from whence.serve.lacking import Lacking, NotThere
from whence.serve.neighbours import STAGE, stages_of
from whence.serve.requests import Cell, Question, WhatIf
from whence.settings import Measured, Score
from whence.show.numbers import many
from whence.show.tokens import strongest
from whence.stages import open_stages
from whence.store.plain import plain
from whence.store.scores import Scores, part_of, row_text
from whence.tasks import CausalLM
from whence.tasks.forward import in_mode
from whence.tasks.measurements import IGNORED
from whence.tasks.questions import answer_of, with_answer
from whence.validate.without import read_calibration

FIRST, LAST = 40, 20
"""Rows that the index puts first, and last, which are scored again, exactly."""

QUICKLY = 2e10
"""Products of a pass over all rows below which it is made for every question: about a second of one core."""

AT_ONCE = 5e11
"""Products of a pass over all rows that a question may take at once: about a minute of one core. More is a job."""

KEPT = 64
"""Questions whose scores stay in memory."""

ANSWER_TOKENS = 64
"""Tokens of an answer that are linked to those of a row, one by one."""

SIDES = ("raises", "lowers")
PARTS = ("prompt", "completion", "contrast")

METHODS = {
    "auto": ("EK-FAC influence", "Grosse et al. 2023, Studying Large Language Model Generalization with Influence Functions"),
    "exact": ("EK-FAC influence, of all rows", "Grosse et al. 2023"),
    "index": ("EK-FAC influence, through the index", "Grosse et al. 2023"),
    "dot": ("Gradient dot product", "Charpiat et al. 2019, Input Similarity from the Neural Network Perspective"),
}


class Asking:
    """Asks the model of a run, which it does not share."""

    def __init__(self, run: Run):
        self.run = run
        self.asked: OrderedDict[str, Asked] = OrderedDict()
        self.operators: dict[tuple[str, float], Operator] = {}
        self.checked = False
        self.indexed: Index | None = None
        """The index used last."""
        self.ids = {name: number for number, name in enumerate(run.all_rows.ids)}
        found = places(run.reading.path, run.reading.split) if run.reading.path else []
        limited = run.reading.limit is not None
        self.places = found if len(found) == len(self.ids) or (limited and len(found) > len(self.ids)) else []

    # what is asked

    def complete(self, prompt: str, completion: str | None, max_new_tokens: int) -> dict[str, Any]:
        """What the model says, token by token; or how likely it finds what somebody else said."""
        started = time.perf_counter()
        row = self.run.question(prompt, completion, max_new_tokens=max_new_tokens)[0]
        tokens, rendered = self.answer_tokens(row)
        return {
            "prompt": prompt,
            "completion": answer_of(row),
            "source": row.get("source"),
            "logprob": sum(token["logprob"] for token in tokens),
            "rendered": rendered,
            "tokens": tokens,
            "seconds": time.perf_counter() - started,
        }

    @torch.no_grad()
    def answer_tokens(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """The tokens of a query's answer with their probabilities, and all that the model reads."""
        task, model = self._task(), self.run.model
        bare = {name: value for name, value in row.items() if name not in ("span", "contrast")}
        ((item, _),) = task.encode_queries([bare])[0]
        batch = to_device(task.collate([item]), next(model.parameters()).device)
        with in_mode(model, training=False):
            logits, labels = task.predict(model, batch)
        at = (labels[0] != IGNORED).nonzero().squeeze(1)
        logp = logits[0, at].float().log_softmax(-1)
        found = logp.gather(1, labels[0, at][:, None])[:, 0].tolist()
        best, named = logp.exp().topk(min(5, logp.shape[1]))
        answer, pieces = answer_of(bare), item.pieces
        begin = item.text.rindex(answer.strip()) - answer.index(answer.strip())
        tokens: list[dict[str, Any]] = []
        for place, number in enumerate(np.flatnonzero(item.in_loss).tolist()):
            end = int(item.ends[number]) - begin
            start, text = max(0, end - len(pieces[number])), pieces[number]
            if not text and number == len(item.ids) - 1 and end >= len(answer):
                start, end, text = len(answer), len(answer) + 1, task.tokenizer.convert_ids_to_tokens(int(item.ids[number]))
            elif not text and tokens:  # the rest of a character
                tokens[-1]["logprob"] += found[place]
                tokens[-1]["p"] *= float(np.exp(found[place]))
                continue
            tops = [
                {"text": task.tokenizer.decode([token]), "p": p}
                for p, token in zip(best[place].tolist(), named[place].tolist(), strict=True)
            ]
            logprob = found[place]
            tokens.append(
                {"text": text, "start": start, "end": end, "logprob": logprob, "p": float(np.exp(logprob)), "top": tops}
            )
        return tokens, item.text

    def ask(self, question: Question) -> Asked:
        """The rows behind an answer; what was asked before is still known."""
        began = time.perf_counter()
        queries = self._queries(question)
        if question.row is None:
            question = question.model_copy(update={"completion": answer_of(queries[0])})
        kept = self.asked.get(question.key)
        if kept and (not kept.columns or (kept.question and kept.question.top >= question.top)):  # else too few were scored
            self.asked.move_to_end(question.key)
            return kept
        answered = time.perf_counter()
        asking = Measured(damping=question.damping, measurement=question.measurement)
        if question.method in METHODS:
            found = self._causal(queries, asking, question)
        else:
            recipe = recipe_named(question.method)
            request = self.run.request(queries, Score(), asking, training="training" in recipe.needs)
            found = self._whole(request_scores(recipe, request, recipe.own({})), queries, question)
        found.seconds |= {"answer": answered - began, "all": time.perf_counter() - began}
        return self._keep(found)

    def saved(self, name: str, number: int) -> Asked:
        """One question of the scores in a folder of the run; `NAME@STAGE`: with the rows of that stage of training alone.

        Raises NotThere where there are none of that name.
        """
        key = f"scores:{name}:{number}"
        if key in self.asked:
            return self.asked[key]
        kept, _, stage = name.partition(STAGE)
        folder = next((folder for folder in self.run.kept_scores() if folder.name == kept), None)
        if folder is None:
            raise NotThere(f"There are no scores {name!r} in this run.")
        staged = open_stages(folder).stages if stage and has_stages(folder) else {}
        if stage and stage not in staged:
            raise NotThere(f"There is no stage {stage!r} in {kept}.", accepted=", ".join(staged) or "one stage of training")
        scores = staged[stage] if stage else open_all(folder)
        if not 0 <= number < len(scores.queries):
            raise NotThere(f"There is no question {number} in {name}.", accepted=f"0 to {len(scores.queries) - 1}")
        scan = {"how": "saved", "rows": scores.shape[1], "exact": scores.shape[1], "recall": None, "words": f"saved in {name}"}
        name = str(number) if str(number) not in scores.query_ids else scores.query_ids[number]
        place = Saved(folder / stage / "scores" if stage else folder, number, name)
        one, stages = part_of(scores, [number]), stages_of(folder, number)
        return self._keep(Asked(key, None, one, scan, stage=stage, stages=stages, saved=place))

    def known(self, key: str, stored: Callable[[str], Question | None]) -> Asked:
        """A question by its key: of saved scores, in memory, or asked again as it is `stored`."""
        if key in self.asked:
            return self.asked[key]
        if key.startswith("scores:"):
            _, name, number = key.split(":", 2) if key.count(":") == 2 else (key, "", "")
            return self.saved(name, int(number) if number.isdecimal() else -1)
        question = stored(key)
        if question is None:
            raise NotThere(f"Nobody asked {key!r} here.")
        return self.ask(question)

    def _whole(self, scores: Scores, queries: Rows, question: Question) -> Asked:
        """What was asked of all rows."""
        said = f"all {many(scores.shape[1], 'row')} scored exactly"
        scan = {"how": "all", "rows": scores.shape[1], "exact": scores.shape[1], "recall": None, "words": said}
        return Asked(question.key, queries, scores, scan, question)

    def _causal(self, queries: Rows, asking: Measured, question: Question) -> Asked:
        """Scores by the gradients: of all rows where they are few or asked for, else of those that the index finds."""
        run, point = self.run, self.run.point(asking.measurement)
        operator = self._operator(question.method, asking.damping)
        settings = Score().changed(per=self._per(), n_train=run.n_train, check=not self.checked)
        self.checked = True
        index = vars(run).get("index")
        tokens = int(index.examples["tokens"].sum()) if index is not None else sum(point.examples.sizes)
        products = 6 * tokens * sum(site.parameters for site in point.cover(list(run.curvature.blocks)).sites.values())
        if question.method == "index" or (question.method == "auto" and products > QUICKLY):
            return self._through_index(queries, asking, question, settings)
        if products > AT_ONCE:
            raise Lacking(
                f"All {len(run.rows):,} rows would take longer than a question should.",
                job="score",
                fix="start the job here, which scores and saves them; or ask through an index",
            )
        return self._whole(score_points(point, point, queries, operator, settings), queries, question)

    def _through_index(self, queries: Rows, asking: Measured, question: Question, settings: Score) -> Asked:
        """Scores of the rows that the index puts first and last, beside its estimates of all."""
        run, point, index, began = self.run, self.run.point(asking.measurement), self._index(), time.perf_counter()
        operator = self._operator("index", asking.damping)
        found = index.search(run.model, run.task(asking.measurement), queries, operator)
        order, first = np.argsort(-found.raw[0], kind="stable"), max(FIRST, question.top)
        columns = list(dict.fromkeys([*order[:first].tolist(), *order[-max(LAST, question.top) :].tolist()]))
        scanned = time.perf_counter()
        scores = score_points(point, point, queries, operator, settings.changed(n_train=index.n_train), rows=columns)
        said = f"{many(len(index), 'row')} estimated by the index, {len(columns):,} of them scored exactly"
        among = len(index) if len(columns) == len(index) else first  # of rows that are all scored none is missed
        scan = {"how": "index", "rows": len(index), "exact": len(columns), "recall": recall(index, among), "words": said}
        seconds = {"scan": scanned - began, "exact": time.perf_counter() - scanned}
        return Asked(question.key, queries, scores, scan, question, found.values_of(0), columns, seconds)

    def _index(self) -> Index:
        """The index. Raises Lacking where there is none, or one of other rows."""
        if "index" not in vars(self.run):
            fix = "start the job here, or whence index build: then a question takes a second"
            raise Lacking(f"There is no index of the {len(self.run.rows):,} rows yet.", job="index", fix=fix)
        index = self.run.index
        if self.indexed is not index:
            if tuple(index.examples["id"]) != tuple(self.run.rows.ids):
                raise Lacking(
                    "The index is of other rows.",
                    given=f"{len(self.run.rows):,} rows, {len(index):,} in the index",
                    fix="whence index build with --rerun",
                )
            self.indexed = index
        return index

    def _per(self) -> Any:
        return cover(self.run.model, list(self.run.curvature.blocks)).finest

    def _operator(self, method: str, damping: float) -> Operator:
        """What is between the gradients, kept for the next question."""
        key = ("dot", 0.0) if method == "dot" else ("inverse", damping)
        if key not in self.operators:
            if "curvature" not in vars(self.run):
                raise Lacking("There are no factors yet.", job="fit", fix=command("whence", "fit", self.run.name or "MODEL"))
            while len(self.operators) > 2:  # each may be as large as the factors
                self.operators.pop(next(iter(self.operators)))
            names = self.run.curvature.operator.names
            self.operators[key] = Identity(names) if method == "dot" else self.run.inverse(damping)
        return self.operators[key]

    def _queries(self, question: Question) -> Rows:
        if question.row is not None:
            return self.run.all_rows.take([self.number(question.row)])
        if question.span is not None and question.contrast is not None:
            raise UsageError("A question is about a span of the answer or about a contrast to another one, not both.")
        if question.method not in (*METHODS, *recipes()):
            raise UsageError(f"There is no method {question.method!r}.", accepted=", ".join((*METHODS, *recipes())))
        self._task()
        span = question.span
        return self.run.question(question.prompt, question.completion, contrast=question.contrast, span=span)

    def _task(self) -> CausalLM:
        task = self.run.task()
        if not isinstance(task, CausalLM):
            raise UsageError(
                f"Questions here are asked of a model that continues text, and this one is for {type(task).__name__}.",
                accepted="saved scores of other models: they are shown as any",
            )
        return task

    def _keep(self, found: Asked) -> Asked:
        """Remember it, its values as large as retrainings of the run say where they are of such scores."""
        if self.run.out is not None:
            found.scores = found.scores.calibrated(read_calibration(self.run.out / "scores"))
        if found.estimates is not None:
            found.estimates = found.estimates * found.scores.gain
        self.asked[found.key] = found
        while len(self.asked) > KEPT:
            self.asked.popitem(last=False)
        return found

    # what is shown of it

    def document(
        self, found: Asked, top: int = 20, decisions: Mapping[str, Any] | None = None, where: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Everything about one question, as JSON values; the rows are the first that meet the conditions `where`."""
        if top not in found.documents:
            found.documents[top] = self._document(found, top)
        document = found.documents[top]
        if found.key.startswith("scores:") and document["answer_tokens"] is None:  # of a model that was not loaded yet
            del found.documents[top]
        rows = self.rows(found, top, where) if where else document["query"]
        query = document["query"] | {side: [decided(row, decisions or {}) for row in rows[side]] for side in SIDES}
        return {**document, "query": query, "where": list(where), "of": len(found.values) if not where else rows["of"]}

    def rows(self, found: Asked, top: int, where: Sequence[str] = ()) -> dict[str, Any]:
        """The first rows on either side, of those that meet the conditions; "of" says how many do, "counts" on which side.

        Where the index knows all rows, the first of these are scored exactly. What is shown of a row compares it with all rows.
        """
        scores, places = found.scores, found.columns or list(range(found.scores.shape[1]))
        known = scores.examples if found.estimates is None else self._index().examples
        values, of = found.values, len(known)
        counts = {"raises": int((values > 0).sum()), "lowers": int((values < 0).sum())}
        if where:
            meant = np.flatnonzero(matching(known, where))
            of, counts = len(meant), {"raises": int((values[meant] > 0).sum()), "lowers": int((values[meant] < 0).sum())}
            if found.estimates is None:
                scores, places = part_of(scores, rows=meant.tolist()), meant.tolist()
            else:
                order = meant[np.argsort(-values[meant], kind="stable")]
                places = list(dict.fromkeys([*order[: max(FIRST, top)].tolist(), *order[-max(LAST, top) :].tolist()]))
                scores = self._again(found, places)
        query = build_report(scores, top=top).queries[0]
        estimates = None if found.estimates is None else dict(zip(scores.example_ids, found.estimates[places], strict=True))
        among = _Among(values)
        shown = {side: [self._row(row, found, among, estimates) for row in plain(getattr(query, side))] for side in SIDES}
        return {**shown, "of": of, "counts": counts}

    def _document(self, found: Asked, top: int) -> dict[str, Any]:
        scores, values, loaded = found.scores, found.values, "loaded" in vars(self.run)
        report = build_report(scores, top=top)
        query = report.queries[0]
        if found.estimates is not None:
            query = replace(query, sources=self._by_source(values), overlap=None, **spread(values))
        document = plain(replace(query, parts=()))
        del document["parts"], document["number"]
        estimates = None
        if found.estimates is not None:
            estimates = dict(zip(scores.example_ids, found.estimates[found.columns], strict=True))
        among = _Among(values)
        for side in SIDES:
            document[side] = [self._row(row, found, among, estimates) for row in document[side]]
        queries, tokens = self.queries_of(found) if loaded else None, None
        if queries is not None and isinstance(self.run.task(), CausalLM):
            tokens = [{**token, "top": []} for token in self.answer_tokens(queries[0])[0]]
        return {
            "key": found.key,
            "asked": found.question.model_dump(exclude={"where"})
            if found.question
            else {name: getattr(query, name) for name in PARTS},
            "scan": found.scan,
            "seconds": found.seconds,
            "unit": report.unit,
            "method": report.method,
            "slope": report.slope,
            "gain": report.gain,
            "directed": scores.directed,
            "n_train": report.n_train,
            "meaning": report.meaning,
            "notes": [*report.notes, *filter(None, [words.size(scores)])],
            "verdict": _verdict(document, values),
            "query": document,
            "answer_tokens": tokens,
            "stage": found.stage,
            "stages": found.stages,
        }

    def more(
        self, found: Asked, side: str, offset: int, limit: int, decisions: Mapping[str, Any], where: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Further rows of a side, of those that meet the conditions."""
        rows = self.rows(found, offset + limit, where)
        return {"rows": [decided(row, decisions) for row in rows[side][offset:]], "of": rows["counts"][side]}

    def _row(self, row: dict[str, Any], found: Asked, among: _Among, estimates: Mapping[str, float] | None) -> dict[str, Any]:
        estimate = None
        if estimates is not None:
            row["exact"], estimate = True, float(estimates[row["id"]])
        window = strongest(row["pieces"], np.array(row["token_values"]), WINDOW) if row["pieces"] else None
        return row | {
            **among.stands(row["value"]),
            "place": self.place(row["id"]) if self._is_of_the_data(row, found) else None,
            "window": window,
            "estimate": estimate,
        }

    def _is_of_the_data(self, row: Mapping[str, Any], found: Asked) -> bool:
        """Whether a row is one of those that the run's model was trained on last, and no other of the same id."""
        last = found.stages[-1]["stage"] if found.stages else ""
        return last in (row["stage"] or found.stage).split("+")

    def number(self, name: str) -> int:
        """The place of a row in the data, from 0."""
        if name not in self.ids:
            raise NotThere(f"There is no row {name!r} in the data.")
        return self.ids[name]

    def place(self, name: str) -> dict[str, Any] | None:
        """The file and line of a row."""
        if name not in self.ids:
            return None
        number = self.ids[name]
        if not self.places:
            path = Path(self.run.reading.path)
            return {"file": path.name, "line": None, "row": number} if self.run.reading.path else None
        file, line = self.places[number]
        base = Path(self.run.reading.path)
        shown = file.relative_to(base) if base.is_dir() else file.name
        return {"file": str(shown), "line": line, "row": number}

    @functools.cached_property
    def _sources(self) -> tuple[np.ndarray, list[str]]:
        """The number of each row's source, -1 where it has none, `[N]`; and their names."""
        named = [row.get("source") for row in self.run.rows]
        names = sorted({str(name) for name in named if name is not None})
        places = {name: place for place, name in enumerate(names)}
        return np.array([-1 if name is None else places[str(name)] for name in named]), names

    def _by_source(self, values: np.ndarray) -> tuple[tuple[str, int, float], ...]:
        """Source, rows, sum of their values; the largest first."""
        codes, names = self._sources
        known = codes >= 0
        counts = np.bincount(codes[known], minlength=len(names)).tolist()
        sums = np.bincount(codes[known], weights=values[known], minlength=len(names)).tolist()
        return tuple(sorted(zip(names, counts, sums, strict=True), key=lambda entry: -entry[2]))

    # one row and the answer

    def queries_of(self, found: Asked) -> Rows:
        """The question as the model reads it; of saved scores, as their table of queries has it."""
        if found.queries is None:
            asked = words.query_of(found.scores, 0)
            parts = {name: asked[name] for name in ("prompt", "completion", "contrast", "span") if asked.get(name) is not None}
            if "messages" in self.run.all_rows[0]:
                found.queries = self.run.question(parts.pop("prompt", ""), parts.pop("completion"), **parts)
            else:
                found.queries = as_rows([parts if "completion" in parts else {"text": asked["text"]}])
        return found.queries

    def pair(self, found: Asked, name: str) -> dict[str, Any]:
        """What each token of a row does to each token of the answer, `values [A, T]`."""
        if name in found.pairs:
            return found.pairs[name]
        started, number = time.perf_counter(), self.number(name)
        query = dict(self.queries_of(found)[0])
        tokens, contrast = self._spans(query), query.pop("contrast", None)
        bare = {key: value for key, value in query.items() if key != "span"}
        contents: list[Any] = [{**bare, "span": (token["start"], token["end"])} for token in tokens]
        if contrast is not None:
            contents.append(with_answer(bare, contrast))
            tokens.append({"text": contrast, "start": None, "end": None, "contrast": True})
        with_ids = with_contents(as_rows([bare] * len(contents)), contents)
        scores = self._again(found, [self.run.all_rows.ids[number]], queries=with_ids)
        if scores.tokens is None:
            raise UsageError("This model's modules have no parts by token.")
        matrix, pieces = scores.tokens / scores.n_train * found.scores.gain, list(scores.examples["pieces"][0])
        if contrast is not None:
            matrix[-1] *= -1
        head = build_report(part_of(scores, [0]), top=1).queries[0]
        rows = [*head.raises, *head.lowers]
        if rows and len(rows[0].pieces) == len(pieces) + 1:  # the first token, which nothing predicts
            pieces, matrix = list(rows[0].pieces), np.pad(matrix, ((0, 0), (1, 0)))
        found.pairs[name] = {
            "row": name,
            "text": row_text(self.run.all_rows[number]),
            "place": self.place(name),
            "pieces": pieces,
            "answer": [{key: token.get(key) for key in ("text", "start", "end", "contrast")} for token in tokens],
            "values": plain(matrix),
            "row_values": plain(matrix.sum(0)),
            "answer_values": plain(matrix.sum(1)),
            "scale": float(np.abs(matrix).max(initial=0.0)),
            "seconds": time.perf_counter() - started,
        }
        return found.pairs[name]

    def _spans(self, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The tokens of the answer that are asked about, some of a very long one together."""
        tokens, span = self.answer_tokens(query)[0], query.get("span")
        if isinstance(span, str):
            first = answer_of(query).index(span)
            span = (first, first + len(span))
        chosen = [token for token in tokens if span is None or (token["end"] > span[0] and token["start"] < span[1])]
        step, parts = -(-len(chosen) // ANSWER_TOKENS), list[list[dict[str, Any]]]()
        for number, token in enumerate(chosen):  # the token that ends a text has no character to be asked about by itself
            if number % step and parts or token["end"] > len(answer_of(query)):
                parts[-1].append(token)
            else:
                parts.append([token])
        return [
            {"text": "".join(token["text"] for token in part), "start": part[0]["start"], "end": part[-1]["end"]}
            for part in parts
        ]

    def _again(
        self,
        found: Asked,
        rows: Sequence[int | str] | None = None,
        *,
        queries: Rows | None = None,
        texts: Rows | None = None,
        per: Literal["token", "module"] = "token",
    ) -> Scores:
        """Scores as the question's are, of these rows of the data (None: all) or of `texts` that are not among them.

        Raises UsageError where what the question was scored with is not available.
        """
        point, operator = self._as_scored(found)
        of = point if texts is None else point.of(texts)
        settings = Score().changed(per=self._per() if per == "token" else per, n_train=found.scores.n_train, check=False)
        return score_points(point, of, queries or self.queries_of(found), operator, settings, rows=rows)

    def _as_scored(self, found: Asked) -> tuple[Point, Operator]:
        """The point and the operator that a question was scored with. Raises UsageError where these are others'."""
        about, question = found.scores.about, found.question
        measurement = str(about.get("measurement", "logprob"))
        if question is not None and question.method in METHODS:
            operator = self._operator(question.method, question.damping)
        elif question is None and about.get("method") is None and not about.get("candidates"):
            operator = self._operator("auto", self.run.asking.damping)
        else:
            raise UsageError(
                f"{found.scores.made_by} gives one number for each row, and none for its tokens.",
                accepted="influence by the factors, or the gradient dot product",
            )
        if question is None and operator.label != about.get("operator"):
            raise UsageError(
                "These scores were made with other factors or another damping than are at hand here.",
                given=f"{about.get('operator')}; at hand: {operator.label}",
                fix="ask the question here again",
            )
        return self.run.point(measurement), operator

    def map(self, found: Asked, names: Sequence[str] | None) -> dict[str, Any]:
        """Where in the model the effect of rows is, by layer and module."""
        if names is None:
            table = found.scores.top(0, 20)
            names = list(table["id"][table["value"] > 0]) or list(table["id"])
        for name in names:
            self.number(name)
        scores = self._again(found, list(names), per="module").calibrated(found.scores.about.get("calibration"))
        return plain(grid(scores, 0, range(len(names))))

    def by_cell(self, found: Asked, asked: Cell, decisions: Mapping[str, Any]) -> dict[str, Any]:
        """The rows in the order of what they do through one layer and module, their `part`, in the unit of the values.

        All rows are scored by module for it, at the price of the question itself; behind an index, those that were scored
        exactly. Raises NotThere where there is no such cell.
        """
        if not found.scores.modules and found.parts is None:
            found.parts = self._again(found, found.columns or None, per="module")
        parts = found.parts or found.scores
        cells = {name: layer_and_module(name) for name in parts.modules}
        names = [name for name, cell in cells.items() if cell == (asked.layer, asked.module)]
        if not names:
            known = sorted({" ".join(filter(None, cell)) for cell in cells.values()})
            raise NotThere(f"There is no {asked.module!r} in {asked.layer or 'the model'!r}.", accepted=", ".join(known[:10]))
        through = replace(parts, raw=sum(parts.modules[name] for name in names), modules={}, tokens=None, exact=None)
        meant = np.flatnonzero(matching(parts.examples, asked.where))
        estimates = None if found.estimates is None else dict.fromkeys(found.scores.example_ids, np.nan)
        among, shown = _Among(found.values), dict[str, Any]()
        for side, sign in (("raises", 1), ("lowers", -1)):
            table = part_of(through, rows=meant.tolist()).top(0, asked.top, lowest=sign < 0)
            of = dict(zip(table["id"], table["value"], strict=True))
            ordered = [name for name in table["id"] if sign * of[name] > 0]
            whole = part_of(found.scores, rows=[found.scores.column_of(name) for name in ordered])
            query = build_report(whole, top=len(ordered)).queries[0] if ordered else None
            rows = {row.id: plain(row) for row in (*query.raises, *query.lowers)} if query else {}
            kept = [self._row(rows[name], found, among, estimates) for name in ordered if name in rows]
            ranked = (row | {"rank": sign * rank, "part": of[row["id"]]} for rank, row in enumerate(kept, 1))
            shown[side] = [decided(row, decisions) for row in ranked]
        scope = many(len(meant), "row") if found.estimates is None else f"{many(len(meant), 'row')} scored exactly"
        return plain({**shown, "words": f"by what goes through {asked.layer} {asked.module}, of {scope}".replace("  ", " ")})

    def what_if(self, found: Asked, asked: WhatIf) -> dict[str, Any]:
        """The effect of a text that was not trained on, and of the row that it would be instead of."""
        started, original, values = time.perf_counter(), None, found.values

        def of(rows: Any) -> dict[str, Any]:
            scores = self._again(found, texts=rows).calibrated(found.scores.about.get("calibration"))
            report = build_report(scores, top=1).queries[0]
            row = next(iter([*report.raises, *report.lowers]), None)
            value = float(scores.values[0, 0])
            shown = {"value": value, "limit": words.bound(scores, 0) if scores.beyond(0)[0] else ""}
            shown |= {"pieces": row.pieces if row else (), "token_values": row.token_values if row else ()}
            return shown | {"tokens": int(scores.examples["tokens"].iloc[0]), "word": strengths(values)(shown["value"])}

        row = self.run.all_rows[self.number(asked.row)] if asked.row is not None else {}
        edited = of(as_rows([_edited(row, asked)]))
        if row:
            original = of(as_rows([{key: value for key, value in row.items() if key != "source"}]))
        change = edited["value"] - (original["value"] if original else 0.0)
        what = words.measurement(found.scores, 0)
        instead = "With this text instead of the row" if original else "With one copy of this text more"
        direction = "higher" if change >= 0 else "lower"
        size = words.size(found.scores).partition(":")[0] if found.scores.gain != 1 else "to first order"
        limit = words.impossible(found.scores, 0, change)
        how = f"which is {limit}" if limit else size
        said = f"{instead}, {what} would be about {abs(change):.3g} nats {direction}, {how}; nothing was trained."
        result = {"original": original, "edited": edited, "difference": change, "words": said}
        return plain(result | {"seconds": time.perf_counter() - started})

    def demo(self, found: Asked, top: int) -> dict[str, Any]:
        """An answer in the shape that the demo of the TinyStories project had."""
        row = self.queries_of(found)[0]
        report = build_report(found.scores, top=top).queries[0]
        samples = []
        for each in report.raises:
            parts = [{"token": piece, "influence": value} for piece, value in zip(each.pieces, each.token_values, strict=True)]
            samples.append({"id": each.id, "text": each.text, "influence": each.value, "tokens": parts})
        tokens = [token["text"] for token in self.answer_tokens(row)[0]]
        asked = {"prompt": row.get("prompt", ""), "completion": answer_of(row), "tokens": tokens}
        return plain({**asked, "influences": [{"query": report.span or answer_of(row), "samples": samples}]})


class _Among:
    """How a row's value stands among those of all rows, `[N]`."""

    def __init__(self, values: np.ndarray):
        sizes = np.abs(values)
        self.values, self.strength = values, strengths(values)
        self.median, self.sum = float(np.median(sizes)), max(float(sizes.sum()), np.finfo(float).tiny)

    def stands(self, value: float) -> dict[str, Any]:
        """The share of rows below it, in percent; its size beside the median and the sum of all sizes; and in a word."""
        return {
            "percentile": 100 * float((self.values < value).sum()) / max(1, len(self.values) - 1),
            "times_median": abs(value) / self.median if self.median else None,
            "share": abs(value) / self.sum,
            "word": self.strength(value),
        }


def decided(row: dict[str, Any], decisions: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the verdict that stands."""
    return {**row, "decision": (decisions.get(row["id"]) or {}).get("verdict")}


def recall(index: Index, among: int) -> dict[str, float] | None:
    """Share of a question's best rows that a scan has among its first `among`, where that was measured."""
    return {str(k): index.recall(k, among) for k in DEPTHS} if index.measured["places"] else None


def _verdict(query: Mapping[str, Any], values: np.ndarray) -> dict[str, str]:
    """What the rows come to, in a word and in a sentence."""
    strong = sum(row["word"] == "strong" for side in SIDES for row in query[side])
    first = query["raises"][0]["word"] if query["raises"] else "weak"
    if not np.any(values):
        return {"word": "nothing", "words": "No row has any effect."}
    if query["diffuse"]:
        times = f"{query['stands_out']:.1f} times the 99th percentile"
        return {"word": "nothing", "words": f"No row stands out: the first is {times}. Many rows contribute a little."}
    if strong:
        return {"word": "strong", "words": f"{strong} row{'s stand' if strong > 1 else ' stands'} out from the rest."}
    many = "The first rows are among the strongest of all, but do not stand apart from those after them."
    few = "The first rows are hardly stronger than the others."
    return {"word": first, "words": many if first == "medium" else few}


def _edited(row: Mapping[str, Any], asked: WhatIf) -> dict[str, Any]:
    """The row that a text makes, with the parts that the original has."""
    if asked.prompt is not None or asked.completion is not None:
        return {"prompt": asked.prompt or "", "completion": asked.completion or ""}
    text = asked.text or ""
    if not text.strip():
        raise UsageError("There is no text.", accepted="text, or prompt and completion")
    if "messages" in row:
        raise UsageError("A conversation is edited by its parts.", accepted="prompt and completion")
    if "completion" not in row:
        return {"text": text}
    prompt, completion = row.get("prompt", ""), row["completion"]
    if text.startswith(prompt):
        return {"prompt": prompt, "completion": text[len(prompt) :]}
    if completion and text.endswith(completion):
        return {"prompt": text[: -len(completion)], "completion": completion}
    raise UsageError("It is unclear where the prompt of the edited row ends.", accepted="prompt and completion, separately")
