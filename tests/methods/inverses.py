"""Small trained language models in float64, whose curvature is inverted by this method and by that."""

import functools
import tempfile
from pathlib import Path

import torch
from models import gpt2, randomised, texts, tokenizer

from benchmarks.oracles.base import Case
from whence.config.schema import Train
from whence.data import as_rows
from whence.methods.base import attribute
from whence.models import load_model
from whence.tasks import CausalLM
from whence.train.finetune import finetune
from whence.train.record import read_training

ROWS, QUERIES = as_rows(texts(12, seed=1)), as_rows(texts(6, seed=2)[::2])

FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def trained(optimizer="adamw_torch", momentum=0.0):
    """A case with a training, whose rows are those that it kept."""
    torch.manual_seed(0)
    folder = Path(FOLDER.name) / f"{optimizer}-{len(list(Path(FOLDER.name).iterdir()))}"
    settings = Train(learning_rate=1e-2, epochs=2, batch_size=2, save_steps=4, log_steps=1, keep=1, evaluation=0)
    arguments = {"optim_args": f"momentum={momentum}"} if momentum else {}
    settings = settings.changed(optimizer=optimizer, arguments=arguments)
    finetune(randomised(gpt2()).eval(), CausalLM(tokenizer()), ROWS, settings, out=folder, seed=0)
    record = read_training(folder)
    return Case(load_model(record.model)[0].double(), CausalLM(tokenizer()), ROWS, QUERIES, record)


def found(method, case=None, **given):
    """The method's scores of the case."""
    case = case or trained()
    return attribute(method, case.model, case.task, case.queries, case.rows, training=case.training, **given)
