"""Loading language models: hub ids, folders, and adapters on their base."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whence import dist
from whence.errors import AdapterBaseMissing, ModelNotFound
from whence.progress import note
from whence.shortage import shortages
from whence.store.intact import intact

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
HUB_TIMEOUT = 10
"""Seconds to wait for the hub's answer whether a model exists."""


@shortages()
def load_model(
    name: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    adapter: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    attention: str | None = None,
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, with its tokenizer.

    `name` is a hub id, a model's folder, or the folder or id of a PEFT adapter, whose base is then loaded beneath it;
    `adapter` puts one on a base of your choice. `dtype="auto"` is float32, and bfloat16 for checkpoints of 16 bits on a GPU.
    `device` is the GPU where there is one. `tokenizer` is for models that come without. `attention` is how
    transformers calls its kernels ("sdpa", "eager", "flash_attention_2"). Code from a model's repository is never run.

    Raises ModelNotFound (01), AdapterBaseMissing (02), and StaleArtifact (23) for files of a training that were damaged since.
    """
    name = locate(os.fspath(name))
    if adapter is None and is_adapter(name):
        name, adapter = base_of(name), name
    intact(Path(name))
    if adapter is not None:
        adapter = locate(os.fspath(adapter))
        intact(Path(adapter))
        note(f"adapter {adapter} on base {name}")
    device = torch.device(device or dist.device())
    try:
        model = _load_weights(name, dtype, device, attention)
    except (OSError, ValueError, ImportError) as error:
        raise not_loadable(name, error) from error
    words = load_tokenizer(tokenizer or tokenizer_home(name, adapter))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.eval(), words


def _load_weights(name: str, dtype: str | torch.dtype, device: torch.device, attention: str | None) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if dtype == "auto":
        stored = getattr(config, "dtype", None)
        dtype = torch.bfloat16 if device.type == "cuda" and stored in (torch.float16, torch.bfloat16) else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    how = {} if attention is None else {"attn_implementation": attention}
    model, report = auto_class(config).from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **how)
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        note(f"{len(names)} weights are not in {name} and are random numbers now: {', '.join(names[:3])} ...")
    return model.to(device)


def auto_class(config: Any) -> Any:
    """Choose what the model does by what its config says that it was saved as."""
    import transformers

    architecture = next(iter(config.architectures or []), "")
    if architecture.endswith("ForSequenceClassification"):
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def load_tokenizer(name: str | os.PathLike) -> Any:
    """Load a tokenizer; one without a padding token pads with its end of text, which the attention mask hides."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"No tokenizer at {name}.",
            given=_first_line(error),
            fix="name its folder: --tokenizer FOLDER (Python: tokenizer=...)",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def tokenizer_home(name: str, adapter: str | None) -> str:
    """Prefer the tokenizer that was saved with an adapter: training may have added tokens."""
    return adapter if adapter is not None and (Path(adapter) / "tokenizer_config.json").exists() else name


def locate(name: str) -> str:
    """Check that there is something at `name` before anything slow is tried; folders come back as paths."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / config).exists() for config in (CONFIG, ADAPTER_CONFIG)):
            raise _not_found(name, f"the folder has no {CONFIG} and no {ADAPTER_CONFIG}")
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")):
        raise _not_found(name, "there is no such folder")
    if not _is_cached(name, CONFIG) and not _is_cached(name, ADAPTER_CONFIG):
        _ask_hub(name)
    return name


def is_adapter(name: str) -> bool:
    """Tell whether a folder or hub id holds a PEFT adapter, not a whole model."""
    if Path(name).is_dir():
        return (Path(name) / ADAPTER_CONFIG).exists()
    from transformers.utils.peft_utils import find_adapter_config_file

    return _is_cached(name, ADAPTER_CONFIG) or (not _is_cached(name, CONFIG) and find_adapter_config_file(name) is not None)


def _is_cached(name: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:
        return False


def _ask_hub(name: str) -> None:
    """Ask the hub once, without the retries of a download, whether the model is there and open to us."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except HFValidationError:
        raise _not_found(name, "there is no such folder, and it can't be the id of a model on the hub") from None
    except RepositoryNotFoundError:
        raise _not_found(name, "there is no such folder, and the hub has no such model (or it is private)") from None
    except Exception as error:  # the hub's client passes on whatever its HTTP library raises
        raise _not_found(name, f"there is no such folder, and the hub can't be reached ({error})") from error


def base_of(adapter: str) -> str:
    """Find the base model that an adapter names, which may be a path relative to the adapter's folder."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    fix = f"load_model(BASE, adapter={adapter!r}); on the command line: BASE --adapter {adapter}"
    if not base:
        raise AdapterBaseMissing(f"{adapter} is an adapter that does not name its base model.", fix=fix)
    beside = Path(adapter).parent / base
    try:
        return locate(str(beside) if beside.is_dir() else base)
    except ModelNotFound as error:
        raise AdapterBaseMissing(
            f"{adapter} is an adapter, and its base model {base} is not there.", given=error.given, fix=fix
        ) from None


def not_loadable(name: str, error: Exception) -> ModelNotFound:
    """Say why a model can't be loaded, and what to do."""
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return ModelNotFound(
            f"{name} is a gated model, and you are not let in.",
            fix=f"ask for access at https://huggingface.co/{name}, then: hf auth login",
        )
    return ModelNotFound(f"The model at {name} can't be loaded.", given=_first_line(error))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _not_found(name: str, reason: str) -> ModelNotFound:
    nearest = _nearest(name)
    return ModelNotFound(
        f"No model at {name}.",
        given=reason,
        accepted="a hub id, a folder of a model, a folder of a PEFT adapter",
        fix=f"Nearest local: {', '.join(nearest)}" if nearest else "check the spelling; for private models: hf auth login",
    )


def _nearest(name: str) -> list[str]:
    """List folders of models whose names resemble the missing one: beside it, and in and below the working folder."""
    places = [Path(name).expanduser().parent, Path()]
    folders = {
        folder.parent
        for place in places
        for pattern in (CONFIG, ADAPTER_CONFIG)
        for folder in [*place.glob(f"*/{pattern}"), *place.glob(f"*/*/{pattern}")]
    }
    wanted = Path(name).name.lower()
    likeness = {
        folder: max(difflib.SequenceMatcher(None, wanted, part.lower()).ratio() for part in folder.parts[-2:])
        for folder in folders
    }
    near = [folder for folder, ratio in likeness.items() if ratio >= 0.6]
    return [str(folder) for folder in sorted(near, key=lambda folder: (-likeness[folder], str(folder)))[:3]]
