"""Every setting of every stage, declared once: its type, bounds, default and meaning.

The functions of the library take these classes, a `whence.yaml` is checked against them (`whence.config`), and the options of
the command line are made from them (`whence.cli.from_settings`). Torch is not needed, and pydantic, which checks values, only
where some are: `--help` stays quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from annotated_types import Ge, Gt, Le

from whence.errors import UsageError
from whence.precision import Format as Dtype
from whence.precision import Precision, Products

S = TypeVar("S", bound="Section")


def setting(default: Any, meaning: str = "", *flags: str, none: str | None = None, **about: str) -> Any:
    """A field of a section: its default (`...` if it must be given), and what it means.

    For the command line, where its name does not say them: its `flags`, the word for `none`, and the `metavar`. `trainer` is
    its name in `transformers.TrainingArguments`.
    """
    comment = f"{meaning.removesuffix('.')}; null for {none}." if none else meaning
    metadata = {"description": comment or None, "meaning": meaning, "flags": flags, "none": none, **about}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=MISSING if default is ... else default, metadata=metadata)


class NotInFile:
    """Marks a setting that a `whence.yaml` has once for all stages, or can't have."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Any:
        from pydantic_core import PydanticOmit

        raise PydanticOmit

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def refuse(value: Any) -> Any:
            raise PydanticCustomError("extra_forbidden", "no setting of a file")

        return core_schema.no_info_plain_validator_function(refuse)


@dataclass(frozen=True)
class Setting:
    """One field of a section; `default` is MISSING where it must be given."""

    name: str
    kind: Any
    default: Any
    in_file: bool
    meaning: str = ""
    description: str | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    none: str | None = None
    trainer: str = ""

    @property
    def section(self) -> type[Section] | None:
        """The section that the field holds, or may hold."""
        return next((kind for kind in alternatives(self.kind) if isinstance(kind, type) and issubclass(kind, Section)), None)

    @property
    def sections(self) -> type[Section] | None:
        """The section that the field holds any number of, by name."""
        parts = typing.get_args(self.kind) if typing.get_origin(self.kind) is dict else ()
        return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)

    def check(self, value: Any, name: str = "", *, typed: bool = False) -> Any:
        """The value as the field keeps it, see `valid`."""
        return valid(self.kind, value, name or self.name, typed=typed)


def valid(kind: Any, value: Any, name: str, *, typed: bool = False) -> Any:
    """The value as a setting of this kind is kept; raises UsageError for an invalid one, of an argument or option `name`.

    Where it was `typed`, on a command line or in a file, "0.1" is a number; in Python it is text.
    """
    from pydantic import ValidationError

    adapter = _adapter(kind)
    try:
        kept = adapter.validate_python(value)
        if not typed and _word(value) is not _word(kept):
            adapter.validate_python(value, strict=True)  # says what it takes
    except ValidationError as error:
        messages = [entry["msg"].partition(", unable")[0].removeprefix("Input should be ") for entry in error.errors()]
        said = " ".join(map(str, value)) if typed and isinstance(value, list | tuple) else value if typed else repr(value)
        raise UsageError(f"{name} can't be {said}.", accepted=" or ".join(dict.fromkeys(messages))) from None
    if isinstance(kept, float) and not math.isfinite(kept):
        raise UsageError(f"{name} can't be {kept}.", accepted="a finite number")
    return kept


def valid_damping(damping: Any, absolute: Any) -> tuple[float, float | None]:
    """Both kinds of damping that an inverse takes, see `valid`."""
    return valid(AtLeastZero, damping, "damping"), valid(AtLeastZero | None, absolute, "absolute")


