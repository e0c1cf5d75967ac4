import json
import os

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, T5Config, T5ForConditionalGeneration

from whence.errors import AdapterBaseMissing, ModelNotFound
from whence.models import load_model, load_tokenizer


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


def rewrite(folder, change, file="model.safetensors"):
    """Save a folder's weights again as `change(name, weight)` says: another name, another weight, or None for none."""
    from safetensors.torch import load_file, save_file

    pairs = (change(name, weight) for name, weight in load_file(folder / file).items())
    save_file({pair[0]: pair[1].contiguous() for pair in pairs if pair}, folder / file, metadata={"format": "pt"})


def same_weights(one, other):
    return all(torch.equal(a.cpu(), b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


WRAPPED = {
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "the other way round": lambda name: f"module._orig_mod.{name}",
    "layers compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "layers in FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace("layers.1.", "layers.1._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_prefixes_of_wrappers_are_left_out(tiny_model_folder, tiny_llama, notes, wrapped):
    rewrite(tiny_model_folder, lambda name, weight: (wrapped(name), weight))
    assert same_weights(load_model(tiny_model_folder)[0], tiny_llama)
    assert "prefix of a wrapper" in notes[0] and len(notes) == 1


@pytest.mark.parametrize("gone", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_model_is_refused_without_one_of_its_weights(tiny_model_folder, gone):
    rewrite(tiny_model_folder, lambda name, weight: None if name == gone else (name, weight))
    with pytest.raises(ModelNotFound) as raised:
        load_model(tiny_model_folder)
    assert f"1 weights of the model are not there: {gone}" in str(raised.value)
    assert f"The weights in {tiny_model_folder} are not those of the model" in str(raised.value)


def test_a_model_is_refused_with_names_of_another(tiny_model_folder):
    rewrite(tiny_model_folder, lambda name, weight: (f"student.{name}", weight))
    with pytest.raises(ModelNotFound, match=r"21 weights of the model are not there.*21 that are have no place in it: student"):
        load_model(tiny_model_folder)


def test_a_tied_head_need_not_be_there(tmp_path, tiny_model_folder, tiny_llama, tiny_tokenizer, notes):
    tied = type(tiny_llama)(LlamaConfig(**tiny_llama.config.to_dict() | {"tie_word_embeddings": True}))
    tied.save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    assert same_weights(load_model(tmp_path / "tied")[0], tied) and notes == []


def test_a_tied_model_may_have_either_of_both(tmp_path, tiny_llama, tiny_tokenizer):
    tied = type(tiny_llama)(LlamaConfig(**tiny_llama.config.to_dict() | {"tie_word_embeddings": True}))
    tied.save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    rewrite(tmp_path / "tied", lambda name, weight: (name.replace("model.embed_tokens", "lm_head"), weight))
    assert same_weights(load_model(tmp_path / "tied")[0], tied)


def test_a_model_is_refused_with_a_weight_of_another_shape(tiny_model_folder):
    rewrite(tiny_model_folder, lambda name, weight: (name, weight[:-1] if "norm" in name else weight))
    with pytest.raises(
        ModelNotFound, match=r"5 weights have another shape: .*norm.weight \(15,\) in the file, \(16,\) in the model"
    ):
        load_model(tiny_model_folder)


def test_weights_without_a_place_are_said(tiny_model_folder, tiny_llama, notes):
    from safetensors.torch import load_file, save_file

    file = tiny_model_folder / "model.safetensors"
    save_file(load_file(file) | {"value_head.weight": torch.ones(1)}, file, metadata={"format": "pt"})
    assert same_weights(load_model(tiny_model_folder)[0], tiny_llama)
    assert notes == [f"1 weights in {tiny_model_folder} have no place in LlamaForCausalLM and are not used: value_head.weight"]


@pytest.mark.parametrize(
    "wrapped", [WRAPPED["DDP"], WRAPPED["compiled"], lambda name: name.replace("model.", "model.module.", 1)]
)
def test_prefixes_of_wrappers_are_left_out_of_adapters(adapter_folder, wrapped):
    expected = load_model(adapter_folder)[0]
    rewrite(adapter_folder, lambda name, weight: (wrapped(name), weight), "adapter_model.safetensors")
    assert same_weights(load_model(adapter_folder)[0], expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, weight: (name.replace("lora_", "lara_"), weight), "4 weights of the adapter are not there"),
        (lambda name, weight: (name.replace("layers", "h"), weight), "4 that are have no place in it: .*model.h.0"),
        (lambda name, weight: None if "1.mlp.up_proj.lora_B" in name else (name, weight), "1 weights of the adapter"),
        (lambda name, weight: (name, torch.cat([weight, weight], dim=int("lora_A" in name))), "size mismatch for"),
    ],
    ids=["other words", "other layers", "a part", "another base"],
)
def test_an_adapter_is_refused_unless_all_its_weights_fit(adapter_folder, tiny_model_folder, change, said):
    rewrite(adapter_folder, change, "adapter_model.safetensors")
    with pytest.raises(ModelNotFound, match=said) as raised:
        load_model(adapter_folder)
    assert f"The weights in {adapter_folder} are not those of the adapter on this base" in str(raised.value)
    assert f"({tiny_model_folder}): BASE --adapter {adapter_folder}" in str(raised.value)


def test_an_adapter_is_refused_on_a_base_without_its_layers(tmp_path, adapter_folder, tiny_tokenizer, notes):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelNotFound, match="not those of the adapter on this base(.|\n)*up_proj"):
        load_model(tmp_path / "gpt2", adapter=adapter_folder)
    assert any("says that it was trained on" in text for text in notes)


def adapted(base, folder, config):
    """Save an adapter with random weights, and return its model."""
    from peft import get_peft_model

    model = get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dora", "copies", "tokens", "embedding", "ia3", "vera", "adalora", "biases"])
def test_adapters_of_every_kind_come_with_all_their_weights(tmp_path, tiny_model_folder, tiny_llama, kind):
    import peft

    config = {
        "dora": peft.LoraConfig(r=2, target_modules=["up_proj"], use_dora=True),
        "copies": peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"]),
        "tokens": peft.LoraConfig(r=2, target_modules=["up_proj"], trainable_token_indices=[3, 5]),
        "embedding": peft.LoraConfig(r=2, target_modules=["embed_tokens"]),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
        "adalora": peft.AdaLoraConfig(init_r=3, target_modules=["q_proj"], total_step=10),
        "biases": peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    }[kind]
    expected = adapted(tiny_llama, tmp_path / "adapter", config)
    found, _ = load_model(tiny_model_folder, adapter=tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(found(ids.to(found.device)).logits.cpu(), expected(ids).logits)
    trained = {name for name, parameter in found.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in expected.named_parameters() if parameter.requires_grad}
    load_model(tiny_model_folder, adapter=tmp_path / "adapter", dtype="bfloat16")
    if kind == "copies":
        rewrite(
            tmp_path / "adapter",
            lambda name, weight: None if "lm_head" in name else (name, weight),
            "adapter_model.safetensors",
        )
        with pytest.raises(ModelNotFound, match="1 weights of the adapter are not there: base_model.model.lm_head.weight"):
            load_model(tiny_model_folder, adapter=tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_learned_prompts_are_refused_before_they_are_loaded(tmp_path, tiny_model_folder, tiny_llama):
    import peft

    from whence.errors import CoverageError

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapted(tiny_llama, tmp_path / "prompts", config)
    with pytest.raises(CoverageError, match=r"prompts is learned prompts \(prompt tuning\)"):
        load_model(tiny_model_folder, adapter=tmp_path / "prompts")


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_that_grew_before_the_adapter_grows_again(tmp_path, tiny_model_folder, tiny_llama, tiny_tokenizer, notes):
    import peft

    tiny_tokenizer.add_tokens(["<a>", "<b>"])
    tiny_llama.resize_token_embeddings(302, mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["embed_tokens", "lm_head"])
    expected = adapted(tiny_llama, tmp_path / "adapter", config)
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    found, tokenizer = load_model(tiny_model_folder, adapter=tmp_path / "adapter", device="cpu")
    ids = tokenizer("Ada <a> <b>", return_tensors="pt")["input_ids"]
    assert 300 in ids and 301 in ids
    torch.testing.assert_close(found(ids).logits, expected(ids).logits)
    assert "the adapter brings embeddings of 302 tokens; the base has 300" in notes


def test_a_tokenizer_with_more_tokens_than_the_model_pads_with_another(tiny_model_folder, tiny_tokenizer, notes):
    tiny_tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<more>"]})
    tiny_tokenizer.save_pretrained(tiny_model_folder)
    _, tokenizer = load_model(tiny_model_folder)
    assert tokenizer.pad_token == "</s>"
    assert notes == [
        "the tokenizer has 2 tokens that the model has no embedding for; rows with them are refused: <more>, <pad>"
    ]


def test_a_file_that_is_no_file_of_weights_is_named(tiny_model_folder):
    file = tiny_model_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ModelNotFound, match=rf"{file} is damaged or cut short(.|\n)*its header says {len(whole):,}"):
        load_model(tiny_model_folder)
    for start in (whole[:4], b"", b"\xff" * 64, whole[:20]):
        file.write_bytes(start)
        with pytest.raises(ModelNotFound, match=rf"{file} is damaged or cut short"):
            load_model(tiny_model_folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelNotFound, match=rf"{file} is a pointer of Git LFS(.|\n)*git -C {tiny_model_folder} lfs pull"):
        load_model(tiny_model_folder)


DEEP = '{"model_type": "llama", "a":' + "[" * 10**5


@pytest.mark.parametrize("text", [DEEP, '{"model_type": "ll', '{"a": "\udcff"}'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_with_json_that_can_not_be_read_names_the_file(tiny_model_folder, name, text):
    (tiny_model_folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelNotFound, match=rf"{tiny_model_folder / name} is damaged or cut short"):
        load_model(tiny_model_folder)


def test_an_adapter_with_json_that_can_not_be_read_names_the_file(adapter_folder):
    (adapter_folder / "adapter_config.json").write_text(DEEP)
    with pytest.raises(ModelNotFound, match="adapter_config.json is damaged or cut short"):
        load_model(adapter_folder)


def test_a_tokenizer_that_is_json_and_no_tokenizer_is_refused(tiny_model_folder):
    (tiny_model_folder / "tokenizer.json").write_text('{"version": 1, "model": {"type": "BPE"}}')
    with pytest.raises(ModelNotFound, match="No tokenizer at"):
        load_model(tiny_model_folder)


@pytest.mark.parametrize(
    "lie",
    [
        {"dtype": "F31"},
        {"shape": [2**62, 2**62]},
        {"shape": [-1]},
        {"shape": [8]},
        {"data_offsets": [0, 64]},
        {"data_offsets": [9, 1]},
    ],
    ids=str,
)
def test_weights_whose_header_lies_are_named(tiny_model_folder, lie):
    file = tiny_model_folder / "model.safetensors"
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    header["model.norm.weight"] |= lie
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[length:])
    with pytest.raises(ModelNotFound, match=rf"{file} is damaged or cut short"):
        load_model(tiny_model_folder)


def test_files_that_are_not_loaded_may_be_pointers(tiny_model_folder, tiny_llama):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("pytorch_model.bin", "consolidated.safetensors", "picture.png"):
        (tiny_model_folder / name).write_bytes(pointer)
    assert same_weights(load_model(tiny_model_folder)[0], tiny_llama)
    (tiny_model_folder / "tokenizer.json").write_bytes(pointer)
    with pytest.raises(ModelNotFound, match="tokenizer.json is a pointer of Git LFS"):
        load_model(tiny_model_folder)


def test_a_shard_that_is_a_pointer_is_named(tiny_model_folder, tiny_llama):
    (tiny_model_folder / "model.safetensors").unlink()
    tiny_llama.save_pretrained(tiny_model_folder, max_shard_size="10KB")
    assert same_weights(load_model(tiny_model_folder)[0], tiny_llama)
    shard = sorted(tiny_model_folder.glob("model-*.safetensors"))[2]
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelNotFound, match=rf"{shard} is a pointer of Git LFS"):
        load_model(tiny_model_folder)


def test_an_adapters_file_that_is_a_pointer_is_named(adapter_folder):
    file = adapter_folder / "adapter_model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelNotFound, match=rf"{file} is a pointer of Git LFS"):
        load_model(adapter_folder)


def test_a_pickle_that_is_cut_short_is_named(tiny_model_folder, tiny_llama):
    (tiny_model_folder / "model.safetensors").unlink()
    file = tiny_model_folder / "pytorch_model.bin"
    torch.save({f"module.{name}": weight for name, weight in tiny_llama.state_dict().items()}, file)
    assert same_weights(load_model(tiny_model_folder)[0], tiny_llama)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelNotFound, match=rf"{file} is damaged or cut short"):
        load_model(tiny_model_folder)
    torch.save(tiny_llama.state_dict(), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelNotFound, match=f"The model at {tiny_model_folder} can't be loaded"):
        load_model(tiny_model_folder)


def test_a_pickle_of_something_else_and_a_config_of_another_kind_are_refused(tiny_model_folder):
    (tiny_model_folder / "model.safetensors").unlink()
    torch.save([1, 2], tiny_model_folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=f"The model at {tiny_model_folder} can't be loaded"):
        load_model(tiny_model_folder)
    for config in ("[]", "null", '{"model_type": "llama", "hidden_size": -8}'):
        (tiny_model_folder / "config.json").write_text(config)
        with pytest.raises(ModelNotFound, match=f"The model at {tiny_model_folder} can't be loaded"):
            load_model(tiny_model_folder)


def test_a_shard_that_is_missing_is_named(tiny_model_folder, tiny_llama):
    (tiny_model_folder / "model.safetensors").unlink()
    tiny_llama.save_pretrained(tiny_model_folder, max_shard_size="10KB")
    shard = sorted(tiny_model_folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelNotFound, match=rf"{shard} is missing"):
        load_model(tiny_model_folder)


@pytest.fixture
def trap(tiny_model_folder, tmp_path, monkeypatch):
    """A model's folder whose code leaves a mark where it is run; whoever asks in the terminal gets a yes."""
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n"
    (tiny_model_folder / "own.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 5)
    yield tiny_model_folder
    assert not mark.exists()


def add_to(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


MODEL_MAP = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForCausalLM": "own.Own"}


@pytest.mark.parametrize("kind", ["llama", "own"])
def test_code_of_a_repository_is_never_run(trap, kind):
    from whence.planning.blank import blank_model

    add_to(trap / "config.json", auto_map=MODEL_MAP, model_type=kind)
    if kind == "llama":  # transformers has it
        load_model(trap)
        blank_model(str(trap))
        return
    for load in (load_model, blank_model):
        with pytest.raises(ModelNotFound, match=f"{trap} needs code from its repository, and whence never runs that") as raised:
            load(str(trap))
        assert "trust_remote_code" not in str(raised.value)


def test_code_of_a_tokenizers_repository_is_never_run(trap):
    file = trap / "tokenizer_config.json"
    add_to(file, auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="OwnTokenizer")
    add_to(trap / "config.json", model_type="own")
    with pytest.raises(ModelNotFound) as raised:
        load_tokenizer(trap)
    assert "trust_remote_code" not in str(raised.value)


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
    with pytest.raises(ModelNotFound, match="not a valid id of a model"):
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
    monkeypatch.setattr(models, "_loaded", refuse)
    with pytest.raises(ModelNotFound, match="gated(.|\n)*https://huggingface.co/org/secret, then: hf auth login"):
        load_model("org/secret")


def test_a_real_model(shared_data):
    model, tokenizer = load_model(os.path.relpath(shared_data / "models" / "stories260K" / "hf"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    assert tokenizer("Once upon a time")["input_ids"][0] == tokenizer.bos_token_id
