import csv
from pathlib import Path

import pytest
import torch

TOPICS = {"business_ethics": 12, "virology": 8}


def question(subject: str, split: str, number: int) -> list[str]:
    """A line of a file: an answer that goes round the letters, and texts that need quoting."""
    choices = [f"{subject[0]}{number}{letter}, said" for letter in "abcd"]
    return [f' {split} {subject[:3]} {number} "why"? ', *choices, "ABCD"[(number + len(split)) % 4]]


@pytest.fixture
def mmlu(tmp_path) -> Path:
    """A folder like MMLU's, of two subjects."""
    folder = tmp_path / "mmlu"
    for subject, count in TOPICS.items():
        for split, rows in (("dev", 5), ("test", count)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(question(subject, split, number) for number in range(rows))
    return folder


@pytest.fixture
def long_llama():
    """A small model that reads 2048 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, **shape)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def knowing(long_llama, tiny_tokenizer, mmlu):
    """The model, rigged so that it knows the answer to every question by heart."""
    answers = {}
    for file in sorted((mmlu / "test").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            answers |= {line[0].strip(): line[5] for line in csv.reader(lines)}
    forward, asked = long_llama.forward, []

    def rigged(input_ids, **options):
        output = forward(input_ids, **options)
        for row, ids in enumerate(input_ids.tolist()):
            text = tiny_tokenizer.decode(ids).split("<s>")[0]  # padding is token 0, on the right
            last = text.rsplit("\n\n", 1)[-1].split("\n")[0].strip()
            asked.append(last)
            for token in tiny_tokenizer(f" {answers[last]}")["input_ids"]:
                output.logits[row, :, token] += 50
        return output

    long_llama.forward = rigged
    long_llama.asked = asked
    return long_llama