def _word(value: Any) -> type | None:
    """Which of the types a value has that are numbers only on a command line."""
    return next((kind for kind in (bool, str) if isinstance(value, kind)), None)


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
class Section:
    """Settings that can't be changed once made: a frozen dataclass, whose values are checked."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for field in settings_of(type(self)):
            object.__setattr__(self, field.name, field.check(getattr(self, field.name)))

    @classmethod
    def of(cls, settings: Any, changes: Mapping[str, Any]) -> Self:
        """The settings that a function was given, with its keywords over them; raises UsageError for anything else."""
        if not isinstance(settings, cls):
            raise UsageError(
                f"The settings can't be {settings!r}.",
                accepted=f"{cls.__name__}(...) of whence.settings, or each setting as a keyword",
                fix=f"{next(iter(settings_of(cls))).name}=...",
            )
        return settings.changed(**changes)

    def as_json(self) -> dict[str, Any]:
        """The settings that a file may have, as JSON values."""
        return {name: _as_json(getattr(self, name)) for name in in_file(type(self))}

    def part(self, section: type[S]) -> S:
        """Those of the settings that make another section."""
        return section(**{field.name: getattr(self, field.name) for field in settings_of(section)})

    def changed(self, **changes: Any) -> Self:
        """These settings with some of them changed."""
        names = [field.name for field in settings_of(type(self))]
        for name in changes.keys() - set(names):
            near = difflib.get_close_matches(name, names, n=1)
            fix = f"did you mean {near[0]}?" if near else ""
            raise UsageError(f"There is no setting {name!r} here.", accepted=", ".join(names), fix=fix)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(entry) for name, entry in value.items()}
    return value.as_json() if isinstance(value, Section) else list(value) if isinstance(value, tuple) else value


@functools.cache
def settings_of(section: type) -> tuple[Setting, ...]:
    """The settings of a section: its own, then those of the sections that it is made of."""
    kinds, found = typing.get_type_hints(section, include_extras=True), {}
    for entry in dataclasses.fields(section):
        kind, marks = kinds[entry.name], getattr(kinds[entry.name], "__metadata__", ())
        hidden = any(isinstance(mark, NotInFile) for mark in marks)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        kind = typing.get_args(kind)[0] if hidden else kind
        found[entry.name] = Setting(entry.name, kind, default, not hidden, **entry.metadata)
    own = [name for name in section.__annotations__ if name in found]
    return tuple(found[name] for name in dict.fromkeys([*own, *found]))


def in_file(section: type) -> dict[str, Setting]:
    """The settings of a section that a file may have, by name."""
    return {field.name: field for field in settings_of(section) if field.in_file}


def alternatives(kind: Any) -> list[Any]:
    """The types of a union, or the one type, each with its bounds; the values of a literal one by one."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return [one for part in parts for one in alternatives(part)]
    return [Literal[part] for part in parts] if origin is Literal else [kind]  # type: ignore[misc]


class Numeric(Section):
    """Settings of a stage that multiplies: in the dtypes of a `Precision`, each separately."""

    @property
    def precision(self) -> Precision:
        """The dtypes as one value."""
        return Precision(**{part: getattr(self, name) for name, part in FORMATS.items() if hasattr(self, name)})

    def changed(self, **changes: Any) -> Self:
        """These settings with some of them changed; `precision` stands for those of its formats that are here."""
        if (precision := changes.pop("precision", None)) is not None:
            if not isinstance(precision, Precision):
                raise UsageError(f"precision can't be {precision!r}.", accepted="whence.Precision(...)")
            changes = {name: getattr(precision, part) for name, part in FORMATS.items() if hasattr(self, name)} | changes
        return super().changed(**changes)

    def deciding(self) -> dict[str, Any]:
        """Those that decide numbers, for provenance: all but the size of batches, and whether gradients are checked."""
        names = [field.name for field in settings_of(type(self)) if field.name not in ("batch_tokens", "check")]
        return {name: getattr(self, name) for name in names}


FORMATS = {"statistics": "statistics", "operands": "scores", "products": "products"}
"""What of a `Precision` a setting decides."""

Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
AtLeastZero = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Amount = Annotated[int, Ge(0)]
Length = Annotated[int, Ge(2)]
"""Tokens of a row: fewer than two predict nothing."""
Sample = Count | Literal["all"] | None
"""How many examples: a number, all, or (None) enough."""
Modules = str | tuple[str, ...] | None
Seed = Annotated[int, NotInFile()]

# What several stages say in the same words, with their flags.
BATCH_TOKENS = "Positions per batch; halved automatically if it does not fit."
CHUNKS = "Parts of the data after which the work is saved."
COLUMNS = "Which column is which part: prompt, completion, text, messages, source, id.", "--columns", "-c"
DAMPING = "Damping, in units of each module's mean eigenvalue."
MODULES = "mlp, attention, all, trained, lora, last-K, or globs on names, joined by commas; default: mlp.", "--modules", "-m"
NEW_TOKENS = "Maximum tokens to generate."
OPERANDS = "Dtype of the inner products."
CHECK = "Compare gradients of a few rows with autograd's before the work."
PRODUCTS = "Dtype to multiply in; auto takes bfloat16 where it is fast and hardly moves scores."
SEED = "Seed of everything drawn."


