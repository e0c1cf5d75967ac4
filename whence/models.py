"""Loading language models: hub ids, folders, and adapters on their base."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import shlex
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from whence import dist
from whence.adapters import adapter_weights, refused_prompts
from whence.errors import AdapterBaseMissing, ModelNotFound, UsageError, WhenceError
from whence.escapes import command
from whence.progress import note
from whence.settings import Dtype, valid
from whence.shortage import first_line, is_out_of_memory, shortages
from whence.store.intact import intact, is_run_folder

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
HUB_TIMEOUT = 10
"""Seconds to wait for the hub's answer whether a model exists."""

WRAPPERS = r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
"""What torch's wrappers put into the names of weights: DistributedDataParallel, compile, FSDP, checkpoints."""

AGAIN = "copy or download the file again"

POINTER = b"version https://git-lfs"
"""How a file begins that stands for one that Git LFS did not fetch."""


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
    `device` is the GPU where there is one. `tokenizer` is for models that come without one. `attention` is how
    transformers calls its kernels ("sdpa", "eager", "flash_attention_2"). Code from a model's repository is never run.

    Every weight of the model and of the adapter comes from the files: a model of which one is missing, cut short or of
    another shape is refused. Names with the prefixes of torch's wrappers (`module.`, `_orig_mod.`) are read without them.

    Raises ModelNotFound (01), AdapterBaseMissing (02), CoverageError (17) for adapters that are learned prompts, and
    StaleArtifact (23) for files of a training that were damaged since.
    """
    device, dtype = _device(device), _dtype(dtype)
    name = locate(os.fspath(name))
    if adapter is None and is_adapter(name):
        name, adapter = base_of(name), name
    intact(Path(name))
    if adapter is not None:
        adapter = locate(os.fspath(adapter))
        intact(Path(adapter))
        note(f"adapter {adapter} on base {name}")
    model = _load_weights(name, dtype, device, attention)
    words = load_tokenizer(tokenizer or tokenizer_home(name, adapter))
    if adapter is not None:
        model = _load_adapter(model, name, adapter)
    _fit_tokens(model, words)
    return model.eval(), words


def load_encoder(name: str | os.PathLike, *, device: str | torch.device | None = None) -> tuple[Any, Any]:
    """Load a text encoder, a hub id or a folder, in evaluation mode and without a head, and its tokenizer; see `load_model`."""
    device, name = _device(device), locate(os.fspath(name))
    intact(Path(name))
    model: Any = _load_weights(name, torch.float32, device, headless=True)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    return encoder.eval(), load_tokenizer(name)


def _device(device: str | torch.device | None) -> torch.device:
    """The device of that name; raises UsageError for an unknown one."""
    try:
        return torch.device(device or dist.device())
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"device can't be {device!r}.", given=first_line(error), accepted="cpu, cuda, cuda:1, or None"
        ) from None


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype of that name, or "auto"."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    return getattr(torch, valid(Dtype, dtype, "dtype"))


def dtype_of(config: Any, dtype: str | torch.dtype, device: str | torch.device | None) -> torch.dtype:
    """The dtype that a model with this config is loaded in; raises UsageError for an unknown dtype or device."""
    device, dtype = _device(device), _dtype(dtype)
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = getattr(config, "dtype", None)
    return torch.bfloat16 if device.type == "cuda" and stored in (torch.float16, torch.bfloat16) else torch.float32


def _load_weights(
    name: str, dtype: str | torch.dtype, device: torch.device, attention: str | None = None, *, headless: bool = False
) -> nn.Module:
    """Load the model that the config describes, or it without its head; raises ModelNotFound where that is impossible."""
    try:
        return _loaded(name, dtype, device, attention, headless)
    except (WhenceError, MemoryError):
        raise
    except Exception as error:  # the libraries pass on whatever damaged files or other configs lead to
        if is_out_of_memory(error):
            raise
        raise not_loadable(name, error) from error


def _loaded(name: str, dtype: str | torch.dtype, device: torch.device, attention: str | None, headless: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    _check_files(name, "model", "pytorch_model")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    dtype = dtype_of(config, dtype, device)
    how = {} if attention is None else {"attn_implementation": attention}

    def load(**renamed: Any) -> tuple[Any, dict[str, Any]]:
        settings = {"config": config, "dtype": dtype, "trust_remote_code": False}
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that they are named
        kind = AutoModel if headless else auto_class(config)
        model, report = kind.from_pretrained(name, **settings, **told, **how, **renamed)
        if headless:  # the pooler that comes with it is not used, and its own head is left out
            report["missing_keys"] = [key for key in report["missing_keys"] if "pooler." not in key]
        return model, report

    model, report = load()
    if report["missing_keys"] and any(re.search(WRAPPERS, key) for key in report["unexpected_keys"]):
        model, report = load(key_mapping={f"^(?:{WRAPPERS})+": "", rf"\.(?:{WRAPPERS})+": "."})
        note(f"the names of the weights in {name} have the prefix of a wrapper (module., _orig_mod.), which was left out")
    if report["mismatched_keys"]:
        shapes = [
            f"{key} {tuple(saved)} in the file, {tuple(own)} in the model" for key, saved, own in report["mismatched_keys"]
        ]
        raise _other_weights(name, given=f"{len(shapes)} weights have another shape: {_some(shapes)}")
    if report["missing_keys"]:
        raise _other_weights(name, report["missing_keys"], report["unexpected_keys"])
    if report["unexpected_keys"] and not headless:
        names = sorted(report["unexpected_keys"])
        note(f"{len(names)} weights in {name} have no place in {type(model).__name__} and are not used: {_some(names)}")
    return model.to(device)


def _load_adapter(model: Any, name: str, adapter: str) -> nn.Module:
    """Put an adapter on its base, with all its weights, ready to be trained."""
    from peft import PeftConfig, get_peft_model

    _check_files(adapter, "adapter_model")
    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise refused_prompts(config, adapter)
    base, config.base_model_name_or_path, config.inference_mode = config.base_model_name_or_path, None, False
    if base and Path(base).name != Path(name).name:
        note(f"{adapter} says that it was trained on {base}, not on {name}")
    saved = adapter_file(adapter)
    _resize_vocabulary(model, saved)
    try:
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        raise _other_weights(adapter, given=_shapes(error), base=base or "its base") from error
    config.base_model_name_or_path = base
    set_adapter(adapted, saved, adapter)
    return adapted


def fresh_adapter(model: nn.Module, like: Any, seed: int) -> nn.Module:
    """Put an untrained adapter on a base, drawn as `get_peft_model` draws it after `torch.manual_seed(seed)`.

    It is of the config of the adapted model `like`. Raises UsageError where that is not a single PEFT adapter.
    """
    from peft import PeftModel, get_peft_model

    if not isinstance(like, PeftModel) or len(like.peft_config) != 1:
        raise UsageError(
            "It is unclear which adapter to begin with.", given=type(like).__name__, accepted="one adapter of PEFT"
        )
    ((name, config),) = like.peft_config.items()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, copy.deepcopy(config), name)  # type: ignore[arg-type]


def adapter_file(adapter: str) -> dict[str, torch.Tensor]:
    """Read an adapter's weights, without the prefixes of wrappers in their names."""
    from peft.utils import load_peft_weights

    return {re.sub(rf"(^|\.)(?:{WRAPPERS})+", r"\1", key): weight for key, weight in load_peft_weights(adapter, "cpu").items()}


