"""Scores of several stages of training side by side, and what they come to together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whence.data.content import content_digest
from whence.data.rows import numbered
from whence.stages.stage import Stage
from whence.store.manifest import Folder, refuse_other_kind
from whence.store.scores import Scores, open_scores

if TYPE_CHECKING:
    import pandas

FILE, TABLE, CONTENTS = "stages.json", "modules.parquet", "contents.parquet"


@dataclass(frozen=True)
class StagedScores:
    """One `Scores` per stage, oldest first: values are in nats per copy of a row of that stage.

    staged.stages["pretraining"].top(query=0)
    staged.total().top(query=0)         # the rows of all stages
    staged.shares()                     # how much of the effect came through which stage
    """

    stages: Mapping[str, Scores]
    table: pandas.DataFrame
    """Tracked modules of each stage but the first: stage, module, before (its name in the stage before), shape, parameters,
    share (of the parameters), status: "shared", "new", or "gone"."""
    contents: pandas.DataFrame
    """Of each stage's rows in their order: stage, content (a hash, by which a row is known in other stages)."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Of each stage but the first, its transport."""

    def total(self) -> Scores:
        """All rows of all stages, in one table: a row that occurs in several stages has the sum of its values there.

        That is the effect of one more copy in each of them. Rows are the same whose content is, whatever their ids; the second
        copy in one stage is the second in the other. `examples` has a column `stage`, such as "pretraining+finetuning".
        """
        import pandas

        first, *_ = self.stages.values()
        contents = [
            name for stage in self.stages for name in numbered(self.contents.loc[self.contents["stage"] == stage, "content"])
        ]
        tables = [scores.examples.assign(stage=stage) for stage, scores in self.stages.items()]
        every = pandas.concat(tables, ignore_index=True).drop(columns="pieces", errors="ignore")
        place, distinct = pandas.factorize(np.array(contents, dtype=object))
        values_NQ = np.zeros((len(distinct), len(first.queries)))
        np.add.at(values_NQ, place, np.concatenate([scores.values.T for scores in self.stages.values()]).astype(np.float64))
        examples: Any = every.iloc[np.unique(place, return_index=True)[1]].reset_index(drop=True)  # the first of each
        several = every.assign(place=place).groupby("place")
        examples["copies"], examples["stage"] = several["copies"].sum(), several["stage"].agg("+".join)
        taken = examples["id"].duplicated()  # the same id for something else
        examples.loc[taken, "id"] = examples["stage"][taken] + ":" + examples["id"][taken]
        operators = "; ".join(f"{stage}: {scores.about.get('operator')}" for stage, scores in self.stages.items())
        about = {key: value for key, value in first.about.items() if key in ("unit", "measurement", "likelihood")}
        return Scores(values_NQ.T.copy(), 1, examples, first.queries, {**about, "operator": operators})

    def shares(self) -> pandas.DataFrame:
        """Through which stage the effect on each query came: query_id, stage, rows, raises, lowers, net, share.

        `raises` and `lowers` are the sums of a stage's values above and below zero, `net` their sum: the slope for one more
        copy of every row of the stage, in the unit of the values. `share` is `raises - lowers` over its sum of all stages: of
        all that rows push and pull, how much they push and pull from there. Stages can be compared where each was damped as its
        training was: a fine-tuning of a few steps, taken for one to its end, seems to have made everything.
        """
        import pandas

        values = {stage: np.asarray(scores.values, np.float64) for stage, scores in self.stages.items()}
        first, *_ = self.stages.values()
        rows = []
        for number, query in enumerate(first.query_ids):
            every = sum(float(np.abs(each[number]).sum()) for each in values.values())
            for stage, values_QN in values.items():
                own = values_QN[number]
                raises, lowers = float(own.clip(min=0).sum()), float(own.clip(max=0).sum())
                share = (raises - lowers) / every if every else 0.0
                rows.append((query, stage, len(own), raises, lowers, raises + lowers, share))
        return pandas.DataFrame(rows, columns=["query_id", "stage", "rows", "raises", "lowers", "net", "share"])

    def __repr__(self) -> str:
        sizes = (f"{stage}: {scores.shape[0]} x {scores.shape[1]}" for stage, scores in self.stages.items())
        return f"StagedScores({', '.join(sizes)})"


def contents_of(stages: Sequence[Stage]) -> pandas.DataFrame:
    """Of each row of each stage a hash of its content; ids, and what source a row is from, are no part of it."""
    import pandas

    def bare(row: Any) -> Any:
        return {key: value for key, value in row.items() if key not in ("id", "source")} if isinstance(row, Mapping) else row

    pairs = [(stage.name, content_digest(bare(row))) for stage in stages for row in stage.point.examples.rows]
    return pandas.DataFrame(pairs, columns=["stage", "content"])


def open_stages(path: str | Path) -> StagedScores:
    """Read the finished scores of several stages from their folder; StaleArtifact where they are unfinished or damaged."""
    folder = Folder.open(path)
    refuse_other_kind(folder, FILE in folder.manifest["files"], "scores of several stages", "whence score --through")
    known = folder.read_json(FILE)
    stages = {name: open_scores(folder.path / name / "scores") for name in known["stages"]}
    return StagedScores(stages, folder.read_table(TABLE), folder.read_table(CONTENTS), known["about"])
