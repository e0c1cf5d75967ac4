"""What scores say, in words: the sign, the unit, what was measured, and the doubts; the same in the terminal and in reports."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from whence.escapes import visible
from whence.filter.keywords import Keywords
from whence.show.numbers import many, three_digits
from whence.stages.names import PASSES
from whence.store.scores import Scores
from whence.store.shown import NOT_CALIBRATED as NOT_CALIBRATED
from whence.store.shown import bound as bound

MEASURED = {"logprob": "log p(answer)", "loss": "the loss of the answer", "margin": "the log-odds of the answer's tokens"}

TRUST = "trust: not measured. Scores are first-order estimates, not proof of cause."

OTHER_TRUST = "trust: not measured. Scores are an order of the rows, not proof of cause."

SLOPE = (
    "A value is the slope of what was measured at these weights, per copy of the row. While it is small, one more copy of the "
    "row would change it by about that much. A large one, and any beyond what log p can still rise, gives a direction and an "
    "order, not a size."
)
"""What an effect is, wherever effects are shown."""

CALIBRATED = (
    "A value is {gain:.3g} times the slope of what was measured at these weights, per copy of the row: the run was trained "
    "again without some of its rows, and that is what a nat of slope was worth on average [{low:.3g}, {high:.3g}]. It is a "
    "size for leaving out rows such as were left out there, and varies from row to row."
)
"""What an effect is where retrainings have said how large slopes are."""

SCORE = (
    "A value is the method's own score of the row, in {unit}, not a slope per copy of it: it puts rows in an order, and its "
    "size does not say what a copy of the row would change."
)
"""What a score is that is not such an effect."""

LIMITS = (
    "Effects are slopes at the final weights. A model that has fitted its rows moves far less than they say: in the demo, "
    "another copy of an answer's first row raises log p by less than 0.1 nats where the slope is several nats (whence demo "
    "measures one). Where a slope is more than log p can rise at all, the row says so.",
    "Scores are first-order estimates at the final weights, for a training run taken to have converged. They are not proof of "
    "cause: take the rows out, train again, and see.",
    "Estimates for deep networks can be fragile: they may change with the seed, the depth and the damping (Basu, Pope and "
    "Feizi, 2020, Influence Functions in Deep Learning Are Fragile), and one study found them poor on language models in most "
    "settings (Li et al., 2025, Do Influence Functions Work on Large Language Models?).",
    "Only what goes through the tracked modules is seen, and the curvature is approximated block by block.",
    "Effects of many rows do not simply add up, and the order of the rows in training is not considered.",
)
"""What no reader of scores should forget."""

CALIBRATED_LIMIT = (
    "Sizes are calibrated on retrainings of this run that left out a few rows at a time. Another model, other rows or many "
    "rows at once are another question, and adding copies of a row does not do the opposite of leaving it out."
)
"""The first of these where effects are calibrated."""

OTHER_LIMITS = (
    "Scores are in a unit of the method's own: they put rows in an order, but say nothing about the size of an effect.",
    "They are not proof of cause: take the rows out, train again, and see. How well each method's order predicts that on small "
    "models is measured by make quality.",
)
"""The same of scores that are no slopes per copy."""

HUB_TOP = 10
"""A hub is in the top so many of more than half of the queries."""

FAR = 1000
"""How many times the most that log p can rise a slope is, where not even the order is to be trusted without a retraining."""

EXCLUDED = -7.0
"""Log-probability per token below which the model all but excludes an answer: p below 0.001."""


def query_of(scores: Scores, number: int) -> dict[str, Any]:
    """The query's columns, numbered; what is not known is None."""
    row = scores.queries.iloc[number].to_dict()
    return {"query": number} | {key: None if missing(value) else value for key, value in row.items()}


def unit(scores: Scores) -> str:
    """The unit of one effect: "nats" of "nats per copy"."""
    return scores.unit.removesuffix(" per copy")


def measurement(scores: Scores, number: int) -> str:
    """What was measured of the query: "log p(answer)"."""
    if scores.query_ids == ["self"]:
        return "log p of the row itself"
    what = MEASURED.get(str(scores.about.get("measurement")), "what was measured")
    return f"{what} minus the same of the contrast" if query_of(scores, number).get("contrast") else what


def is_slope(scores: Scores) -> bool:
    """Whether values are slopes of what was measured per copy of the row, or these normalised."""
    return bool(scores.about.get("normalised")) or " per copy" in scores.unit


def size(scores: Scores) -> str:
    """Whether values are as large as retrainings say ("calibrated on 23 retrainings: ..."), or slopes; else empty."""
    known = scores.about.get("calibration")
    if not is_slope(scores) or known is None or (known.get("certain") and scores.gain == 1.0):
        return NOT_CALIBRATED if is_slope(scores) else ""
    return known["says"]


