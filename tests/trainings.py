"""Tiny language models that were fine-tuned, in folders as people have them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import llama, randomised, tokenizer

from whence.data import Rows
from whence.models import load_model
from whence.settings import Train
from whence.tasks import CausalLM
from whence.train.finetune import finetune


def trained(folder: Path, rows: Rows, settings: Mapping[str, Any], ways: Mapping[str, Any], build=llama, base="base") -> Path:
    """Make an untrained model in `folder / base`, and beside it a training of it for each way, by what it changes."""
    model: Any = randomised(build())
    model.save_pretrained(folder / base)
    tokenizer().save_pretrained(folder / base)
    for name, changes in ways.items():
        chosen = Train(**{**settings, **changes})
        finetune(load_model(folder / base)[0], CausalLM(tokenizer()), rows, chosen, out=folder / name, seed=0)
    return folder
