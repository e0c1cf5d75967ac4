"""Scores of the rows of every stage of training, for what the model of the last one says.

A row `z` of stage k moved the weights where its stage ended, and each later stage carries that on. With `T_j` the derivative of
the weights where stage j ended by those where it began,

    d m / d z = grad m(theta_K)^T T_K ... T_{k+1} (G_k + damping)^-1 grad log p(z; theta_k)

(Chen et al. 2020; Bae et al. 2024 for `T` by gradient flow). All of it but the last factor is on the query's side: what is
asked is differentiated at the last stage's end and multiplied with K - k + 1 operators once, and each row costs a backward pass
and a product at the end of its own stage. The rows of the last stage get the ordinary score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from whence.engine.matrices import matrix_of
from whence.engine.queries import encode_queries
from whence.errors import UsageError
from whence.fitting.curvature import Curvature
from whence.fitting.fit import fit_at
from whence.methods.base import Request
from whence.methods.damping import Damped, damping_of, damping_of_training
from whence.methods.dense import formed, refuse_large
from whence.operators import BlockDiagonal, Operator, Renamed, Spectral
from whence.operators.flat import Flat
from whence.progress import note
from whence.scoring.score import score_points
from whence.settings import Fit, Score
from whence.stages.names import Module, frozen, match, settled, summary_of, table_of, through
from whence.stages.passage import passage
from whence.stages.scores import CONTENTS, FILE, TABLE, StagedScores, contents_of, open_stages
from whence.stages.stage import FORMED, Stage
from whence.store.digest import fingerprint_code
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder
from whence.store.memory import Memory, work

FAR = 10
"""How many times as much the learning rates of a training damp before a smaller damping is remarked on."""


def multistage(
    stages: Sequence[Stage],
    queries: Any,
    settings: Score = Score(),
    *,
    damping: float | Literal["training"] = 0.1,
    out: str | Path | None = None,
    rerun: bool = False,
    **changes: Any,
) -> StagedScores:
    """Score the rows of each stage against queries that are asked of the last stage's model.

    `stages` are trainings in a row, oldest first: `whence.Stage` says where each ended, what it read, and how far it went.
    Where a stage has no curvature, it is fitted on its own rows. `damping` is that of the inverse at the stage of the rows, in
    units of the mean eigenvalue (each module's, for factors), or that of its training. `settings` and `changes` are those of
    `whence.score`.

    With `out` all is kept in that folder (`FOLDER/<stage>/factors`, `FOLDER/<stage>/scores`), and a killed run resumes to the
    same bits; a folder that was made from anything else is refused (StaleArtifact) unless `rerun` moves it aside.

    Raises UsageError, with the modules of both, where those of two stages don't fit, and what `whence.fit` and `whence.score`
    raise.
    """
    settings, damped = Score.of(settings, changes), Damped().changed(damping=damping)
    _refuse(stages, settings)
    stages = settled(stages)
    modules = match(stages)
    for stage in stages[1:]:
        own = [each for each in modules if each.stage == stage.name]
        note(f"{stage.name}: {summary_of(own)}")
        if stage.head == "none" and all(each.status != "shared" for each in own) and stage.transport != "identity":
            note(f"warning: {stage.name} moved no module that it shares with the stage before")
    run = _Run(stages, modules, queries, settings, damped)
    with work(out, run.provenance, rerun=rerun) as folder:
        if isinstance(folder, Folder) and folder.finished:
            note(f"{folder.path} is finished and unchanged: nothing to compute")
            return open_stages(folder.path)
        result = run.scores(folder)
        if isinstance(folder, Folder):
            folder.save_table(TABLE, result.table)
            folder.save_table(CONTENTS, result.contents)
            folder.write_json(FILE, {"stages": [each.name for each in stages], "about": result.about})
            folder.finish()
        return result


@dataclass(frozen=True)
class _Run:
    """What its steps have in common."""

    stages: Sequence[Stage]
    modules: Sequence[Module]
    queries: Any
    settings: Score
    damping: Damped

    def scores(self, folder: Folder | Memory) -> StagedScores:
        """Those of every stage, the last one's first, since its operator is part of all others."""
        names, last = through(self.stages, self.modules), self.stages[-1]
        later: Operator | None = None
        found, about = {}, {}
        for number in reversed(range(len(self.stages))):
            stage, place = self.stages[number], _place(folder, self.stages[number])
            curvature = self.curvature(stage, place)
            coupled = self.coupled(stage, curvature, names[stage.name]) if later else {}
            inverse = Renamed(self.inverse(stage, curvature), names[stage.name], coupled)
            operator = inverse if later is None else inverse @ later
            renamed = {name: there for name, there in {**names[stage.name], **coupled}.items() if name != there}
            settings = self.settings.changed(n_train=stage.n_train)
            given: dict[str, Any] = {"names": renamed, "out": place("scores")}
            at = last.point if stage is last else last.point.passing(frozen(last, self.modules))
            note(f"{stage.name}: scores of its rows")
            found[stage.name] = score_points(at, stage.point, self.queries, operator, settings, **given)
            if number:
                back = passage(stage, curvature, self.modules, self.damped(stage), out=place("head"))
                passed = Renamed(back, names[stage.name])
                later = passed if later is None else passed @ later
                about[stage.name] = {"transport": passed.label}
        for stage in self.stages:  # what was needed on the way only
            for part in ("head", "matrix"):
                folder.discard(f"{stage.name}/{part}")
        ordered = {stage.name: found[stage.name] for stage in self.stages}
        told = {name: about[name] for name in ordered if name in about}
        return StagedScores(ordered, table_of(self.modules), contents_of(self.stages), told)

    def coupled(self, stage: Stage, curvature: BlockDiagonal | Spectral, names: Mapping[str, str]) -> dict[str, str]:
        """Modules of a stage that lead nowhere, such as its own head, but move with the others: by names that no model has."""
        rest = set(curvature.names) - set(names.values()) if isinstance(curvature, Spectral) else set()
        return {f"{stage.name}/{name}": name for name in curvature.names if name in rest}

    def curvature(self, stage: Stage, place: Callable[[str], Path | None]) -> BlockDiagonal | Spectral:
        """The one that was given, or that of the stage's own rows."""
        given = stage.curvature
        if isinstance(given, Curvature):
            return _blocks(given)
        if isinstance(given, BlockDiagonal | Spectral):
            return given
        note(f"{stage.name}: curvature of its own rows")
        if given in FORMED:
            return form(stage, given, out=place("matrix"))  # type: ignore[arg-type]
        chosen = given if isinstance(given, Fit) else Fit(method=given or "ekfac", check=self.settings.check)  # type: ignore[arg-type]
        if chosen is not given:
            chosen = chosen.changed(precision=self.settings.precision)
        return _blocks(fit_at(stage.point, chosen.changed(modules=stage.names), out=place("factors")))

    def inverse(self, stage: Stage, curvature: BlockDiagonal | Spectral) -> Operator:
        """`(G + damping)^-1` at the stage of the rows."""
        request = Request(stage.point, self.queries, training=stage.training, modules=stage.names)
        damping = damping_of(request, self.damped(stage))
        if damping.relative:
            self.note_unfinished(stage, request, damping.factor * mean_eigenvalue(curvature))
            return curvature.inverse(damping.factor)
        if isinstance(curvature, BlockDiagonal):
            return damping.inverse(Curvature(curvature, {}))
        if damping.metric is None:
            return curvature.inverse(absolute=damping.factor)
        return damping.root @ curvature.between(damping.root).inverse(absolute=damping.factor) @ damping.root  # type: ignore[arg-type]

    def note_unfinished(self, stage: Stage, request: Request, damping: float) -> None:
        """Say where the damping takes a training for gone much further than it went, which makes its values too large."""
        try:
            own = damping_of_training(request).mean if stage.training is not None else 0.0
        except UsageError:  # it is not known how its optimizer moved the weights
            return
        if own > FAR * damping:
            note(
                f"warning: {stage.name} stopped early: its learning rates damp {own / damping:,.0f} times as much as damping="
                f"{self.damped(stage).relative:g} does, with which its rows' values are those of a far longer training; "
                'damping="training" is as far as it went'
            )

    def damped(self, stage: Stage) -> Damped:
        """How the inverse of a stage is damped."""
        own = {"damping": stage.damping, "absolute_damping": stage.absolute_damping}
        return self.damping.changed(**{name: value for name, value in own.items() if value is not None})

    def provenance(self) -> dict[str, Any]:
        """What decides the scores of all stages."""
        last = self.stages[-1].point
        return {
            "stage": "multistage",
            "stages": {stage.name: self.described(stage) for stage in self.stages},
            "queries": encode_queries(last.task, self.queries).fingerprint,
            "task": last.settings,
            "settings": self.settings.deciding(),
            "code": fingerprint_code(),
        }

    def described(self, stage: Stage) -> dict[str, Any]:
        """What decides a stage's part in them."""
        given, moved = stage.curvature, stage.transport
        operator = given.operator if isinstance(given, Curvature) else given
        known = operator.deciding() if isinstance(operator, Fit) else operator
        if isinstance(known, Operator):
            known = fingerprint_operator(known)
        return {
            **stage.point.provenance(),
            "curvature": known or "ekfac",
            "modules": list(stage.names),
            "training": stage.training.identity() if stage.training else None,
            "rates": stage.rates,
            "transport": fingerprint_operator(moved) if isinstance(moved, Operator) else moved,
            "proximal": stage.proximal,
            "renamed": dict(stage.renamed),
            "head": stage.head,
            "damping": self.damped(stage).as_json(),
            "n_train": stage.n_train,
        }


def mean_eigenvalue(curvature: BlockDiagonal | Spectral) -> float:
    """Of all modules together."""
    if isinstance(curvature, Spectral):
        return float(curvature.lam_P.mean())
    return Curvature(curvature, {}).mean_eigenvalue


def form(stage: Stage, kind: Literal["gauss-newton", "hessian", "fisher", "empirical-fisher"], **saving: Any) -> Spectral:
    """The curvature matrix of a stage's rows over all its tracked modules together, formed: for small models.

    Raises UsageError for more than 10,000 weights.
    """
    matrix = matrix_of(kind, stage.point, stage.names)
    refuse_large(matrix, f'fewer modules, or factors: Stage("{stage.name}", ..., curvature="ekfac")')
    flat = Flat({name: site.shape for name, site in matrix.sites.items()})

    def made_from() -> dict[str, Any]:
        return {"stage": "solve", **fingerprint_operator(matrix)}

    matrix_PP = formed(matrix, flat, stage.point.like, made_from, **saving)
    return Spectral.of(matrix_PP, flat.shapes, matrix.label)


def _blocks(curvature: Curvature) -> BlockDiagonal:
    operator = curvature.operator
    return operator if isinstance(operator, BlockDiagonal) else BlockDiagonal(curvature.blocks, operator.label)


def _place(folder: Folder | Memory, stage: Stage) -> Callable[[str], Path | None]:
    """Where a part of a stage is kept."""
    return lambda name: folder.path / stage.name / name if isinstance(folder, Folder) else None


def _refuse(stages: Sequence[Stage], settings: Score) -> None:
    names = [stage.name for stage in stages]
    if not stages:
        raise UsageError("There are no stages", accepted="one or more, oldest first")
    if len(set(names)) < len(names):
        raise UsageError("Two stages have the same name", given=", ".join(names), accepted="names that are all different")
    if settings.n_train is not None:
        raise UsageError(
            "Each stage has its own number of training rows",
            given=f"n_train={settings.n_train}",
            fix=f'Stage("{names[0]}", ..., n_train={settings.n_train})',
        )
    if "relatif" in settings.norms or "examples" in settings.aggregate:
        raise UsageError(
            "Rows of an earlier stage have no influence on themselves here, and rows of different stages are not one sum",
            given=f"norms={settings.norms}, aggregate={settings.aggregate}",
            accepted="norms of 'cosine', aggregate of 'queries'",
        )
