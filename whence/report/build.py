"""Finished artefacts in, a report as data out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from whence.filter.keywords import keyword_overlap
from whence.filter.texts import words_of
from whence.filter.tfidf import tfidf_scores
from whence.linalg.stats import spearman
from whence.plots.scores import score_curve, score_histogram
from whence.report import words
from whence.report.model import Check, Grid, Overlap, Part, Query, Report, Row, Statistics
from whence.show.numbers import many
from whence.show.tokens import merge_special, shown_once, unpredicted, unread
from whence.store.digest import canonical_json
from whence.store.scores import Scores

if TYPE_CHECKING:
    from whence.fitting import Curvature
    from whence.stages import StagedScores

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)

STANDS_OUT, TYPICAL = 2.0, 10.0
"""A row stands out that scores so many times the 99th percentile, or so many times the median of the absolute scores."""

ENOUGH = 200
"""Rows from which on the 99th percentile is another thing than the runner-up."""

_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<number>\d+)\.(?P<module>.+)")

TRAINING = (
    "base",
    "device",
    "dtype",
    "parameters",
    "parameters_trained",
    "rows",
    "tokens",
    "steps",
    "epochs",
    "loss",
    "loss_unit",
    "learning_rate",
    "leakage",
    "seed",
)
"""Entries of `training.json` that are shown; its settings are among those of the run."""

DAMPING = 0.1
"""At which the health of factors is computed where nobody has."""

TITLE = "Which training rows made the model say this?"


def build_report(
    scores: Scores,
    *,
    pairs: Mapping[str, Any] | None = None,
    curvature: Curvature | None = None,
    factors: Mapping[str, Any] | None = None,
    health: Mapping[str, Any] | None = None,
    self_scores: Scores | None = None,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    checks: Mapping[str, str] | None = None,
    stages: StagedScores | None = None,
    provenance: Mapping[str, Any] | None = None,
    settings: str | None = None,
    command: str | None = None,
    top: int = 10,
    title: str | None = None,
) -> Report:
    """Put together what finished scores, and whatever else is given, have to say about the answers.

    `pairs` is the document of `whence generate`, `health` that of `whence inspect` and `factors` what the factors' manifest
    says (both are taken from `curvature` where only that is given), `training` that of `training.json` with the metrics as its
    "history". `evaluation` has tables (lists of rows) by title, `checks` the results of validations by name (`CHECKS`),
    `stages` the scores of all stages of training, where `scores` are those of the last, `provenance` is the scores'
    `config.json`, `settings` the YAML of the run. What is missing is listed in `absent`, and a check that was not made says so.
    """
    builder = _Builder(scores, pairs or {}, top)
    queries = tuple(builder.query(number) for number in range(len(scores.queries)))
    if stages is not None:
        queries = _with_parts(
            queries, stages, {name: _Builder(each, pairs or {}, top) for name, each in list(stages.stages.items())[:-1]}
        )
    if health is None and curvature is not None:
        from whence.fitting.health import health as health_of

        health = {"damping": DAMPING, "modules": [module.as_json() for module in health_of(curvature, DAMPING)]}
    found = dict(health or {})
    given = {
        "answers of the base model": any(query.base_completion for query in queries),
        "scores per token (whence score --per token)": scores.tokens is not None,
        "scores per module (whence score --per module)": bool(scores.modules),
        "health of the factors": health is not None,
        "self-influence of the rows": self_scores is not None,
        "record of the training": training is not None,
        "evaluation of the answers": evaluation is not None,
    }
    return Report(
        title=title or TITLE,
        unit=scores.unit,
        n_train=scores.n_train,
        rows=scores.shape[1],
        method=scores.made_by,
        slope=words.is_slope(scores),
        gain=scores.gain,
        meaning=words.meaning(scores),
        limits=words.limits(scores),
        queries=queries,
        notes=tuple(words.doubts(scores, len(builder.hubs))[:-1]),
        hubs=builder.hub_rows(),
        checks=tuple(_checks(scores, queries, found, checks or {})),
        health=tuple(found.get("modules", ())),
        damping=found.get("damping"),
        factors=factors or (curvature.about if curvature else {}),
        training=tuple(_flat({key: (training or {}).get(key) for key in TRAINING})),
        history=tuple((training or {}).get("history", ())),
        evaluation={title: tuple(rows) for title, rows in (evaluation or {}).items()},
        self_influence=_Builder(self_scores, {}, top).rows(0) if self_scores is not None else (),
        absent=tuple(name for name, there in given.items() if not there),
        stages=() if stages is None else tuple(words.stage_line(stages, name) for name in stages.about),
        modules=()
        if stages is None
        else tuple(stages.table.astype(object).where(stages.table.notna(), None).to_dict("records")),
        provenance=tuple(_flat(provenance or {})),
        settings=settings,
        command=command,
    )


def _with_parts(queries: Sequence[Query], stages: StagedScores, builders: Mapping[str, _Builder]) -> tuple[Query, ...]:
    """The queries, each with what went through every stage; `queries` are those of the last."""
    last, found = list(stages.stages)[-1], stages.shares().to_dict("records")
    parts: dict[str, list[Part]] = {query.id: [] for query in queries}
    for entry in found:
        name, place = entry.pop("stage"), list(parts).index(query_id := entry.pop("query_id"))
        own = queries[place] if name == last else builders[name].query(place)
        parts[query_id].append(Part(name, query=own, method=stages.stages[name].made_by, **entry))
    return tuple(replace(query, parts=tuple(parts[query.id])) for query in queries)


class _Builder:
    """Looks up what is common to all queries of one set of scores once."""

    def __init__(self, scores: Scores, pairs: Mapping[str, Any], top: int):
        self.scores, self.top = scores, top
        self.pairs = list(pairs.get("data", ()))
        self.texts = [str(text) for text in scores.examples["text"]]
        self.places = {name: place for place, name in enumerate(scores.example_ids)}
        tops = [set(scores.top(query, words.HUB_TOP)["id"]) for query in range(len(scores.queries))]
        self.hubs = Counter({name: sum(name in top for top in tops) for name in scores.hubs(words.HUB_TOP)})
        self.about = [words.query_of(scores, number) for number in range(len(scores.queries))]
        self.keywords = keyword_overlap(scores, top)
        self.words = _Words([str(query["text"]) for query in self.about], self.texts)

    def hub_rows(self) -> tuple[tuple[str, int, str], ...]:
        """Rows that are high with most queries."""
        texts = dict(zip(self.scores.example_ids, self.texts, strict=True))
        return tuple((name, count, shown_once(texts[name])) for name, count in self.hubs.most_common())

    def query(self, number: int) -> Query:
        """Everything about one query."""
        scores, about = self.scores, self.about[number]
        values = scores.values_of(number)
        prompt, completion = about.get("prompt") or "", about.get("completion") or ""
        same = [pair for pair in self.pairs if pair.get("prompt") == prompt and prompt]  # as `whence generate` wrote them down
        pair = next((pair for pair in same if pair.get("completion") == completion), same[0] if len(same) == 1 else {})
        raises, lowers = self.rows(number), self.rows(number, lowest=True)
        return Query(
            number=number,
            id=str(about["id"]),
            prompt=prompt if completion else "",
            completion=completion or str(about["text"]),
            contrast=about.get("contrast"),
            span=about.get("span"),
            base_completion=pair.get("base_completion"),
            base_logprob=pair.get("base_logprob"),
            reference=pair.get("reference"),
            measured=words.measured(scores, number),
            value=about.get("measured"),
            log_p=scores.log_p(number),
            ceiling=words.ceiling(scores, number) if any(row.limit for row in raises + lowers) else "",
            tokens=int(about["tokens"]) if about.get("tokens") else None,
            energy=about.get("energy") if scores.about.get("rank") else None,
            sign=words.sign(scores, number),
            target=words.measurement(scores, number),
            raises=raises,
            lowers=lowers,
            **spread(values),
            excluded=words.excluded(scores, number),
            grid=self._grid(number, raises),
            sources=self._sources(number),
            overlap=self._overlap(number, raises),
            keywords=self.keywords[number],
            copy_rank=self._copy_rank(number, str(about["text"])),
            n_train=scores.n_train,
        )

    def rows(self, number: int, *, lowest: bool = False) -> tuple[Row, ...]:
        """The rows that raise the query's answer the most (or lower it), each text once."""
        table = self.scores.top(number, 3 * self.top + 20, lowest=lowest)
        found: list[Row] = []
        seen: set[str] = set()
        values = self.scores.values_of(number)
        strength_of, median = strengths(values), float(np.median(np.abs(values)))
        for record in table.to_dict("records"):
            if (record["value"] < 0) != lowest or record["value"] == 0 or len(found) == self.top:
                break
            if record["text"] and record["text"] in seen:
                continue
            seen.add(record["text"])
            rank = (-1 if lowest else 1) * (len(found) + 1)
            found.append(self._row(number, rank, record, self.places[record["id"]], strength_of, median))
        return tuple(found)

    def _row(
        self, number: int, rank: int, record: Mapping[str, Any], place: int, strength_of: Callable[[float], str], median: float
    ) -> Row:
        scores, text, raw = self.scores, str(record["text"]), self.scores.raw[number]
        pieces, token_values = self._tokens(number, record, place)
        parts = scores.module_values(number, place)
        return Row(
            rank=rank,
            effect=record["effect"],
            value=float(record["value"]),
            limit=words.bound(scores, number) if record["beyond_first_order"] else "",
            slope=float(record["value"]) / scores.gain,
            raw=float(record["raw"]),
            share=float(record["share"]),
            percentile=100 * float((raw < raw[place]).sum()) / max(1, len(raw) - 1),
            times_median=abs(float(record["value"])) / median if median else None,
            id=str(record["id"]),
            source=None if words.missing(record["source"]) else str(record["source"]),
            stage=record.get("stage"),
            word=strength_of(float(record["value"])),
            copies=int(record["copies"]),
            tokens=int(record["tokens"]),
            text=shown_once(text),
            hub=record["id"] in self.hubs,
            exact=None if scores.exact is None else bool(scores.exact[number, place]),
            overlap=None if self.words.cosines is None else float(self.words.cosines[number, place]),
            words=self.words.shared(number, text),
            pieces=tuple(pieces),
            token_values=tuple(token_values),
            unread=unread(text, pieces) if pieces else 0,
            modules=tuple(sorted(parts.items(), key=lambda part: -abs(part[1]))[:3]),
        )

    def _tokens(self, number: int, record: Mapping[str, Any], place: int) -> tuple[list[str], list[float]]:
        """The tokens of a row, from its first, with the effect through the prediction of each."""
        if self.scores.tokens is None or record.get("pieces") is None:
            return [], []
        predicted = [str(piece) for piece in record["pieces"]]
        pieces, values = merge_special(predicted, self.scores.token_scores(number, place))
        head = unpredicted(str(record["text"]), predicted)
        return ([head, *pieces], [0.0, *values]) if head else (pieces, values)

    def _grid(self, number: int, raises: Sequence[Row]) -> Grid | None:
        if not self.scores.modules or not raises:
            return None
        return grid(self.scores, number, [self.places[row.id] for row in raises])

    def _sources(self, number: int) -> tuple[tuple[str, int, float], ...]:
        named = self.scores.examples["source"]
        if not bool(named.notna().any()):
            return ()
        counts = Counter(named)
        sums = self.scores.by("source", number)
        return tuple((str(name), counts[name], float(value)) for name, value in sums.items())

    def _overlap(self, number: int, raises: Sequence[Row]) -> Overlap | None:
        if self.words.cosines is None or not raises:
            return None
        every = self.words.cosines[number]
        top = float(np.mean([row.overlap for row in raises if row.overlap is not None]))
        raw = self.scores.raw[number]
        constant = len(raw) < 3 or np.ptp(raw) == 0 or np.ptp(every) == 0
        return Overlap(top, float(every.mean()), None if constant else float(spearman(raw, every)))

    def _copy_rank(self, number: int, text: str) -> int | None:
        """Rank of the best row that is the query itself, word for word."""
        wanted = " ".join(text.split())
        raw = self.scores.raw[number]
        same = [raw[place] for place, other in enumerate(self.texts) if other and " ".join(other.split()) == wanted]
        return int((raw > max(same)).sum()) + 1 if same else None


