import json
import os

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, T5Config, T5ForConditionalGeneration

from whence.errors import AdapterBaseMissing, ModelNotFound
from whence.models import load_model


@pytest.fixture
def adapter_folder(tmp_path, tiny_model_folder, tiny_llama):
    """A LoRA adapter that knows its base by its path, with B not zero."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_model_folder)
    adapted.save_pretrained(tmp_path / "tiny-lora")
    return tmp_path / "tiny-lora"


def rename_base(adapter, base):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def test_a_folder_is_loaded_ready_to_use(tiny_model_folder, tiny_llama, notes):
    model, tokenizer = load_model(tiny_model_folder)
    assert type(model) is type(tiny_llama) and not model.training
    assert model.dtype == torch.float32 and model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert all(torch.equal(one.cpu(), other) for one, other in zip(model.parameters(), tiny_llama.parameters(), strict=True))
    assert notes == []


def test_dtype_and_device_are_choices(tiny_model_folder):
    assert load_model(tiny_model_folder, dtype="float64")[0].dtype == torch.float64
    assert load_model(tiny_model_folder, dtype=torch.bfloat16, device="cpu")[0].dtype == torch.bfloat16


def test_stored_in_16_bits_is_float32_on_a_cpu(tiny_model_folder, tiny_llama):
    tiny_llama.to(torch.bfloat16).save_pretrained(tiny_model_folder)
    assert load_model(tiny_model_folder, device="cpu")[0].dtype == torch.float32


@pytest.mark.gpu
def test_stored_in_16_bits_is_bfloat16_on_a_gpu(tiny_model_folder, tiny_llama):
    assert load_model(tiny_model_folder)[0].dtype == torch.float32
    tiny_llama.to(torch.float16).save_pretrained(tiny_model_folder)
    assert load_model(tiny_model_folder)[0].dtype == torch.bfloat16


def test_weights_that_are_missing_are_said(tiny_model_folder, tiny_llama, notes):
    from safetensors.torch import save_file

    state = {name: weight for name, weight in tiny_llama.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    save_file(state, tiny_model_folder / "model.safetensors", metadata={"format": "pt"})
    load_model(tiny_model_folder)
    assert notes[0].startswith("1 weights are not in") and "layers.1.mlp.up_proj" in notes[0]


def test_the_config_says_what_the_model_does(tmp_path, tiny_tokenizer):
    llama = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=1,
    )
    classifier = AutoModelForSequenceClassification.from_config(llama)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    for model in (classifier, t5):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        assert type(load_model(folder)[0]) is type(model)


def test_an_adapter_brings_its_base(adapter_folder, tiny_model_folder, tiny_llama, notes):
    model, tokenizer = load_model(adapter_folder)
    assert notes == [f"adapter {adapter_folder} on base {tiny_model_folder}"]
    assert not model.training and len(tokenizer) == 300
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    ids = torch.tensor([[5, 6, 7]], device=model.device)
    base = load_model(tiny_model_folder)[0]
    assert not torch.allclose(model(ids).logits, base(ids).logits)
    assert torch.allclose(load_model(tiny_model_folder, adapter=adapter_folder)[0](ids).logits, model(ids).logits)


def test_a_base_may_be_named_relative_to_the_adapter(adapter_folder, tiny_model_folder, notes):
    rename_base(adapter_folder, tiny_model_folder.name)
    load_model(adapter_folder)
    assert str(tiny_model_folder) in notes[0]


def test_an_adapter_without_its_base_names_it(adapter_folder):
    rename_base(adapter_folder, "/gone/tiny-base")
    with pytest.raises(AdapterBaseMissing) as raised:
        load_model(adapter_folder)
    text = str(raised.value)
    assert "[WHENCE-02]" in text and "/gone/tiny-base" in text and str(adapter_folder) in text and "--adapter" in text


@pytest.mark.parametrize("name", ["tiny-lama", "./tiny-lama"])
def test_a_typo_gets_the_nearest_folder(tiny_model_folder, monkeypatch, name):
    monkeypatch.chdir(tiny_model_folder.parent)
    with pytest.raises(ModelNotFound) as raised:
        load_model(name)
    text = str(raised.value)
    assert f"No model at {name}." in text and "[WHENCE-01]" in text and "Nearest local: tiny-llama" in text
    assert raised.value.exit_code == 2


def test_nothing_near_is_no_guess(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="hf auth login"):
        load_model("somebody/entirely-else")
    with pytest.raises(ModelNotFound, match="can't be the id of a model"):
        load_model("not an id")


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ModelNotFound, match="no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="can't be loaded"):
        load_model(tmp_path)


def test_a_model_without_a_tokenizer_takes_another(tmp_path, tiny_model_folder, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelNotFound, match="No tokenizer at .*bare(.|\n)*--tokenizer"):
        load_model(tmp_path / "bare")
    assert len(load_model(tmp_path / "bare", tokenizer=tiny_model_folder)[1]) == 300


def test_a_gated_model_says_where_to_ask(monkeypatch):
    import httpx2
    from huggingface_hub.errors import GatedRepoError

    from whence import models

    def refuse(*_):
        answer = httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co/"))
        raise OSError("You are trying to access a gated repo.") from GatedRepoError("gated", response=answer)

    monkeypatch.setattr(models, "_ask_hub", lambda name: None)
    monkeypatch.setattr(models, "_load_weights", refuse)
    with pytest.raises(ModelNotFound, match="gated(.|\n)*https://huggingface.co/org/secret, then: hf auth login"):
        load_model("org/secret")


def test_a_real_model(shared_data):
    model, tokenizer = load_model(os.path.relpath(shared_data / "models" / "stories260K" / "hf"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    assert tokenizer("Once upon a time")["input_ids"][0] == tokenizer.bos_token_id