def set_adapter(adapted: Any, saved: dict[str, torch.Tensor], adapter: str) -> None:
    """Put an adapter's weights into the model; raises ModelNotFound unless each has its place, and each place its weight."""
    from peft.utils import set_peft_model_state_dict

    base = adapted.peft_config["default"].base_model_name_or_path or "its base"
    try:
        absent, unexpected = set_peft_model_state_dict(adapted, saved)
    except (KeyError, RuntimeError) as error:
        missing = [error.args[0]] if isinstance(error, KeyError) else []
        raise _other_weights(adapter, missing, given=_shapes(error), base=base) from error
    loaded = {id(weight) for name, weight in adapted.named_parameters(remove_duplicate=False) if name not in absent}
    own = adapter_weights(adapted, active=True)  # biases of the base are trained, too, where the config says so
    wanted = {id(weight): name for name, weight in adapted.named_parameters() if id(weight) in own or weight.requires_grad}
    missing = [name for each, name in wanted.items() if each not in loaded and (each in own or name.endswith("bias"))]
    if missing or unexpected:
        raise _other_weights(adapter, missing, unexpected, base=base)


def _resize_vocabulary(model: Any, saved: Mapping[str, torch.Tensor]) -> None:
    """Give the base as many tokens as it had when it was adapted, where the adapter brings the embeddings for them."""
    names = {module: name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for key in (f"base_model.model.{names.get(module)}.weight", f"base_model.model.{names.get(module)}.base_layer.weight"):
            if key in saved and saved[key].ndim == 2 and len(saved[key]) != len(module.weight):
                note(f"the adapter brings embeddings of {len(saved[key]):,} tokens; the base has {len(module.weight):,}")
                model.resize_token_embeddings(len(saved[key]), mean_resizing=False)
                return


def _fit_tokens(model: Any, tokenizer: Any) -> None:
    """Note where the tokenizer has tokens that the model has no embedding for, and pad with another."""
    rows = len(model.get_input_embeddings().weight)
    if len(tokenizer) <= rows:
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    more = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(rows, len(tokenizer))))]
    note(
        f"the tokenizer has {len(more):,} tokens that the model has no embedding for; rows with them are refused: {_some(more)}"
    )