class _Words:
    """The words of all rows beside those of the queries."""

    def __init__(self, queries: Sequence[str], documents: Sequence[str]):
        self.queries = [set(words_of(text)) for text in queries]
        asked = set().union(*self.queries)
        self.documents = Counter(word for text in documents for word in asked & set(words_of(text)))
        self.common = max(len(documents) / 2, 2)
        some = any(words_of(text) for text in documents)
        self.cosines: np.ndarray | None = tfidf_scores(queries, documents).raw if asked and some else None
        """`[Q, N]`; None where there are no words to compare."""

    def shared(self, query: int, text: str) -> tuple[str, ...]:
        """Words in both the query and a row that most rows have not, those of the fewest rows first."""
        both = {word for word in self.queries[query] & set(words_of(text)) if self.documents[word] <= self.common}
        return tuple(sorted(both, key=lambda word: (self.documents[word], word)))


def spread(values: np.ndarray) -> dict[str, Any]:
    """What the values of all rows, `[N]`, say of a query: how they are spread, and whether a row stands out."""
    high, typical = float(np.percentile(values, 99)), float(np.median(np.abs(values)))
    stands_out = float(values.max()) / high if len(values) >= ENOUGH and high > 0 else None
    return {
        "statistics": _statistics(values),
        "histogram": score_histogram(values),
        "curve": score_curve(values),
        "stands_out": stands_out,
        "diffuse": stands_out is not None and stands_out < STANDS_OUT and float(values.max()) < TYPICAL * typical,
    }


