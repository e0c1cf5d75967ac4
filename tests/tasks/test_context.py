import pytest
import torch
from torch import nn

import whence
from whence.engine.point import Point
from whence.errors import UsageError
from whence.tasks import CausalLM
from whence.tasks.context import check_context, context_of

LONG = {"text": "Ada Velt was born in Turin. " * 8}
SHORT = {"text": "She is a baker."}


def learned(name):
    import transformers

    small = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=2)
        )
    if name == "opt":
        return transformers.OPTForCausalLM(
            transformers.OPTConfig(**small, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=32)
        )
    return transformers.RobertaForCausalLM(
        transformers.RobertaConfig(**small, intermediate_size=8, max_position_embeddings=34, is_decoder=True, pad_token_id=1)
    )


@pytest.mark.parametrize("name", ["gpt2", "opt", "roberta"])
def test_rows_without_positions_are_refused_by_name(name, tiny_tokenizer):
    model = learned(name).eval()
    assert context_of(model) == (32, True)
    task = CausalLM(tiny_tokenizer)
    with pytest.raises(UsageError, match="1 of 2 rows are longer than the 32 tokens") as raised:
        assert len(Point(model, task, [SHORT, LONG]).examples)
    assert "--max-length 32" in raised.value.fix
    assert raised.value.given.startswith("the longest, ")
    assert len(Point(model, CausalLM(tiny_tokenizer, 32), [SHORT, LONG]).examples) == 2
    with pytest.raises(UsageError, match="longer than the 32 tokens") as raised:
        whence.score(model, CausalLM(tiny_tokenizer), [LONG], [SHORT], None)
    assert "the longest, query " in raised.value.given


def test_the_last_position_is_used(tiny_tokenizer):
    model = learned("gpt2").eval()
    task = CausalLM(tiny_tokenizer, 33)  # 33 tokens, the last of which is only predicted
    point = Point(model, task, [LONG])
    assert point.examples.sizes == (32,)
    assert torch.isfinite(task.losses(model, task.collate(point.examples.items))).all()


def test_longer_rows_of_rotary_models_are_noted(tiny_llama, tiny_tokenizer, notes):
    tiny_llama.config.max_position_embeddings = 32
    assert context_of(tiny_llama) == (32, False)
    assert len(Point(tiny_llama, CausalLM(tiny_tokenizer), [SHORT, LONG]).examples)
    assert [note for note in notes if "1 of 2 rows are longer than the 32 tokens that the model was made for" in note]
    notes.clear()
    assert len(Point(tiny_llama, CausalLM(tiny_tokenizer), [SHORT]).examples)
    assert notes == []


def test_models_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_emb, self.words, self.relative_position = nn.Embedding(16, 2), nn.Embedding(8, 2), nn.Embedding(3, 2)

    assert context_of(Own()) == (16, True)
    assert context_of(nn.Linear(2, 2)) == (None, False)
    check_context(nn.Linear(2, 2), [10**6], ["row 0"])
