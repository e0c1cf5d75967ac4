"""What a run will take, before anything is spent."""

from whence.planning.plan import Plan
from whence.planning.planner import plan

__all__ = ["Plan", "plan"]