def strengths(values: np.ndarray) -> Callable[[float], str]:
    """What says how much a value is beside those of all rows, `[N]`, in a word: "strong", "medium" or "weak".

    Strong is what stands out (`STANDS_OUT`, and `TYPICAL` where there are too few rows); medium is beyond the 99th percentile
    of the absolute values, or a third of that which is strong.
    """
    sizes = np.abs(values)
    if len(values) >= ENOUGH:
        medium = float(np.percentile(sizes, 99))
        strong = STANDS_OUT * medium
    else:
        typical = float(np.median(sizes))
        strong, medium = TYPICAL * typical, TYPICAL / 3 * typical
    return lambda value: "strong" if abs(value) >= strong > 0 else "medium" if abs(value) >= medium > 0 else "weak"


def grid(scores: Scores, number: int, columns: Sequence[int]) -> Grid:
    """The effects of these rows on a query, added up by layer and module; the scores have parts by module."""
    cells: dict[tuple[str, str], float] = {}
    for name, value in scores.module_values(number, columns).items():
        cells[layer_and_module(name)] = value
    layers, modules = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
    layers.sort(key=lambda layer: (layer.rpartition(" ")[0], int(layer.rpartition(" ")[2] or -1)))
    values = tuple(tuple(cells.get((layer, module)) for module in modules) for layer in layers)
    return Grid(tuple(layers), tuple(modules), values, len(columns))


