import pytest


@pytest.fixture
def framing_tokenizer(tiny_tokenizer_file):
    """A byte-level tokenizer that adds <s> and </s>, and whose offsets leave white space out."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(tiny_tokenizer_file))
    frame = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), frame])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