def meaning(scores: Scores) -> str:
    """What a value is."""
    if scores.gain != 1.0:
        return CALIBRATED.format(**scores.about["calibration"])
    return SLOPE if is_slope(scores) else SCORE.format(unit=scores.unit)


def limits(scores: Scores) -> tuple[str, ...]:
    """What no reader of these scores should forget."""
    if scores.gain != 1.0:
        return (CALIBRATED_LIMIT, *LIMITS[1:])
    return LIMITS if is_slope(scores) else OTHER_LIMITS


def direction(scores: Scores) -> str:
    """What the sign of a value says, if anything."""
    return "above 0 raises what was measured, below 0 lowers it" if scores.directed else "a higher score puts the row first"


def sign(scores: Scores, number: int) -> str:
    """What a positive score says, and in which unit."""
    what = measurement(scores, number)
    if not scores.directed:
        return f"scores by {scores.made_by}, in {scores.unit}: a higher one puts the row first, and raises nothing"
    if not is_slope(scores):
        return f"raises / lowers {what}, by {scores.made_by}, in {scores.unit}: read the order, not the size"
    if scores.about.get("normalised"):
        return f"raises / lowers: the slope of {what} per copy of the row, as {unit(scores)}"
    per_copy = f"in {scores.unit} of the row, N = {many(scores.n_train, 'row')}"
    if scores.gain != 1.0:
        retrained = f"calibrated on {scores.about['calibration']['retrainings']} retrainings ({scores.gain:.3g} x the slope)"
        return f"raises / lowers {what}, {retrained}, {per_copy}"
    return f"raises / lowers: the slope of {what} at these weights, {per_copy}"


def measured(scores: Scores, number: int) -> str:
    """The query's measurement in numbers, and who wrote its answer; empty where nothing was measured."""
    query = query_of(scores, number)
    if query.get("measured") is None:
        return ""
    name = {"logprob": "log p", "loss": "loss", "margin": "log-odds"}.get(str(scores.about.get("measurement")), "measured")
    if query.get("contrast"):
        name += " over that of the contrast"
    tokens = f" over {query['tokens']:.0f} token{'s' * (query['tokens'] != 1)}" if query.get("tokens") else ""
    source = f", {query['source']}" if query.get("source") else ""
    log_p = _chance(scores, number)
    likely = "" if log_p is None else f" (p = {probability(log_p)})"
    return f"{name} {two_places(query['measured'])} nats{tokens}{likely}{source}"


def two_places(value: float) -> str:
    """A number with two places, or with three digits where that would say 0.00: -3.50, -0.0047."""
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else three_digits(value).lstrip("+")


def probability(log_p: float) -> str:
    """A probability in three digits, near 1 as what is missing: 0.741, 1 - 4.7e-06."""
    return f"{math.exp(log_p):.3g}" if log_p < -1e-3 or log_p == 0 else f"1 - {-math.expm1(log_p):.2g}"


def ceiling(scores: Scores, number: int) -> str:
    """What to make of effects that are more than log p can rise; empty where nothing bounds it."""
    room = scores.room(number)
    if room is None:
        return ""
    what = "the loss can fall" if scores.about.get("measurement") == "loss" else "log p can rise"
    top = float(np.nanmax(np.abs(scores.values[number]))) / max(room, np.finfo(float).tiny)
    order = "its order and not its size"
    if top > FAR:
        order = (
            f"its order and not its size, and the largest being {top:,.0f} times that, even its order "
            "with doubt: the model fits its rows so closely that slopes hold for next to nothing"
        )
    return (
        f"{what} by {two_places(room)} nats at most{_before(scores, number)}: a larger effect is beyond first order, so read "
        f"{order}; log-odds have no such bound (score with --measurement margin)"
    )


def impossible(scores: Scores, number: int, change: float) -> str:
    """That what was measured can't change by so much, with the probability before and the bound; empty where it can.

    "beyond first order: at most +0.120, from p = 0.887".
    """
    if not scores.exceeds(np.array([change]), number)[0]:
        return ""
    return f"beyond first order: {bound(scores, number)}{_before(scores, number)}"


def _before(scores: Scores, number: int) -> str:
    """From which probability an answer's rises, where it has one: ", from p = 0.887"."""
    log_p = _chance(scores, number)
    return "" if log_p is None else f", from p = {probability(log_p)}"


def _chance(scores: Scores, number: int) -> float | None:
    """The log-probability of a query's answer where it is that of something discrete, in nats."""
    return scores.log_p(number) if scores.about.get("likelihood", "probability") == "probability" else None


