"""What the scores of a run promise, done on that run: rows are left out, and its own training is repeated.

`Q` queries, `N` rows, `K` retrainings, `D` sets of rows that one way of choosing gives a query, `O` orders of the rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from whence import dist
from whence.engine.forward import losses_of, measured_of
from whence.engine.stream import Examples
from whence.errors import UsageError
from whence.linalg.stats import RANK_RESAMPLES, Interval, bootstrap, bootstrap_groups, ends, spearman, spread
from whence.methods.base import Request, recipe_named
from whence.progress import note
from whence.store.files import write_json
from whence.store.intact import read_json
from whence.store.plain import plain
from whence.store.scores import Scores
from whence.store.shown import NOT_CALIBRATED
from whence.train.patch import ending_rate, patch
from whence.train.replay import Run
from whence.train.replicas import announce, at_once
from whence.train.retrain import Retrained, retrain
from whence.validate.bank import Bank, Spec, plain_spec, save_bank
from whence.validate.lds import CEILING, ceiling, compare, lds
from whence.validate.results import Result

BESIDE = ("removal", "tail-patch")
"""Checks whose CHECK.json beside the scores tells those who read them what was found."""

SCORES, RANDOM, OTHERS = "the scores", "chance", "the scores of another query"

CHOSEN = {
    "bm25": "the words of the query (BM25)",
    "loss": "the highest loss per token",
    "length": "length",
    "gradient-norm": "the norm of the gradient",
}
"""What chooses rows without attribution."""

TRIALS = {"fall": "retrainings", "rise": "sets of rows"}
"""What is counted, by how what is measured moves."""

QUERIES, DRAWS = 8, 4
"""Queries whose rows are left out, and random sets of rows, by default."""


@dataclass(frozen=True)
class Removals:
    """Which rows are left out, and how often."""

    rows: int | None = None
    """None: the fraction of them."""
    fraction: float = 0.01
    queries: int = QUERIES
    """Whose rows are left out, spread evenly over those there are; all are measured."""
    jointly: bool = False
    """Rows are chosen for these queries together, not for each by itself."""
    draws: int = DRAWS
    orders: int = 1
    """Orders of the rows in which it is done, the first as recorded."""
    seed: int = 0
    drift: float = 0.01
    together: int | None = None
    """Retrainings that go side by side; None: by the work in a batch."""

    def count(self, of: int) -> int:
        """How many rows are left out. Raises UsageError where that is none, or all."""
        rows = self.rows if self.rows is not None else max(1, round(self.fraction * of))
        if not 0 < rows < of:
            raise UsageError(f"{rows:,} rows can't be left out.", accepted=f"1 to {of - 1:,}", fix="--rows 5")
        return rows


def check_without(
    request: Request, scores: Scores, chosen: Removals, *, held_out: Examples | None = None, out: Path | None = None
) -> Result:
    """Repeat the request's training without the rows on top of the scores, and without rows that other things choose.

    Of each query it is told how much less is measured of it than after the training repeated with all rows, and whether the
    scores' own rows do more than those of every control. From all retrainings together follows what a nat of the scores is
    worth (`calibration`). In the folder `out` each retraining is kept, and killed work resumes.

    Raises UsageError where the training can't be repeated, or where there are not that many rows.
    """
    began, point, asked = time.monotonic(), request.point, request.asked
    tried = _choose(request, scores, chosen)
    parts = _retrained(request, tried.weights_KN, chosen, held_out, out)
    falls_OKQ, rises_OK = tried.sign * np.stack([part.falls for part in parts]), np.stack([part.rises for part in parts])
    recorded_Q = tried.sign * measured_of(point, asked).numpy()
    table, per_query, stands = _compared(tried, "fall", falls_OKQ, rises_OK, recorded_Q, asked.ids)
    away_Q = recorded_Q - tried.sign * parts[0].whole[:-1]
    control = {"rows chosen by": "nothing: repeated as it was", "retrainings": 1}
    table.append(control | bootstrap(away_Q[tried.queries]).columns("fall"))
    sentence = _sentence(f"Retrained without the {tried.what}", "falls", tried, table[0], stands)
    calibration = calibrated((1 - tried.weights_KN) @ tried.rankings[SCORES].T, falls_OKQ.mean(0), scores)
    says = [
        sentence,
        str(parts[0].repeated),
        f"repeated as it was, it changes what is measured by {np.abs(away_Q).max():.1e} nats at most",
        calibration["says"],
    ]
    about = {
        "repeated": asdict(parts[0].repeated) if parts[0].repeated else None,
        "calibration": calibration,
        "orders": chosen.orders,
        "retrainings": len(tried.weights_KN) * chosen.orders,
    }
    about |= _about(tried, stands, sentence, began)
    titles = (f"Fall of log p without {tried.rows} of {len(point.examples)} rows, nats", "Query by query")
    arrays = {"left_out": tried.sets, "falls": falls_OKQ, "rises": rises_OK}
    says += [] if held_out else [NOT_HELD_OUT]
    tables = dict(zip(titles, (table, per_query), strict=True))
    return Result("removal", about, tables, says, [], arrays, "Retrained without rows")


def check_patch(
    request: Request,
    scores: Scores,
    chosen: Removals,
    *,
    steps: int = 1,
    held_out: Examples | None = None,
    out: Path | None = None,
) -> Result:
    """The same question for a model too large to retrain: a few more steps on these rows (tail-patch).

    Of each query it is told how much more is measured of it than before the steps, which begin at the final weights for each
    set of rows, and whether the scores' own rows do more than those of every control (Chang et al. 2024).

    Raises UsageError where how the training moved the weights is unknown, or where there are not that many rows.
    """
    began, point, asked = time.monotonic(), request.point, request.asked
    assert request.training is not None
    tried = _choose(request, scores, chosen)
    found = patch(request.training, tried.sets, point, asked, steps=steps, held_out=held_out, out=out and out / "patched")
    rises_OKQ, losses_OK = -tried.sign * found.falls[None], found.rises[None]
    before_Q = tried.sign * found.whole[:-1]
    table, per_query, stands = _compared(tried, "rise", rises_OKQ, losses_OK, before_Q, asked.ids)
    many = "one more step" if steps == 1 else f"{steps} more steps"
    sentence = _sentence(f"After {many} on the {tried.what}", "rises", tried, table[0], stands)
    rate = ending_rate(request.training)
    how = f"with the training's optimizer at the mean rate of its last epoch, {rate:.2g}"
    says = [sentence, f"from the final weights for each set of rows, {how}"]
    says += [] if held_out else [NOT_HELD_OUT]
    about = {"steps": steps, "learning_rate": rate, "sets": len(tried.sets), **_about(tried, stands, sentence, began)}
    titles = (f"Rise of log p after {many} on {tried.rows} of {len(point.examples)} rows, nats", "Query by query")
    arrays = {"rows": tried.sets, "rises_of_log_p": rises_OKQ[0], "rises": losses_OK[0]}
    tables = dict(zip(titles, (table, per_query), strict=True))
    return Result("tail-patch", about, tables, says, [], arrays, "One more step on rows")


def check_subsets(
    request: Request,
    scores: Scores,
    spec: Spec,
    *,
    held_out: Examples | None = None,
    drift: float = 0.01,
    together: int | None = None,
    out: Path | None = None,
    bank: Path,
) -> Result:
    """The LDS of the scores: the request's training repeated on many subsets, kept as a retraining bank in the file `bank`."""
    began, chosen = time.monotonic(), Removals(orders=len(spec.seeds), drift=drift, together=together)
    kept_KN = spec.masks(len(request.point.examples))
    parts = _retrained(request, spec.weights(kept_KN), chosen, held_out, out)
    measured_SKQ, whole_SQ = np.stack([part.measured for part in parts]), np.stack([part.whole[:-1] for part in parts])
    assert request.training is not None
    about = {
        "spec": plain_spec(spec),
        "setting": {"training": request.training.identity()},
        "seconds": time.monotonic() - began,
    }
    made = Bank(kept_KN, (measured_SKQ - whole_SQ[:, None]).astype(np.float32), whole_SQ.astype(np.float32), about)
    dist.on_first(save_bank, made, bank)
    found = {name: lds(raw_QN, made) for name, raw_QN in {SCORES: scores.raw, **other_rankings(request)}.items()}
    rows, own = compare(found, SCORES), found[SCORES].interval
    if chosen.orders > 1:
        noise = ceiling(made).interval
        rows.append({"method": CEILING.replace("seed", "order"), "lds": noise.mean, "low": noise.low, "high": noise.high})
    behind = [name for name, other in found.items() if name != SCORES and found[SCORES].minus(other).low > 0]
    what = "half of the rows" if spec.kind == "halves" else f"{spec.share:.1%} of the rows"
    says = [
        f"Retrained on {spec.subsets} subsets, each without {what}: the LDS of the scores is {_shown(own)}"
        f"{'' if own.low > 0 else ', no better than chance'}",
        f"significantly (paired 95 %) better than: {', '.join(behind) or 'none of the others'}",
        f"kept as {bank}, which whence compare measures other methods by",
    ]
    known = {"setting": "run", "kind": spec.kind, "subsets": spec.subsets, "seconds": round(time.monotonic() - began, 1)}
    return Result("lds", known, {f"LDS, {spec.kind}": rows}, says, heading="Retrained on subsets")


