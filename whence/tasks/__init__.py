"""What a model's job is: its losses, and what is asked of it."""

from whence.tasks.base import Batch, Task, sample_classes
from whence.tasks.causal_lm import CausalLM
from whence.tasks.choice import task_for
from whence.tasks.classification import Classification
from whence.tasks.regression import Regression
from whence.tasks.seq2seq import Seq2Seq

__all__ = ["Batch", "CausalLM", "Classification", "Regression", "Seq2Seq", "Task", "sample_classes", "task_for"]