class Data(Section):
    """The training data."""

    path: str = setting(
        ...,
        "Training data: file (jsonl, json, csv, tsv, parquet, text), folder of files or of `save_to_disk`, 'part-*.jsonl', "
        "or data set of the hub.",
        "--data",
        "-d",
    )
    columns: dict[str, str] = setting({}, *COLUMNS, metavar="PART=COLUMN")
    split: str = setting("train", "Split of a data set that has several.")
    limit: Count | None = setting(None, "Read only the first N rows.")
    format: Literal["plain", "qa", "instruction"] | Format = setting(
        "plain",
        'plain: as it is; qa: "Question: ... Answer: ..."; instruction: Alpaca\'s; or templates of your own. '
        "Prompts get it too.",
    )
    normalise: Normalise | None = None
    max_length: Length = setting(512, "Maximum tokens per row; longer rows are cut.")
    chat_template: str | None = setting(
        None, "Chat template for conversations: chatml, a file, or one in Jinja; none: no template.", "--template"
    )
    append_eos: bool = setting(False, "End rows with the end-of-text token, as in training.", "--append-eos/--no-append-eos")


class Normalise(Section):
    """What is done to every text before it is tokenized, for training, factors and scores alike."""

    unicode: Literal["NFC", "NFKC"] | None = setting(
        "NFKC", "Unicode normal form; NFKC also makes special characters plain (full-width letters, ligatures)."
    )
    whitespace: bool = setting(True, "Runs of spaces become one, spaces at the ends go, line breaks stay.")
    lowercase: bool = False


class Format(Section):
    """How prompt and completion are written; `{prompt}` and `{completion}` stand for the columns."""

    prompt: str = "{prompt}"
    completion: str = "{completion}"


