from peft import LoraConfig, get_peft_model

from whence.coverage import cover
from whence.planning.blank import tokenizer_of
from whence.planning.hints import hints
from whence.planning.plan import Settings


def test_12_lora_does_not_shrink_factors(tiny_llama):
    assert hints(cover(tiny_llama, "mlp"), Settings(), 4) == ()
    adapted = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["up_proj"]))
    (said,) = hints(cover(adapted, "lora"), Settings(), 4)
    assert "LoRA does not shrink the factors" in said and "[WHENCE-12]" in said


def test_an_adapter_is_planned_with_the_tokenizer_of_its_base(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["up_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "lora")
    assert tokenizer_of(str(tmp_path / "lora")).get_vocab() == tiny_tokenizer.get_vocab()