def _check_files(name: str, *stems: str) -> None:
    """Refuse a folder whose files are missing, cut short, or were not fetched by Git LFS, and name the file.

    If the weights come in several forms, `stems` of their files, only the one that is loaded is checked.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    for file in sorted(file for file in folder.iterdir() if file.suffix in (".json", ".model", ".txt", ".jinja")):
        _refuse_pointer(file)
        passed_over = file.name == "generation_config.json"  # by transformers, if it can't read it
        if (passed_over or file.name.endswith(".index.json")) and (reason := _fault_of_json(file)):
            raise ModelNotFound(f"{file} is damaged or cut short.", given=reason, fix=AGAIN)
    for place in [folder / f"{stem}.{form}" for form in ("safetensors", "bin") for stem in stems]:
        index = place.with_name(f"{place.name}.index.json")
        if place.exists():
            return _check_weights(place)
        if index.exists():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
            if gone := [shard for shard in shards if not (folder / shard).exists()]:
                raise ModelNotFound(
                    f"{folder / gone[0]} is missing.",
                    given=f"{len(gone)} of the {len(shards)} files that {index.name} names are not there",
                    fix=AGAIN,
                )
            for shard in shards:
                _check_weights(folder / shard)
            return None


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) != POINTER:
            return
    raise ModelNotFound(
        f"{file} is a pointer of Git LFS, not the file itself.",
        given=f"{file.stat().st_size} bytes that begin with {POINTER.decode()!r}",
        fix=f"git -C {shlex.quote(str(file.parent))} lfs pull",
    )


def _check_weights(file: Path) -> None:
    """Refuse a file of weights that is not whole."""
    _refuse_pointer(file)
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        needed = _safetensors_size(file)
    else:
        with file.open("rb") as opened:
            packed = opened.read(2) in (b"PK", b"")
        needed = -1 if packed and not zipfile.is_zipfile(file) else size
    if needed != size:
        raise ModelNotFound(
            f"{file} is damaged or cut short.",
            given=f"{size:,} bytes" + (f", where its header says {needed:,}" if needed > size else ""),
            fix=AGAIN,
        )
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelNotFound(f"{file} is damaged or cut short.", given=first_line(error), fix=AGAIN) from error


def _safetensors_size(file: Path) -> int:
    """How many bytes the file must have by its header; -1 where that can't be read."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= size - 8:
            return 8 + length if size >= 8 else -1
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            return 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return -1


