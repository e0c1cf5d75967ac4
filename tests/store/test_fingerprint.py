import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from whence.store import fingerprint as module
from whence.store.digest import canonical_json, fingerprint_code, fingerprint_settings
from whence.store.fingerprint import fingerprint, fingerprint_tokenizer


def changed(model: nn.Module, change) -> set[str]:
    """Which parts of the fingerprint a change of a copy of the model alters."""
    other = copy.deepcopy(model)
    change(other)
    before, after = fingerprint(model), fingerprint(other)
    return {part for part in before if before[part] != after[part]}


def test_same_model_same_fingerprint(tiny_llama):
    before = fingerprint(tiny_llama)
    assert fingerprint(copy.deepcopy(tiny_llama)) == before
    tiny_llama.train()
    tiny_llama.config._name_or_path = "elsewhere"
    assert fingerprint(tiny_llama) == before


def test_one_changed_number_changes_the_weights(tiny_llama):
    def nudge(model):
        model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1e-7

    assert changed(tiny_llama, nudge) == {"weights"}


def test_config_changes_the_architecture(tiny_llama):
    def widen(model):
        model.config.rms_norm_eps = 1e-3

    assert changed(tiny_llama, widen) == {"architecture"}
    assert changed(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), lambda net: net.__setitem__(1, nn.Tanh())) == {"architecture"}


def test_adapter_settings_count(tiny_llama):
    from peft import LoraConfig, get_peft_model

    def adapted(alpha):
        torch.manual_seed(1)
        return fingerprint(
            get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(r=2, lora_alpha=alpha, target_modules=["up_proj"]))
        )

    assert adapted(4) == adapted(4)
    assert adapted(4)["weights"] == adapted(8)["weights"]
    assert adapted(4)["architecture"] != adapted(8)["architecture"]


def test_dtype_and_shape_count():
    net = nn.Linear(4, 2, bias=False)
    assert changed(net, lambda other: other.to(torch.bfloat16)) == {"weights"}
    assert changed(net, lambda other: setattr(other, "weight", nn.Parameter(net.weight.data.reshape(4, 2)))) == {"weights"}


def test_persistent_buffers_count_and_others_do_not():
    net = nn.BatchNorm1d(3)
    net.register_buffer("cache", torch.zeros(2), persistent=False)
    assert changed(net, lambda other: other.running_mean.add_(1)) == {"weights"}
    assert changed(net, lambda other: other.cache.add_(1)) == set()


def test_chunks_do_not_matter(monkeypatch):
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).to(torch.bfloat16))
    net[0].weight.data = net[0].weight.data.T.contiguous().T  # strides are no content
    before = fingerprint(net)
    monkeypatch.setattr(module, "CHUNK", 3)
    assert fingerprint(net) == before


@pytest.mark.gpu
def test_device_does_not_matter(tiny_llama):
    before = fingerprint(tiny_llama)
    assert fingerprint(tiny_llama.cuda()) == before


def test_tokenizer_padding_does_not_count(tiny_tokenizer):
    before = fingerprint_tokenizer(tiny_tokenizer)
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    tiny_tokenizer.padding_side = "left"
    tiny_tokenizer(["a", "b c"], padding=True, truncation=True, max_length=8)
    assert fingerprint_tokenizer(tiny_tokenizer) == before


def test_tokenizer_vocabulary_and_template_count(tiny_tokenizer):
    prints = [fingerprint_tokenizer(tiny_tokenizer)]
    tiny_tokenizer.chat_template = "{{ messages }}"
    prints.append(fingerprint_tokenizer(tiny_tokenizer))
    tiny_tokenizer.add_tokens(["quist"])
    prints.append(fingerprint_tokenizer(tiny_tokenizer))
    assert len(set(prints)) == 3


def test_settings_are_canonical():
    @dataclasses.dataclass
    class Choice:
        dtype: torch.dtype
        names: set

    one = {"damping": 0.1, "choice": Choice(torch.bfloat16, {"b", "a"}), "out": Path("x"), "shape": (1, 2)}
    other = {"shape": [1, 2], "out": "x", "choice": {"dtype": "torch.bfloat16", "names": ["a", "b"]}, "damping": 0.1}
    assert canonical_json(one) == canonical_json(other)
    assert fingerprint_settings(one) == fingerprint_settings(other) != fingerprint_settings({**one, "damping": 0.2})


def test_functions_are_settings_by_name_and_source():
    def margin(model, batch):
        return model(batch)

    before = canonical_json({"measurement": margin})

    def margin(model, batch):
        return -model(batch)

    after = canonical_json({"measurement": margin})
    assert "margin" in before and before != after == canonical_json({"measurement": margin})


def test_settings_without_meaning_are_refused():
    with pytest.raises(TypeError, match="object"):
        fingerprint_settings({"what": object()})


def test_code_names_the_version():
    from whence import __version__

    version, code = fingerprint_code().split()
    assert version == __version__ and len(code) == 16