def other_rankings(request: Request) -> dict[str, np.ndarray]:
    """What chooses rows without attribution, `[Q, N]` by what it is called; without texts none by words."""
    point, queries = request.point, len(request.asked)
    per_token = [max(1, point.task.predictions(item)) for item in point.examples.items]
    found = {
        "loss": np.tile(losses_of(point).numpy() / per_token, (queries, 1)),
        "length": np.tile(np.asarray(point.examples.sizes, float), (queries, 1)),
    }
    for name in ("bm25", "gradient-norm"):
        try:
            found[name] = recipe_named(name).make(request, recipe_named(name).settings()).raw
        except UsageError as error:
            note(f"no rows are chosen by {CHOSEN[name]}: {error.what}")
    return {CHOSEN[name]: found[name] for name in CHOSEN if name in found}


def calibrated(predicted_KQ: np.ndarray, measured_KQ: np.ndarray, scores: Scores) -> dict[str, Any]:
    """What is measured for each nat that the scores predict: least squares through 0 over all retrainings and queries.

    The interval is of queries drawn again, and the gain is `certain` where that is above 0 and no wider than `WIDEST` says;
    `held_out_slope` is the regression of what was measured of each query on what the others' gain predicts.
    """
    both_Q, own_Q = (predicted_KQ * measured_KQ).sum(0), np.square(predicted_KQ).sum(0)
    rho = spearman(predicted_KQ.T, measured_KQ.T)
    known: dict[str, Any] = {"retrainings": len(predicted_KQ), "correlation": float(np.nanmean(rho)), "unit": scores.unit}
    known |= {name: scores.about.get(name) for name in ("operator", "measurement")}
    if not own_Q.any():
        return {**known, "gain": None, "says": NOT_CALIBRATED + ": the scores predict nothing"}
    gain, (low, high), slope = float(both_Q.sum() / own_Q.sum()), (np.nan, np.nan), None
    if len(own_Q) > 1:
        drawn = np.random.default_rng(0).integers(len(own_Q), size=(RANK_RESAMPLES, len(own_Q)))
        low, high = ends(both_Q[drawn].sum(1) / own_Q[drawn].sum(1).clip(np.finfo(float).tiny))
        others_Q = (both_Q.sum() - both_Q) / (own_Q.sum() - own_Q).clip(np.finfo(float).tiny)
        slope = float((others_Q * both_Q).sum() / max((others_Q**2 * own_Q).sum(), np.finfo(float).tiny))
    certain = bool(low > 0 and high < WIDEST * low)
    known |= {"gain": gain, "low": low, "high": high, "held_out_slope": slope, "certain": certain}
    if not certain:
        between = "" if np.isnan(low) else f": {low:.3g} to {high:.3g} times as much"
        return {
            **known,
            "says": f"{NOT_CALIBRATED} ({len(predicted_KQ)} retrainings leave open what a nat of it is worth{between})",
        }
    return {
        **known,
        "says": f"calibrated on {len(predicted_KQ)} retrainings: leaving rows out changed log p by {gain:.3g} "
        f"[{low:.3g}, {high:.3g}] times the slope at these weights",
    }