def layer_and_module(name: str) -> tuple[str, str]:
    """`("layer 3", "mlp.down_proj")` of `model.layers.3.mlp.down_proj`; encoder and decoder are told apart."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return "", name
    stack = (found["stack"] or "").split(".")
    side = next((part for part in stack if part in ("encoder", "decoder")), "")
    return f"{side} layer {found['number']}".strip(), found["module"]


def _statistics(values: np.ndarray) -> Statistics:
    values = values.astype(np.float64)
    return Statistics(
        maximum=float(values.max()),
        minimum=float(values.min()),
        mean=float(values.mean()),
        median=float(np.median(values)),
        deviation=float(values.std()),
        median_size=float(np.median(np.abs(values))),
        percentiles=tuple((p, float(np.percentile(values, p))) for p in PERCENTILES),
    )


CHECKS = {
    "seeds": ("Another seed", "do the same rows come first when what is drawn at random is drawn again?"),
    "damping": ("Another damping", "do the same rows come first with ten times more or less damping?"),
    "lds": ("LDS", "do scores predict what models trained on random halves of the data say?"),
    "removal": (
        "Removal",
        "does the answer change as predicted when the top rows are taken out and the model is trained again?",
    ),
    "tail-patch": ("Tail-patch", "does one more step on the top rows raise the answer?"),
    "size": ("Size", "what is a nat of these scores worth, measured by retraining?"),
}
"""Validations that a report has a place for: name and question."""


def _checks(scores: Scores, queries: Sequence[Query], health: Mapping[str, Any], known: Mapping[str, str]) -> list[Check]:
    """What can be told from what is here, then what only an experiment could tell."""
    found, size = [], words.size(scores)
    given = ({"size": size} if size else {}) | dict(known)
    ranks = [query.copy_rank for query in queries if query.copy_rank is not None]
    result = None
    if ranks:
        first = sum(rank == 1 for rank in ranks)
        result = f"verbatim training rows: {len(ranks)} of {many(len(queries), 'question')}; {first} at rank 1"
        result += "" if first == len(ranks) else f" (ranks {', '.join(map(str, ranks))})"
    if "self-retrieval" in given:
        result = given["self-retrieval"]
    found.append(Check("Self-retrieval", result, "does a copy of the question, put among the rows, come out on top?"))
    if scores.about.get("rank"):
        energy, again = float(scores.queries["energy"].to_numpy().min()), int(scores.about.get("rescored") or 0)
        result = f"rank {scores.about['rank']} keeps {energy:.1%} of each question's gradient or more"
        result += f"; the {again} highest and lowest of each were scored again exactly" if again else "; none scored again"
        found.append(Check("Low rank", result, "how much is lost by compressing the questions' gradients?"))
    if health.get("modules"):
        sound = sum(bool(module["sound"]) for module in health["modules"])
        result = f"numerically sound: {sound} of {many(len(health['modules']), 'module')}"
        found.append(Check("Factors", result, "are all eigenvalues finite and not negative?"))
    overlaps = [query.overlap.correlation for query in queries if query.overlap and query.overlap.correlation is not None]
    if overlaps:
        result = f"rank correlation with word overlap (TF-IDF): {np.mean(overlaps):+.2f} on average"
        found.append(Check("Word overlap", result, "would a plain word search have found the same rows? (1 = yes, 0 = no)"))
    if keywords := [part for query in queries for part in query.keywords]:
        had, drawn = sum(part.top for part in keywords), sum(part.rows for part in keywords)
        result = f"{had / drawn:.0%} of top rows have one, {np.mean([part.share for part in keywords]):.0%} of all rows"
        found.append(Check("Keywords", result, "do the rows that raise an answer most have rare words of question or answer?"))
    for key, (name, meaning) in CHECKS.items():
        if key in given or key != "tail-patch":  # which is made where nothing can be trained again, and is missed nowhere else
            found.append(Check(name, given.get(key), meaning))
    listed = {"self-retrieval", *CHECKS}
    return [*found, *(Check(name, result, "") for name, result in given.items() if name not in listed)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as names with dots; the queries' texts are in the report anyway."""
    lines: list[tuple[str, str]] = []
    for key, value in settings.items():
        if key in ("queries", "whence") or value is None:
            continue
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        elif value not in ([], ""):
            lines.append((prefix + key, value if isinstance(value, str) else canonical_json(value)))
    return [(name.removeprefix("provenance."), value) for name, value in lines]
