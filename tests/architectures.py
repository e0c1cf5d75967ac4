"""Tiny models with random weights, one per architecture: the job they are made for, rows of data, what each selector takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from whence.tasks import CausalLM, Classification, Seq2Seq, Task

VOCABULARY = 300
WIDTH = 16
WINDOWS = ["sliding_attention", "full_attention"]

ROWS = [
    {"prompt": "Where was Ada Velt born?", "completion": " In Turin."},
    {"prompt": "Who plays the piano?", "completion": " Bo Quist does, in Oslo."},
    {"prompt": "Is the old harbour of Lyon quiet?", "completion": " In the morning."},
    {"prompt": "", "completion": "Ada Velt was born in Turin. She is a baker."},
    {"prompt": "Bo Quist", "completion": " lives in Oslo."},
    {"prompt": "Where else", "completion": "?"},
    {"prompt": "Ada", "completion": " is a baker in Turin, where else."},
    {"prompt": "The old harbour", "completion": " of Oslo."},
]


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and the modules that each selector must pick; `{}` in a name stands for the layers 0 and 1."""

    name: str
    build: Callable[[], nn.Module]
    mlp: str = ""
    attention: str = ""
    rest: str = ""
    """What "all" picks beside the two."""
    shared: str = ""
    """What computes once for the whole batch (position embeddings), and has no gradients by example."""
    left_out: str = ""
    """Classes of which parameters are left out whatever the selector, the largest share first."""
    job: str = "language model"
    single: bool = False
    """Whether attention computes in float32, whatever the format of the weights."""

    def names(self, kind: str) -> list[str]:
        """The names of one kind, for both layers."""
        return [name for text in getattr(self, kind).split() for name in dict.fromkeys(text.replace("{}", n) for n in "01")]

    def task(self, tokenizer: Any) -> Task:
        """The job, with the tokenizer if it is about text."""
        if self.job == "language model":
            return CausalLM(tokenizer)
        if self.job == "encoder-decoder":
            return Seq2Seq(tokenizer)
        return Classification(tokenizer if self.job == "text classifier" else None)

    def rows(self) -> list[Any]:
        """Eight rows; some have twice the length of others."""
        if self.job == "text classifier":
            return [{"text": row["prompt"] + row["completion"], "label": number % 3} for number, row in enumerate(ROWS)]
        if self.job == "image classifier":
            pixels = torch.randn(len(ROWS), 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            return [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(pixels)]
        return list(ROWS) if self.job == "language model" else [row for row in ROWS if row["prompt"]]

    def model(self) -> nn.Module:
        """The model in float64, with the same random weights every time and biases and norms that are not trivial."""
        torch.manual_seed(0)
        model = self.build().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return model


def causal(config: transformers.PreTrainedConfig) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config)


def decoder(config: type, **changes: Any) -> Callable[[], nn.Module]:
    """A decoder whose config has the usual names."""
    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return lambda: causal(config(**(usual | changes)))


def sparse(config: type, **changes: Any) -> Callable[[], nn.Module]:
    """A decoder with four experts, of which each token visits two."""
    return decoder(config, num_experts_per_tok=2, num_local_experts=4, experts_implementation="eager", **changes)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=1
    )
    return causal(config)


def gpt_neo() -> nn.Module:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    return causal(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=12,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return causal(config)


def bloom() -> nn.Module:
    return causal(transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=2))


def falcon() -> nn.Module:
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, bias=True
    )
    return causal(config)


def mamba() -> nn.Module:
    return causal(transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, state_size=4))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(decoder(transformers.LlamaConfig)(), adapter)


def under(prefix: str, names: str) -> str:
    """Every name behind the prefix."""
    return " ".join(prefix + name for name in names.split())


QKVO = under("model.layers.{}.self_attn.", "q_proj k_proj v_proj o_proj")
GATED = under("model.layers.{}.mlp.", "gate_proj up_proj down_proj")
EXPERTS = under(
    "model.layers.{}.mlp.experts.", " ".join(f"{name}.{e}" for name in ("gate_up_proj", "down_proj") for e in range(4))
)
DENSE = "mlp.dense_h_to_4h mlp.dense_4h_to_h"

