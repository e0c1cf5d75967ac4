"""One file from fine-tuning to report: stages, what each depends on, and which of them have to run."""

from whence.pipeline.run import Step, plan_run, run_pipeline, say_unchanged
from whence.pipeline.stages import STAGES

__all__ = ["STAGES", "Step", "plan_run", "run_pipeline", "say_unchanged"]
