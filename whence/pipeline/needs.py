"""What a run will need, asked before it starts: packages, prompts that can be read, and room on the disk."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from whence.errors import CoverageError, DoesNotFit, UsageError
from whence.escapes import command
from whence.pipeline.stages import Stage
from whence.show.numbers import size

if TYPE_CHECKING:
    from whence.config import Config
    from whence.pipeline.work import Workshop

NUMBER = 4
"""Bytes of a number in checkpoints."""

COPIES = 3
"""Of each trained weight in a checkpoint: itself, and the two moments of Adam."""


def check_packages(config: Any, stages: Sequence[Stage]) -> None:
    """Raise UsageError where a stage that will run needs a package that is not installed."""
    lacking = {stage: missing for stage in stages if (missing := _missing(stage.packages(config)))}
    if lacking:
        switches = " ".join(f"--set {stage.without}" for stage in lacking)
        raise UsageError(
            "This run needs packages that are not installed; nothing was started.",
            given="; ".join(f"stage {stage.name} without {', '.join(missing)}" for stage, missing in lacking.items()),
            accepted=f"all that the stages need, or a run without these stages: {switches}",
            fix=command("pip", "install", *dict.fromkeys(name for missing in lacking.values() for name in missing)),
        )


def check_method(config: Config) -> None:
    """Raise UsageError where the method that scores the rows lacks a training, or doesn't have one of its settings."""
    if config.score.method is None:
        return
    from whence.loading import method_of

    recipe, _ = method_of(config.score)
    if "training" in recipe.needs and config.train is None:
        raise UsageError(
            f"{recipe.title} looks back at the training, and this run trains nothing.",
            accepted="a section `train`",
            fix="or whence score MODEL --method NAME --training FOLDER, with the folder that whence train made",
        )


def check_inputs(shop: Workshop, stages: Sequence[Stage]) -> None:
    """Read the prompts, and raise DoesNotFit where what will be written has no room; `stages` are those that will run."""
    names = {stage.name for stage in stages}
    if "generate" in names or ("score" in names and shop.config.score.queries == "prompts"):
        shop.prompts  # noqa: B018
    needed = _bytes(shop, names)
    for training, run in list(shop.trainings.items())[:-1]:
        own = {name.removeprefix(f"{training}/") for name in names}
        needed |= {f"{training}/{name}": count for name, count in _bytes(run, own).items()}
    free = shutil.disk_usage(shop.out).free
    if sum(needed.values()) > free:
        raise DoesNotFit(
            f"The run needs {size(sum(needed.values()))} of disk, and {size(free)} are free; nothing was started.",
            given=", ".join(f"{name} {size(count)}" for name, count in needed.items()),
            accepted=f"room where {shop.out} is, or `out` on another disk",
            fix="--set train.keep=1 (fewer checkpoints), --set fit.modules=last-4 (fewer factors), or train.lora",
        )


def _missing(packages: Mapping[str, str]) -> list[str]:
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def _bytes(shop: Workshop, names: set[str]) -> dict[str, float]:
    """What the large stages write at most, from the shapes of the model alone."""
    from whence.coverage import cover
    from whence.fitting.files import most_bytes
    from whence.planning.blank import blank_model

    model, chosen, place = shop.config.model, shop.config.train, shop.place
    found: dict[str, float] = {}
    if not names & {"train", "fit"}:
        return found
    blank = blank_model(place(model.path or model.base), adapter=place(model.adapter) if model.adapter else None)
    weights = NUMBER * sum(parameter.numel() for parameter in blank.parameters())
    if "train" in names and chosen is not None and chosen.lora is None:
        checkpoints = 1 if chosen.keep is None else chosen.keep + 1
        found["train"] = weights * (1 + COPIES * checkpoints)
    if "fit" in names:
        with contextlib.suppress(CoverageError):  # an adapter's modules, which training will make
            found["fit"] = most_bytes(cover(blank, shop.config.fit.modules or "mlp").sites, shop.config.fit)
    return found