NOT_HELD_OUT = "no held-out rows are at hand: the rise of their loss was not measured"

WIDEST = 10
"""A gain is unknown if its interval ends at more than this many times where it begins."""


def keep_beside(result: Result, scores: Path) -> None:
    """Record beside the scores what a check found of them."""
    names = ("sentence", "calibration", "stands_out", "rows", "queries", "retrainings", "steps", "sets")
    known = {name: result.about[name] for name in names if name in result.about}
    write_json(scores / f"{result.check}.json", {result.check: plain(known)})


def read_beside(scores: Path) -> dict[str, dict[str, Any]]:
    """What the checks that were made found of the scores in a folder, by check. Raises StaleArtifact for a damaged file."""
    files = {check: scores / f"{check}.json" for check in BESIDE}
    return {check: read_json(file)[check] for check, file in files.items() if file.is_file()}


def read_calibration(scores: Path) -> dict[str, Any] | None:
    """What a nat of scores in a folder is worth, by retrainings for these or else for those of its run; None without any."""
    found = read_beside(scores).get("removal") or read_beside(scores.parent / "scores").get("removal")
    return found["calibration"] if found else None


def _retrained(
    request: Request, weights_KN: np.ndarray, chosen: Removals, held_out: Examples | None, out: Path | None
) -> list[Retrained]:
    """The retrainings, in each of the orders."""
    assert request.training is not None
    point, training = request.point, request.training
    run = Run(point.model, point.task, point.examples, training.replay())
    side = chosen.together or at_once(run, len(weights_KN))
    count = (len(weights_KN) + 1) * chosen.orders
    disk_bytes = 8 * count * (len(request.asked) + 1) + run.start()[0].nbytes
    announce(run, count, count * len(run), side, disk_bytes)
    given = {"held_out": held_out, "together": side, "drift": chosen.drift}
    places = [out / f"order-{order}" if out is not None else None for order in range(chosen.orders)]
    return [
        retrain(training, weights_KN, point, request.asked, order=order, out=place, **given)
        for order, place in enumerate(places)
    ]


