"""The task that a Hugging Face model was made for."""

from __future__ import annotations

from typing import Any

from whence.tasks.base import Task
from whence.tasks.causal_lm import CausalLM
from whence.tasks.classification import Classification
from whence.tasks.forward import unwrapped
from whence.tasks.measurements import Measurement
from whence.tasks.seq2seq import Seq2Seq


def task_for(
    model: Any,
    tokenizer: Any,
    max_length: int = 512,
    *,
    measurement: Measurement = "logprob",
    chat_template: str | None = None,
    append_eos: bool = False,
) -> Task:
    """Choose by the model's config and class: classes of texts, encoder and decoder, or else the next token."""
    inner = unwrapped(model)
    if type(inner).__name__.endswith("ForSequenceClassification"):
        names = [inner.config.id2label[index] for index in range(inner.config.num_labels)]
        return Classification(tokenizer, names, max_length, measurement=measurement)
    if inner.config.is_encoder_decoder:
        return Seq2Seq(tokenizer, max_length, measurement=measurement, append_eos=append_eos)
    return CausalLM(tokenizer, max_length, measurement=measurement, chat_template=chat_template, append_eos=append_eos)