def _other_weights(
    name: str, missing: Collection[str] = (), unexpected: Collection[str] = (), *, given: str = "", base: str = ""
) -> ModelNotFound:
    """What to say where weights of the model or adapter are not in its files, or do not fit."""
    what = "adapter" if base else "model"
    said = [f"{len(missing)} weights of the {what} are not there: {_some(missing)}"] if missing else []
    said += [f"{len(unexpected)} that are have no place in it: {_some(unexpected)}"] if unexpected else []
    said += [given] if given and not said else []
    return ModelNotFound(
        f"The weights in {name} are not those of the {what}{' on this base' if base else ' that its config.json describes'}.",
        given="; ".join(said),
        accepted="files with every weight, each of its shape: missing ones are not made up",
        fix=f"put the adapter on the base it was trained on ({base}): BASE --adapter {name}"
        if base
        else "save the model again with save_pretrained, or correct config.json",
    )


def _shapes(error: Exception) -> str:
    """The lines of torch's message that name weights of another shape, or the first line of any other."""
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return "; ".join(lines[:3]) or first_line(error)


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


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
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises bare ones
        if needs_code(error) or _unreadable(os.fspath(name)):
            raise not_loadable(os.fspath(name), error) from error
        raise ModelNotFound(
            f"No tokenizer at {name}.",
            given=first_line(error),
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
        if is_run_folder(folder) or not (folder / CONFIG).exists():
            for inside in (folder / "model", folder / "train" / "model"):
                if any((inside / config).exists() for config in (CONFIG, ADAPTER_CONFIG)):
                    raise ModelNotFound(f"{name} is not a model, but a folder with one.", fix=str(inside))
        if is_run_folder(folder):
            raise _not_found(name, "a folder of whence, with factors, scores or the like")
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
        raise _not_found(name, "there is no such folder, and it is not a valid id of a model on the hub") from None
    except RepositoryNotFoundError:
        raise _not_found(name, "there is no such folder, and the hub has no such model (or it is private)") from None
    except Exception as error:  # the hub's client passes on whatever its HTTP library raises
        raise _not_found(name, f"there is no such folder, and the hub can't be reached ({error})") from error


def base_of(adapter: str) -> str:
    """Find the base model that an adapter names, which may be a path relative to the adapter's folder."""
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise not_loadable(adapter, error) from error
    fix = f"load_model(BASE, adapter={adapter!r}); on the command line: BASE {command('--adapter', adapter)}"
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
    """Explain why a model can't be loaded, and what to do."""
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return ModelNotFound(
            f"{name} is a gated model, and you don't have access.",
            fix=f"ask for access at https://huggingface.co/{name}, then: hf auth login",
        )
    if needs_code(error):
        return ModelNotFound(
            f"{name} needs code from its repository, and whence never runs that.",
            given="an auto_map in config.json or tokenizer_config.json, and no such model in transformers",
            accepted="models and tokenizers whose code is part of transformers, and in Python any model that you load yourself",
            fix="load it in Python, and pass it: whence.fit(model, whence.CausalLM(tokenizer), rows)",
        )
    if broken := _unreadable(name):
        return ModelNotFound(f"{broken} is damaged or cut short.", given=first_line(error), fix=AGAIN)
    return ModelNotFound(f"The model at {name} can't be loaded.", given=first_line(error))


def _unreadable(name: str) -> Path | None:
    """The first JSON file of a model's folder that can't be read."""
    folder = Path(name)
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return next((file for file in files if _fault_of_json(file)), None)


def _fault_of_json(file: Path) -> str:
    """Why a JSON file can't be read; empty where it can."""
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return first_line(error)
    return ""


def needs_code(error: Exception) -> bool:
    """Whether transformers refused to load something for want of leave to run code that comes with it."""
    return "trust_remote_code" in str(error)


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
