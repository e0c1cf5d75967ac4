"""Small language models made on the spot: a Llama of any size, with a tokenizer for the texts that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
ROLES = {BOS: "bos_token", EOS: "eos_token", PAD: "pad_token", UNK: "unk_token"}


def train_tokenizer(
    texts: Iterable[str],
    kind: Literal["words", "pieces"],
    special: Sequence[str],
    *,
    begins: bool = False,
    lowercase: bool = False,
    **training: Any,
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, or of byte pairs (Sennrich et al. 2016), with the space before each.

    `begins` puts BOS before a text; `lowercase` reads words in lower case, without spaces.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = (models.WordLevel, trainers.WordLevelTrainer)
    model, trainer = words if kind == "words" else (models.BPE, trainers.BpeTrainer)
    tokenizer: Any = Tokenizer(model(**({"unk_token": UNK} if UNK in special else {})))
    if lowercase:
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer(special_tokens=list(special), show_progress=False, **training))
    if begins:
        start = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{ROLES[token]: token for token in special})


def make_llama(
    tokenizer: Any, seed: int, width: int, inner: int, layers: int, heads: int, length: int, spread: float
) -> LlamaForCausalLM:
    """An untrained Llama for texts of up to `length` tokens; the same seed gives the same weights, of deviation `spread`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