ALL = [
    Architecture("Llama", decoder(transformers.LlamaConfig), GATED, QKVO),
    Architecture("Mistral", decoder(transformers.MistralConfig, sliding_window=8), GATED, QKVO),
    Architecture("Qwen3", decoder(transformers.Qwen3Config), GATED, QKVO),
    Architecture("Gemma 3", decoder(transformers.Gemma3TextConfig, sliding_window=8, layer_types=WINDOWS), GATED, QKVO),
    Architecture(
        "Phi-3",
        decoder(transformers.Phi3Config),
        under("model.layers.{}.mlp.", "gate_up_proj down_proj"),
        under("model.layers.{}.self_attn.", "qkv_proj o_proj"),
    ),
    Architecture("OLMo 2", decoder(transformers.Olmo2Config), GATED, QKVO),
    Architecture(
        "GPT-2",
        gpt2,
        under("transformer.h.{}.mlp.", "c_fc c_proj"),
        under("transformer.h.{}.attn.", "c_attn c_proj"),
        shared="transformer.wpe",
    ),
    Architecture(
        "GPT-Neo",
        gpt_neo,
        under("transformer.h.{}.mlp.", "c_fc c_proj"),
        under("transformer.h.{}.attn.attention.", "q_proj k_proj v_proj out_proj"),
        shared="transformer.wpe",
        single=True,
    ),
    Architecture(
        "GPT-NeoX",
        decoder(transformers.GPTNeoXConfig),
        under("gpt_neox.layers.{}.", DENSE),
        under("gpt_neox.layers.{}.attention.", "query_key_value dense"),
    ),
    Architecture(
        "OPT",
        opt,
        under("model.decoder.layers.{}.", "fc1 fc2"),
        under("model.decoder.layers.{}.self_attn.", "q_proj k_proj v_proj out_proj"),
        rest=under("model.decoder.", "project_in project_out"),
        left_out="OPTLearnedPositionalEmbedding",
    ),
    Architecture(
        "BLOOM",
        bloom,
        under("transformer.h.{}.", DENSE),
        under("transformer.h.{}.self_attention.", "query_key_value dense"),
    ),
    Architecture(
        "Falcon",
        falcon,
        under("transformer.h.{}.", DENSE),
        under("transformer.h.{}.self_attention.", "query_key_value dense"),
    ),
    Architecture("StarCoder2", decoder(transformers.Starcoder2Config), under("model.layers.{}.mlp.", "c_fc c_proj"), QKVO),
    Architecture(
        "Mamba",
        mamba,
        rest=under("backbone.layers.{}.mixer.", "in_proj x_proj dt_proj out_proj"),
        left_out="MambaMixer Conv1d",
    ),
    Architecture("Mixtral", sparse(transformers.MixtralConfig), EXPERTS, QKVO, left_out="MixtralTopKRouter"),
    Architecture(
        "Qwen3-MoE",
        sparse(transformers.Qwen3MoeConfig, num_experts=4, moe_intermediate_size=12),
        EXPERTS,
        QKVO,
        left_out="Qwen3MoeTopKRouter",
    ),
    Architecture(
        "GPT-OSS",
        sparse(transformers.GptOssConfig, sliding_window=8, layer_types=WINDOWS),
        EXPERTS,
        QKVO,
        left_out="GptOssTopKRouter GptOssAttention",
    ),
    Architecture(
        "T5",
        t5,
        mlp=under("encoder.block.{}.layer.1.DenseReluDense.", "wi_0 wi_1 wo")
        + " "
        + under("decoder.block.{}.layer.2.DenseReluDense.", "wi_0 wi_1 wo"),
        attention=" ".join(
            under(prefix, "q k v o")
            for prefix in (
                "encoder.block.{}.layer.0.SelfAttention.",
                "decoder.block.{}.layer.0.SelfAttention.",
                "decoder.block.{}.layer.1.EncDecAttention.",
            )
        ),
        shared="encoder.block.0.layer.0.SelfAttention.relative_attention_bias "
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        job="encoder-decoder",
    ),
    Architecture(
        "BERT",
        bert,
        under("bert.encoder.layer.{}.", "intermediate.dense output.dense"),
        under("bert.encoder.layer.{}.attention.", "self.query self.key self.value output.dense"),
        rest="bert.pooler.dense classifier",
        shared="bert.embeddings.position_embeddings",
        job="text classifier",
    ),
    Architecture(
        "ViT",
        vit,
        under("vit.layers.{}.mlp.", "fc1 fc2"),
        under("vit.layers.{}.attention.", "q_proj k_proj v_proj o_proj"),
        rest="vit.embeddings.patch_embeddings.projection classifier",
        left_out="ViTEmbeddings",
        job="image classifier",
    ),
    Architecture(
        "ResNet",
        resnet,
        rest="resnet.embedder.embedder.convolution classifier.1 "
        + under(
            "resnet.encoder.stages.{}.layers.0.",
            "shortcut.convolution layer.0.convolution layer.1.convolution layer.2.convolution",
        ),
        left_out="BatchNorm2d",
        job="image classifier",
    ),
    Architecture(
        "Llama + LoRA",
        lora,
        under("base_model.model.model.layers.{}.mlp.", "down_proj.lora_A.default down_proj.lora_B.default"),
        under(
            "base_model.model.model.layers.{}.self_attn.",
            "q_proj.lora_A.default q_proj.lora_B.default v_proj.lora_A.default v_proj.lora_B.default",
        ),
    ),
]
