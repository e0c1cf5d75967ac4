"""The stages of a run: which settings, files and stages each is made from. The work itself is in `whence.pipeline.work`."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whence.config import Config, runs_of
from whence.settings import Through
from whence.store.digest import NUMERIC, fingerprint_sources
from whence.version import __version__

COMPARING = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class Stage:
    """One stage, as far as it can be told without doing it."""

    name: str
    folders: tuple[str, ...]
    """Below the folder of the run; what the stage makes is in them."""
    settings: Callable[[Config], dict[str, Any]]
    """What of the configuration its result depends on, as JSON values."""
    inputs: Callable[[Config], list[str]]
    """Files, folders and names of the hub that it reads."""
    after: tuple[str, ...] = ()
    """Stages whose results it reads."""
    optional: tuple[str, ...] = ()
    """Those of them that it can do without: what they made is shown, or that it is missing."""
    sources: tuple[str, ...] = ()
    """Parts of the package whose change makes another result; none for what is made once, such as trained weights."""
    numeric: bool = False
    """Whether versions of the libraries underneath count as well."""
    resumes: bool = False
    """Whether killed work resumes by itself; if not, it starts again in a separate folder."""
    ranks: bool = False
    """Whether several processes share the work; the first does all others alone."""

    packages: Callable[[Config], dict[str, str]] = lambda config: {}
    """Modules that it imports and a plain installation does not have, with what pip calls them."""
    without: str = ""
    """The setting of a run without such a stage."""

    def code(self) -> str:
        """What of the code the result depends on."""
        versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES) if self.numeric else ""
        sources = f"{__version__} {fingerprint_sources(self.sources)}" if self.sources else ""
        return f"{sources} {versions}".strip()

    def work(self, workshop: Any, folder: Path) -> None:
        """Do the work."""
        training, _, name = self.name.rpartition("/")
        folder = folder / TRAININGS / training if training else folder
        getattr(importlib.import_module("whence.pipeline.work"), name)(workshop.trainings.get(training, workshop), folder)


TRAININGS = "stages"
"""Where a run has what it makes of the trainings before its last, by their names."""


def active(config: Config) -> list[Stage]:
    """The stages of a run, in their order; trainings before its last are trained and fitted by stages of their own."""
    earlier = list(runs_of(config).items())[:-1]
    found = [
        _of_training(name, stage, [before for before, _ in earlier[:number]])
        for number, (name, run) in enumerate(earlier)
        for stage in _active(run)
        if stage.name in ("train", "fit")
    ]
    trained = tuple(f"{name}/train" for name, _ in earlier)
    fitted = tuple(f"{name}/fit" for name, _ in earlier)
    return found + [
        replace(stage, after=trained + (fitted if stage.name == "score" else ()) + stage.after) for stage in _active(config)
    ]


def _of_training(name: str, stage: Stage, before: Sequence[str]) -> Stage:
    """A stage of one of the trainings before the last."""
    return replace(
        stage,
        name=f"{name}/{stage.name}",
        folders=tuple(f"{TRAININGS}/{name}/{folder}" for folder in stage.folders),
        settings=lambda config: stage.settings(runs_of(config)[name]),
        inputs=lambda config: stage.inputs(runs_of(config)[name]),
        after=(*(f"{each}/train" for each in before), *(f"{name}/{need}" for need in stage.after)),
    )


def _active(config: Config) -> list[Stage]:
    benchmark = config.evaluate.benchmark if config.evaluate else None
    factors = config.fit if uses_factors(config) else None
    sections = {"train": config.train, "fit": factors, "inspect": factors, "benchmark": benchmark, "evaluate": config.evaluate}
    return [stage for stage in STAGES if sections.get(stage.name, stage) is not None]


def uses_factors(config: Config) -> bool:
    """Whether the scores, or those of rows on themselves, are made with factors."""
    if config.score.method is None or config.score.self_influence:
        return True
    from whence.methods.base import recipe_named  # torch and all: only where another method is named

    recipe = recipe_named(config.score.method)
    return "factors" in recipe.needs + recipe.uses


def _dump(section: Any) -> Any:
    return section.as_json() if section is not None else None


def _text(config: Config) -> dict[str, Any]:
    """How text becomes tokens."""
    return _dump(config.data) | {"path": None}


def _model(config: Config) -> dict[str, Any]:
    return _dump(config.model) | {"base": None, "path": None, "adapter": None, "tokenizer": None, "device": None}


def _prompts(config: Config) -> dict[str, Any]:
    return _dump(config.prompts) | {"path": None}


def _everything(config: Config) -> dict[str, Any]:
    """All settings but those that say where things are: other stages look at what is there."""
    return _dump(config) | {
        "out": None,
        "model": _model(config) | {"device": config.model.device},
        "data": _text(config),
        "prompts": _prompts(config),
        "evaluate": None,
    }


def _weights(config: Config) -> list[str]:
    """The weights that are asked, where no stage makes them."""
    names = [config.model.path or config.model.base, config.model.adapter, config.model.tokenizer]
    return [name for name in (names if config.train is None else names[2:]) if name]


def _base(config: Config) -> list[str]:
    """The weights that the last training starts from, where no stage makes them."""
    *_, model = (run.model for run in runs_of(config).values())
    return [name for name in (model.base, model.tokenizer) if name]


def template_files(config: Config) -> list[str]:
    """The file of the chat template, where it is one."""
    return config.template_files


def _questions(config: Config) -> list[str]:
    return [config.prompts.path] if config.prompts.path else []


def _benchmark(config: Config) -> list[str]:
    benchmark = config.evaluate.benchmark if config.evaluate else None
    return [benchmark.data] if benchmark and benchmark.data else []


STAGES = (
    Stage(
        "train",
        ("train",),
        settings=lambda c: {"train": _dump(c.train), "data": _text(c), "model": _model(c), "seed": c.seed},
        inputs=lambda c: [*_base(c), c.data.path, *template_files(c)],
        resumes=True,
    ),
    Stage(
        "generate",
        ("generate",),
        settings=lambda c: {
            "generate": _dump(c.generate),
            "prompts": _prompts(c),
            "data": {key: _text(c)[key] for key in ("format", "normalise", "chat_template", "max_length", "append_eos")},
            "model": _model(c),
            "seed": c.seed,
        },
        inputs=lambda c: [*_weights(c), *(_base(c) if c.generate.base else []), *_questions(c), *template_files(c)],
        after=("train",),
        resumes=True,
    ),
    Stage(
        "fit",
        ("factors",),
        settings=lambda c: {"fit": _dump(c.fit), "data": _text(c), "model": _model(c), "seed": c.seed},
        inputs=lambda c: [*_weights(c), c.data.path, *template_files(c)],
        after=("train",),
        sources=NUMERIC,
        numeric=True,
        resumes=True,
        ranks=True,
    ),
    Stage(
        "inspect",
        ("inspect",),
        settings=lambda c: {"inspect": _dump(c.inspect), "damping": c.score.damping},
        inputs=lambda c: [],
        after=("fit",),
        sources=("plots", "report/factors", "fitting/health"),
    ),
    Stage(
        "score",
        ("scores", "self", "exports"),
        settings=lambda c: {
            "score": _dump(c.score),
            "modules": None if uses_factors(c) else _dump(c.fit)["modules"],
            "data": _text(c),
            "model": _model(c),
            "prompts": _prompts(c) if c.score.queries == "prompts" else None,
            "seed": c.seed,
            **({"stages": {name: _dump(each.part(Through)) for name, each in c.stages.items()}} if c.stages else {}),
        },
        inputs=lambda c: [
            *_weights(c),
            c.data.path,
            *template_files(c),
            *(_questions(c) if c.score.queries == "prompts" else []),
        ],
        after=("train", "generate", "fit"),
        sources=NUMERIC,
        numeric=True,
        resumes=True,
        ranks=True,
    ),
    Stage(
        "benchmark",
        ("benchmark",),
        settings=lambda c: {
            "benchmark": _dump(c.evaluate.benchmark) | {"data": None} if c.evaluate else None,
            "model": _model(c),
        },
        inputs=lambda c: [*_weights(c), *_base(c), *_benchmark(c)],
        after=("train",),
        packages=lambda c: {"lm_eval": "lm-eval[hf]"},
        without="evaluate.benchmark=null",
        resumes=True,
    ),
    Stage(
        "evaluate",
        ("evaluate",),
        settings=lambda c: {"compare": c.evaluate.compare if c.evaluate else None, "top": c.report.top, "seed": c.seed},
        inputs=lambda c: [],
        after=("generate", "score", "benchmark"),
        packages=lambda c: COMPARING if c.evaluate and c.evaluate.compare else {},
        without="evaluate.compare=false",
        sources=("evaluate", "plots/comparison", "plots/panels", "plots/style"),
    ),
    Stage(
        "report",
        ("report",),
        settings=_everything,
        inputs=lambda c: [],
        after=("train", "generate", "fit", "inspect", "score", "benchmark", "evaluate"),
        optional=("inspect", "benchmark", "evaluate"),
        sources=("report", "show", "plots", "filter", "evaluate/combined"),
    ),
)
"""In the order in which they run."""
