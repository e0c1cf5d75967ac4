"""Influence through several trainings in a row, such as pretraining and fine-tuning."""

from whence.stages.multistage import multistage
from whence.stages.scores import StagedScores, open_stages
from whence.stages.stage import Stage

__all__ = ["Stage", "StagedScores", "multistage", "open_stages"]
