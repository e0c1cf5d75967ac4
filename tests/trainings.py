"""Tiny language models, some fine-tuned, in folders as people have them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models import llama, randomised, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def save_llama(folder: Path, tokenizer_file: Path, layers: int = 1, positions: int = 128) -> None:
    """Save a Llama 8 wide with random weights, and the tokenizer of the file."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": layers, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=positions, **sizes)).save_pretrained(folder)
    read: Any = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>")
    read.save_pretrained(folder)