SHARE = (
    "share: of all that rows push and pull (the sum of their absolute slopes), how much comes from the rows of a stage; net: "
    "what one more copy of every row of it would change, to first order"
)
"""What the columns of `StagedScores.shares` say."""


def modules_line(table: Any, stage: str) -> str:
    """Which modules of a stage the one before has, too, in a line: "12 modules shared (81.0% of the parameters), 2 new"."""
    own = table[table["stage"] == stage]
    counts = own.groupby("status", sort=False).agg(count=("share", "size"), share=("share", "sum"))
    said = (f"{entry['count']:.0f} {status} ({entry['share']:.1%})" for status, entry in counts.iterrows())
    return f"modules of {stage}, beside those before it (share of the parameters): {', '.join(said)}"


def stage_line(staged: Any, stage: str) -> str:
    """How weights reach a stage from the one before, and the modules that these share."""
    return f"{staged.about[stage]['transport']}; {modules_line(staged.table, stage)}"


UNSHARED = 12
"""Modules that are listed by name."""


def unshared_lines(table: Any) -> list[str]:
    """The modules that only one of two stages has, a line each."""
    rest = table[~table["status"].isin(PASSES)].to_dict("records")
    lines = []
    for entry in rest[:UNSHARED]:
        name = entry["before"] if missing(entry["module"]) else entry["module"]
        lines.append(
            f"  {entry['status']:<6} {name}  {entry['shape']}, {entry['share']:.2%} of the parameters of {entry['stage']}"
        )
    return lines + ([f"  and {len(rest) - UNSHARED} more"] if len(rest) > UNSHARED else [])


def doubts(scores: Scores, hubs: int) -> list[str]:
    """What the reader should know before believing the order of these scores, which have so many hubs."""
    notes = left_out(scores)
    if hubs:
        rows = f"{hubs} row is" if hubs == 1 else f"{hubs} rows are"
        notes.append(
            f"hub: {rows} in the top {HUB_TOP} of more than half of the {len(scores.queries)} queries, whatever is asked "
            f"[WHENCE-20]; try --norm cosine or relatif"
        )
    weak = [number for number in range(len(scores.queries)) if excluded(scores, number)]
    if weak:
        listed = ", ".join(str(number) for number in weak[:5])
        notes.append(f"the model all but excludes the answer of query {listed} (p below 0.001 per token) [WHENCE-22]")
    if scores.about.get("rank"):
        kept = scores.queries["energy"].min()
        notes.append(f"queries at rank {scores.about['rank']}: {kept:.1%} of a query's energy kept at least")
    return [*notes, TRUST if is_slope(scores) else OTHER_TRUST]


def left_out(scores: Scores) -> list[str]:
    """Of scores of candidates, which rows have none, and what an audit says of these; nothing where all rows have one."""
    about = scores.about.get("candidates")
    if about is None:
        return []
    lines = [
        f"{about['scored']:,} of {about['of']:,} rows were candidates ({about['text']}); the other {about['left_out']:,} were "
        f"not scored, and appear in no ranking here"
    ]
    if (audit := about["audit"]) is None:
        return [*lines, "how many of the best rows are among the candidates is not known: --audit 10% bounds it"]
    sure = f"with {audit['confidence']:.0%} confidence: {audit['rows']:,} of the others were drawn and scored too"
    for k, recall in audit["recall"].items():
        low, best = recall["at_least"], recall["at_best"]
        held = f"{low[0]:.2f}"
        if len(low) > 1:
            held = f"{min(low):.2f} to {max(low):.2f} by query ({np.mean(low):.2f} on average), each"
        lines.append(
            f"candidates hold at least {held} of the {k} best of all rows by {audit['reference']}, {sure}; had nothing been "
            f"missed, that many could certify {best:.2f}"
        )
    return lines


def rare_words(part: Keywords) -> str:
    """How many of a query's top rows share a rare word with it, and how many of as many random rows would."""
    named = ", ".join(visible(word) for word in part.words[:6]) + (", ..." if len(part.words) > 6 else "")
    top = f"in {part.top} of the top {part.rows} rows, {part.expected:.1f} of random ones"
    return f"rare words of the {part.part} ({named}): {top}"


def excluded(scores: Scores, number: int) -> bool:
    """Whether the model would hardly ever give the query's answer."""
    query = query_of(scores, number)
    asked = scores.about.get("measurement") == "logprob" and query.get("tokens") and not query.get("contrast")
    measured = query.get("measured")  # nothing in a sum over several models
    return bool(asked and measured is not None and measured / query["tokens"] < EXCLUDED)


def missing(value: Any) -> bool:
    """Whether a table's cell is empty."""
    return value is None or (isinstance(value, float) and math.isnan(value))
