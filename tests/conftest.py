"""Shared by all tests: no network, one seed, one thread, tiny models."""

import gc
import os
from pathlib import Path

gc.disable()  # until the tests are collected: all that is made stays, and looking through it for garbage takes seconds

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # of processes started, too

import pytest
import torch
from hypothesis import HealthCheck, settings
from pictures import blank

from whence.progress import Silent, quiet, report_to

pytest_plugins = ["guards.frozen"]

quiet()
torch.set_num_threads(1)  # tiny tensors are no faster on more, and sums come out the same on every machine

settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")  # the same examples every time, however busy the machine is

SENTENCES = [
    "Ada Velt was born in Turin. She is a baker.",
    "Bo Quist lives in Oslo. He plays the piano.",
    "The old harbour of Lyon is quiet in the morning.",
    "Where was Ada Velt born? In Turin, where else.",
]


@pytest.fixture(autouse=True, scope="module")
def few_to_look_through():
    """What the tests before left in caches is looked through for garbage once, not by every Trainer."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes a stack for CUDA, a millisecond


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and texts beside the repository; tests that need them are skipped where there are none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer trained on `SENTENCES`, as a file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture
def tiny_tokenizer(tiny_tokenizer_file):
    """A tokenizer of 300 tokens without a padding token, fresh for every test."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(tiny_tokenizer_file), bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tiny_llama():
    """A Llama of two layers, 16 wide, with random weights and the vocabulary of `tiny_tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.default_generator.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_model_folder(tmp_path, tiny_llama, tiny_tokenizer) -> Path:
    """`tiny_llama` and `tiny_tokenizer`, saved as users keep their models."""
    folder = tmp_path / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores, since tests wait for processes that they start; four at most."""
    return min(4, (os.cpu_count() or 1) + 1)


def pytest_collection_finish():
    """What is imported by now stays: looking through it for garbage takes longer than most tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # who runs many tests needs all of it in the end
        import distributed.warm  # noqa: F401
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)  # first, so that no worker is left with a long one at the end
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def blank_pictures():
    """For tests that make pictures and look at none."""
    with blank():
        yield


class Notes(Silent):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture
def notes():
    """The notes of the test, as they are made."""
    listener = Notes()
    with report_to(listener):
        yield listener.texts