@dataclass(frozen=True)
class _Tried:
    """Sets of rows, chosen in several ways for each of some queries."""

    rankings: Mapping[str, np.ndarray]
    """What chooses them, `[Q, N]`; the highest come first."""
    queries: np.ndarray
    """For which queries."""
    rows: int
    """In a set."""
    weights_KN: np.ndarray
    """How often rows count without a set, each different one once."""
    places: Mapping[str, np.ndarray]
    """Which of these each way has, `[D, Q]`."""
    sign: float
    """Of what is measured, so that more is always a higher log-probability."""

    @property
    def sets(self) -> list[list[int]]:
        """Their rows."""
        return [np.flatnonzero(weights_N == 0).tolist() for weights_N in self.weights_KN]

    @property
    def what(self) -> str:
        """What the scores put on top."""
        return f"{'row' if self.rows == 1 else f'{self.rows} rows'} that the scores put on top"


def _choose(request: Request, scores: Scores, chosen: Removals) -> _Tried:
    """The rows on top of the scores and of all other rankings, of another query, and by chance."""
    sign = -1.0 if scores.about.get("measurement") == "loss" else 1.0
    rankings = {SCORES: sign * scores.values, **other_rankings(request)}
    queries, rows = np.array(spread(len(request.asked), chosen.queries)), chosen.count(len(request.point.examples))

    def tops(ranking_QN: np.ndarray) -> np.ndarray:
        own = ranking_QN[queries]
        own = np.tile(own.sum(0), (len(queries), 1)) if chosen.jointly else own
        return np.argsort(-own, axis=1, kind="stable")[None, :, :rows]

    sets = {name: tops(ranking) for name, ranking in rankings.items()}  # [D, Q, rows] each
    if len(queries) > 1 and not chosen.jointly:
        sets[OTHERS] = np.stack([np.roll(sets[SCORES][0], shift, axis=0) for shift in range(1, len(queries))])
    draw, of = np.random.default_rng(chosen.seed), rankings[SCORES].shape[1]
    drawn = np.stack([draw.choice(of, rows, replace=False) for _ in range(chosen.draws)])
    sets[RANDOM] = np.tile(drawn[:, None], (1, len(queries), 1))
    every = np.concatenate([rows_DQR.reshape(-1, rows) for rows_DQR in sets.values()])
    weights_LN = np.ones((len(every), of))
    np.put_along_axis(weights_LN, every, 0.0, axis=1)
    weights_KN, found_L = np.unique(weights_LN, axis=0, return_inverse=True)
    ends_of = np.cumsum([rows_DQR.shape[0] * rows_DQR.shape[1] for rows_DQR in sets.values()])
    parts = np.split(found_L.reshape(-1), ends_of[:-1])
    places = {name: part.reshape(rows_DQR.shape[:2]) for (name, rows_DQR), part in zip(sets.items(), parts, strict=True)}
    return _Tried(rankings, queries, rows, weights_KN, places, sign)