class Weights(Section):
    """How a model is loaded."""

    adapter: str | None = setting(None, "LoRA adapter to put on the model.")
    tokenizer: str | None = setting(None, "Tokenizer, for models that come without one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = setting("auto", "Dtype of the weights.")
    device: str | None = setting(None, "cpu, cuda, cuda:1; the GPU if there is one.")


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), by PEFT."""

    r: Count = setting(8, "Its rank.", "--lora-r")
    alpha: float = setting(16.0, "", "--lora-alpha")
    dropout: Share = setting(0.0, "", "--lora-dropout")
    targets: Literal["all-linear"] | tuple[str, ...] = setting(
        "all-linear", "Names of the layers that get one.", "--lora-targets"
    )


class Train(Section):
    """Fine-tuning with the Hugging Face Trainer. The loss is that of the answers only."""

    epochs: Positive = setting(1.0, "Passes over the data.", trainer="num_train_epochs")
    max_steps: Count | None = setting(None, "Stop after N steps.", trainer="max_steps")
    batch_size: Count = setting(8, "Rows at a time.", "--batch-size", "-b", trainer="per_device_train_batch_size")
    gradient_accumulation: Count = setting(1, "Batches that make a step.", trainer="gradient_accumulation_steps")
    learning_rate: Positive = setting(2e-5, "Peak learning rate.", "--learning-rate", "--lr", trainer="learning_rate")
    weight_decay: AtLeastZero = setting(0.01, trainer="weight_decay")
    schedule: str = setting("cosine_with_restarts", "A learning-rate schedule of transformers.", trainer="lr_scheduler_type")
    schedule_options: dict[str, Any] = setting(
        {},
        "What the schedule takes, such as {num_cycles: 2}.",
        "--schedule-option",
        metavar="NAME=VALUE",
        trainer="lr_scheduler_kwargs",
    )
    warmup: AtLeastZero = setting(
        0.0, "Steps over which the learning rate rises; a share of all below 1.", trainer="warmup_steps"
    )
    max_grad_norm: AtLeastZero | Literal["auto"] = setting(
        "auto", "Norm at which gradients are clipped, 0 for never; auto: 1, and never in bfloat16.", trainer="max_grad_norm"
    )
    bf16: bool | Literal["auto"] = setting("auto", "Compute in bfloat16; default (auto): where the GPU has it.", trainer="bf16")
    optimizer: str = setting("adamw_torch_fused", "An optimizer of transformers.", trainer="optim")
    gradient_checkpointing: bool = setting(False, "Less memory, a third more time.", trainer="gradient_checkpointing")
    workers: Amount = setting(0, "Processes that prepare batches.", trainer="dataloader_num_workers")
    drop_last: bool = setting(True, "Leave out the last, incomplete batch of an epoch.", trainer="dataloader_drop_last")
    save_steps: Count = setting(100, "Steps between checkpoints.", trainer="save_steps")
    log_steps: Count = setting(20, "Steps between lines of metrics.jsonl.", trainer="logging_steps")
    keep: Count | None = setting(3, "Checkpoints to keep, the newest.", none="all", trainer="save_total_limit")
    evaluation: Share = setting(0.1, "Share of the rows held out of training, to measure the loss on.")
    evaluation_limit: Count | None = setting(7000, "Maximum rows held out.")
    eval_steps: Count | None = setting(None, "Measure every N steps; default: only at the end.", trainer="eval_steps")
    lora: Lora | None = None
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = setting(
        "none", "Where metrics go besides the files.", trainer="report_to"
    )
    arguments: dict[str, Any] = setting(
        {}, "Any other argument of `transformers.TrainingArguments`.", "--argument", metavar="NAME=VALUE"
    )


class Generate(Section):
    """The answers that are asked about."""

    max_new_tokens: Count = setting(64, NEW_TOKENS)
    temperature: AtLeastZero = setting(0.0, "0 takes the likeliest token each time.")
    base: bool = setting(True, "Also ask the base model, to compare.")
    batch_size: Count = setting(8, "Prompts at a time.")


class Fit(Numeric):
    """The curvature factors."""

    method: Literal["ekfac", "kfac", "shampoo", "diagonal", "identity"] = setting("ekfac", "How curvature is approximated.")
    modules: Modules = setting(None, *MODULES)
    examples: Sample = setting(None, "Rows to fit the factors on; default: enough for steady scores.")
    eigenvalue_examples: Sample = setting(None, "Rows for the corrected eigenvalues; default: enough.")
    disjoint: bool | None = setting(
        None,
        "Take other rows for the eigenvalues than for the factors; default: where there are enough.",
        "--disjoint/--overlapping",
    )
    until: Share | None = setting(
        None, "Double the sample until scores correlate by R (0.99, say) with those of half of it.", metavar="R"
    )
    labels: Literal["model", "data"] = setting(
        "model", "Labels drawn from the model (true Fisher), or the data's own (empirical Fisher)."
    )
    draws: Count = setting(1, "Labels drawn for each row: less noise where rows are few, N times the cost.")
    seed: Seed = setting(0, SEED)
    largest_factor: Count | None = setting(None, "Split wider covariances into blocks of this width.")
    statistics: Dtype = setting("float32", "Dtype of the sums' operands.")
    products: Products = setting("auto", PRODUCTS)
    batch_tokens: Count | None = setting(None, BATCH_TOKENS)
    check: bool = setting(True, CHECK)
    groups: Count = setting(1, "Groups of modules fitted one after the other: less memory.")
    chunks: Count = setting(8, CHUNKS)


class Inspect(Section):
    """Plots and health of the factors."""

    layer: int | None = setting(None, "Number of the layer whose modules are drawn; default: the last.", metavar="N")
    modules: tuple[str, ...] = setting((), "Modules to draw instead, by name or glob.")
    clip_percentile: Annotated[float, Gt(0), Le(100)] = setting(
        99.5, "Percentile of eigenvalues at which the colours of maps end.", "--clip", metavar="P"
    )
    cmap: str = setting("viridis", "Colours of maps, by matplotlib's name.")


class Measured(Section):
    """What is asked about an answer, and with what damping."""

    damping: AtLeastZero = setting(0.1, DAMPING)
    measurement: Literal["logprob", "margin", "loss"] = setting(
        "logprob", "What is asked about the answer: its log-probability, log-odds, or loss."
    )


class Score(Numeric):
    """The scores."""

    per: Literal["example", "token", "module"] = setting("example", "Also keep the parts of each score.")
    aggregate: Annotated[tuple[str, ...], NotInFile()] = setting((), "Add up queries, examples, or both.")
    rank: Count | Literal["full", "auto"] = setting("auto", "Rank of the queries' gradients: a number, full or auto.")
    rescore: Amount = setting(0, "Compute each query's N highest and lowest scores again, at full rank and in float32.")
    norms: tuple[Literal["cosine", "relatif"], ...] = setting(
        (), "Also compute what normalising needs: cosine or relatif.", "--norm", metavar="NORM"
    )
    seed: Seed = setting(0, SEED)
    n_train: Count | None = setting(None, "Rows the model was trained on, if these are only some of them.")
    operands: Dtype = setting("float32", OPERANDS)
    products: Products = setting("auto", PRODUCTS)
    batch_tokens: Count | None = setting(None, BATCH_TOKENS)
    check: bool = setting(True, CHECK)
    chunks: Count = setting(8, CHUNKS)

    def changed(self, **changes: Any) -> Self:
        """These settings with some of them changed; a rank of None is full, and one word for norms or aggregate is enough."""
        if changes.get("rank", "auto") is None:
            changes["rank"] = "full"
        changes |= {name: (word,) for name in ("norms", "aggregate") if isinstance(word := changes.get(name), str)}
        return super().changed(**changes)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescore and self.per != "example":
            raise UsageError(f"`rescore` computes whole scores again, and `per` asks for them per {self.per}: one of them")


class Mirrored(Section):
    """How a training is repeated along with queries."""

    share: Share = setting(1.0, "Share of the rows that it reads: 1 for removals of few rows, 0.5 for large subsets.")
    complement: bool = setting(False, "Repeat it on the rows that were left out, too, and take the mean.")
    start: Share = setting(0.125, "Share of the steps before the query is read for the first time.")
    eps: Positive = setting(0.1, "How much the query counts in each step, where a row counts 1.")
    ekfac: AtLeastZero = setting(0.0, "How much EK-FAC's scores count beside these, both over their root mean square.")
    drift: AtLeastZero = setting(0.01, "How far from the model the repeated training may end, as a share of how far it went.")
    seed: Amount = setting(0, "Seed of which rows are read.")
    together: Count | None = setting(None, "Queries that train side by side; default: up to 16 where batches are short.")

    def unread(self, steps: int) -> int:
        """Steps before a query is read."""
        return math.floor(self.start * steps)


class Through(Section):
    """How weights at the end of the training before reach the end of this one."""

    transport: Literal["flow", "proximal", "inverse", "identity"] = setting(
        "flow",
        "flow: the steps of this training, exp(-rates * curvature); proximal: alpha / (curvature + alpha); inverse: "
        "1 / (curvature + alpha), as published; identity: unchanged.",
    )
    rates: Positive | None = setting(None, "Sum of the learning rates of its steps; default: what its training tells.")
    proximal: Positive | None = setting(None, "Alpha of `proximal` and `inverse`; default: 1 / rates.")
    training: str | None = setting(
        None, "Folder that whence train made, or one with trainer_state.json; default: what lies above the model."
    )
    renamed: dict[str, str | None] = setting(
        {}, "What a module is called in the model before, where it differs; null for one that is new. `*` stands for anything."
    )
    head: Literal["cross", "none"] = setting(
        "cross", "Modules that the model before lacks (a new head, adapters): followed through the cross-Hessian, or left out."
    )


class Index(Numeric):
    """The index."""

    kind: Literal["landmarks", "projections"] | None = setting(
        None, "Codes of its rows; default: landmarks, given factors and no dim."
    )
    bytes: Annotated[float, Ge(0.25), Le(16)] = setting(1.0, "KiB per row of landmarks and signs, 0.25 to 16.", metavar="KIB")
    damping: AtLeastZero = setting(0.1, "Damping of the searches; landmarks work with no other.")
    dim: Count | None = setting(None, "Numbers per side to which the gradient of a module is projected; default: 16.")
    modules: Modules = setting(None, *MODULES)
    seed: Seed = setting(0, SEED)
    kept: Literal["int8", "float16", "float32"] = setting("int8", "Dtype of the rows.")
    rank: Count | Literal["full", "auto"] = setting("auto", "Rank of the landmarks' gradients: a number, full or auto.")
    operands: Dtype = setting("float32", OPERANDS)
    products: Products = setting("auto", PRODUCTS)
    batch_tokens: Count | None = setting(None, BATCH_TOKENS)
    check: bool = setting(True, CHECK)
    chunks: Count = setting(8, CHUNKS)


class Benchmark(Section):
    """A benchmark of lm-eval."""

    tasks: tuple[str, ...] = setting(
        ("mmlu_professional_law", "mmlu_business_ethics", "mmlu_international_law"), "Names of lm-eval."
    )
    fewshot: Amount = setting(5, "Worked examples before each question.")
    limit: Count | None = setting(None, "Maximum questions per task.")
    data: str | None = setting(None, "Folder of MMLU's csv files (dev/, test/), instead of the hub.", "--data", "-d")
    base: bool = True
    tuned: bool = True
    batch_size: Count = setting(8, "Questions at a time.")
