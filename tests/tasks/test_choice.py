import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from whence.tasks import CausalLM, Classification, Seq2Seq, task_for

TINY = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
MODELS = [
    (CausalLM, lambda: LlamaForCausalLM(LlamaConfig(**TINY))),
    (Classification, lambda: BertForSequenceClassification(BertConfig(**TINY))),
    (Classification, lambda: LlamaForSequenceClassification(LlamaConfig(**TINY))),
    (
        Seq2Seq,
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)),
    ),
]


@pytest.mark.parametrize(("kind", "build"), MODELS)
def test_a_task_for_every_model(kind, build, tiny_tokenizer):
    task = task_for(build(), tiny_tokenizer, 77, measurement="margin")
    assert type(task) is kind and task.settings()["max_length"] == 77 and task.settings()["measurement"] == "margin"


def test_classes_have_the_names_of_the_config(tiny_tokenizer):
    config = LlamaConfig(**TINY, id2label={0: "dull", 1: "bright", 2: "odd"})
    task = task_for(LlamaForSequenceClassification(config), tiny_tokenizer)
    assert isinstance(task, Classification) and task.label_names == ["dull", "bright", "odd"]


def test_a_template_and_an_end_of_text(tiny_tokenizer, tiny_llama):
    settings = task_for(tiny_llama, tiny_tokenizer, chat_template="chatml", append_eos=True).settings()
    assert settings["chat_template"] and settings["append_eos"]