def _compared(
    tried: _Tried, what: str, moves_OKQ: np.ndarray, rises_OK: np.ndarray, before_Q: np.ndarray, ids: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, bool | None]]:
    """A row for each way of choosing, a row for each query, and above which ways the scores stand out; None: can't tell.

    `what` (a fall, a rise) is what the moves are, of the measurements and of the held-out loss.
    """
    moves = {name: moves_OKQ[:, places_DQ, tried.queries] for name, places_DQ in tried.places.items()}  # [O, D, Q]
    table, stands, orders = [], {}, len(moves_OKQ)
    for name, moves_ODQ in moves.items():
        row: dict[str, Any] = {"rows chosen by": name, TRIALS[what]: len(np.unique(tried.places[name])) * orders}
        row |= _interval(moves_ODQ).columns(what)
        if name != SCORES:
            more = _interval(moves[SCORES] - moves_ODQ)
            stands[name] = None if np.isnan(more.low) else bool(more.low > 0)
            row |= more.columns("scores_more") | {"stands_out": {True: "yes", False: "no", None: "can't tell"}[stands[name]]}
        table.append(row | {"held_out_rise": float(rises_OK[:, tried.places[name]].mean())})
    per_query = [
        {"query": ids[query], "log_p": float(before_Q[query])}
        | {name: float(moves_ODQ[..., place].mean()) for name, moves_ODQ in moves.items()}
        for place, query in enumerate(tried.queries)
    ]
    return table, per_query, stands


def _about(tried: _Tried, stands: Mapping[str, bool | None], sentence: str, began: float) -> dict[str, Any]:
    return {
        "rows": tried.rows,
        "of": tried.weights_KN.shape[1],
        "queries": len(tried.queries),
        "stands_out": stands,
        "sentence": sentence,
        "seconds": round(time.monotonic() - began, 1),
    }


def _interval(values_ODQ: np.ndarray) -> Interval:
    """Their mean over queries; of a single query the orders and draws are what it varies over."""
    groups = np.moveaxis(values_ODQ, 2, 0).reshape(values_ODQ.shape[2], -1)
    return bootstrap(groups[0]) if len(groups) == 1 else bootstrap_groups(list(groups))


def _sentence(began: str, moves: str, tried: _Tried, own: Mapping[str, Any], stands: Mapping[str, bool | None]) -> str:
    """What was found."""
    queries, what = len(tried.queries), moves.removesuffix("s")
    moved = Interval(own[what], own[f"{what}_low"], own[f"{what}_high"], queries)
    above = [name for name, out in stands.items() if out]
    below = [name for name, out in stands.items() if out is False]
    unsure = [name for name, out in stands.items() if out is None]
    asked = "the answer" if queries == 1 else f"the answers to {queries} queries"
    parts = [f"stands out above rows chosen by {_joined(above)}"] if above else []
    parts += [f"does not stand out above those chosen by {_joined(below)}"] if below else []
    more = "more queries, or --orders 3" if what == "fall" else "more queries"
    parts += [f"can't be told from those chosen by {_joined(unsure)} ({more})"] if unsure else []
    return f"{began}, log p of {asked} {moves} by {_shown(moved)} nats on average, which {', but '.join(parts)}."


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _shown(found: Interval) -> str:
    return f"{found.mean:.3g}" + (f" [{found.low:.3g}, {found.high:.3g}]" if np.isfinite(found.low) else "")
