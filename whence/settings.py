"""Every setting of every stage, declared once: its type, bounds, default and meaning.

The functions of the library take these classes, a `whence.yaml` is checked against them (`whence.config`), and the options of
the command line are made from them (`whence.cli.from_settings`). Nothing here needs torch or pydantic: `--help` stays quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le

from whence.errors import UsageError
from whence.precision import Format as Dtype
from whence.precision import Precision, Products


class Doc:
    """What a setting means, and where its name does not say it, how the command line writes it.

    `none` is the word for null there. `yaml` is false for what a run says once for all its stages, or only Python does.
    """

    def __init__(self, meaning: str, *flags: str, metavar: str | None = None, none: str | None = None, yaml: bool = True):
        self.meaning, self.flags, self.metavar, self.none, self.yaml = meaning, flags, metavar, none, yaml

    @property
    def comment(self) -> str:
        """The meaning, for a YAML file."""
        return f"{self.meaning.removesuffix('.')}; null for {self.none}." if self.none else self.meaning

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Any:
        if not self.yaml:
            from pydantic_core import PydanticOmit

            raise PydanticOmit
        return handler(core) | ({"description": self.comment} if self.meaning else {})

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> Any:
        if self.yaml:
            return handler(kind)
        from pydantic_core import PydanticCustomError, core_schema

        def refuse(value: Any) -> Any:
            raise PydanticCustomError("extra_forbidden", "no setting of a file")

        return core_schema.no_info_plain_validator_function(refuse)


@dataclass(frozen=True)
class Setting:
    """One field of a section; `default` is MISSING where it must be given."""

    name: str
    kind: Any
    doc: Doc
    default: Any

    @property
    def section(self) -> type[Section] | None:
        """The section that the field holds, or may hold."""
        return next((kind for kind in alternatives(self.kind) if isinstance(kind, type) and issubclass(kind, Section)), None)


class Section:
    """Settings that can't be changed once made; raises UsageError for an invalid value."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for setting in settings_of(type(self)):
            value = settled(given := getattr(self, setting.name), setting.kind)
            if value is MISSING:
                raise UsageError(f"{setting.name} can't be {given!r}.", accepted=accepted(alternatives(setting.kind)))
            object.__setattr__(self, setting.name, value)

    def as_json(self) -> dict[str, Any]:
        """The settings that a file may have, as JSON values."""
        values = ((name, getattr(self, name)) for name in in_file(type(self)))
        return {
            name: value.as_json() if isinstance(value, Section) else list(value) if isinstance(value, tuple) else value
            for name, value in values
        }

    def changed(self, **changes: Any) -> Self:
        """These settings with some of them changed."""
        names = [setting.name for setting in settings_of(type(self))]
        for name in changes.keys() - set(names):
            near = difflib.get_close_matches(name, names, n=1)
            fix = f"did you mean {near[0]}?" if near else ""
            raise UsageError(f"There is no setting {name!r} here.", accepted=", ".join(names), fix=fix)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@functools.cache
def settings_of(section: type) -> tuple[Setting, ...]:
    """The settings of a section, in their order."""
    kinds, found = typing.get_type_hints(section, include_extras=True), []
    for entry in dataclasses.fields(section):
        marks = getattr(kinds[entry.name], "__metadata__", ())
        doc = next((mark for mark in marks if isinstance(mark, Doc)), Doc(""))
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        found.append(Setting(entry.name, kinds[entry.name], doc, default))
    return tuple(found)


def in_file(section: type) -> dict[str, Setting]:
    """The settings of a section that a file may have, by name."""
    return {setting.name: setting for setting in settings_of(section) if setting.doc.yaml}


def alternatives(kind: Any) -> list[Any]:
    """The types of a union, or the one type, each with its bounds; the values of a literal one by one."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated and not bounds(kind):
        return alternatives(parts[0])
    if origin in (typing.Union, types.UnionType):
        return [one for part in parts for one in alternatives(part)]
    return [Literal[part] for part in parts] if origin is Literal else [kind]  # type: ignore[misc]


def bounds(kind: Any) -> dict[str, float]:
    """The bounds in an annotation, by the names ge, gt and le."""
    marks = getattr(kind, "__metadata__", ())
    return {name: getattr(mark, name) for mark in marks for name in ("ge", "gt", "le") if hasattr(mark, name)}


def settled(value: Any, kind: Any) -> Any:
    """The value as a setting of this kind keeps it (a sequence as a tuple, say); MISSING where it is none of this kind."""
    return next((found for one in alternatives(kind) if (found := _settled(value, one)) is not MISSING), MISSING)


def _settled(value: Any, kind: Any) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        found: Any = _settled(value, parts[0])
        within = {"ge": operator.ge, "gt": operator.gt, "le": operator.le}
        inside = found is not MISSING and all(within[name](found, bound) for name, bound in bounds(kind).items())
        return found if inside else MISSING
    if origin is tuple:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        entries = tuple(settled(entry, parts[0]) for entry in value) if listed else (MISSING,)
        return MISSING if MISSING in entries else entries
    if kind is float:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else MISSING
    if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Section):
        return kind(**value)
    if origin is Literal:
        right = type(value) is type(parts[0]) and value == parts[0]
    else:
        right = kind is Any or (isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool)))
    return value if right else MISSING


def accepted(kinds: Sequence[Any]) -> str:
    """Say which values a setting of one of these kinds may have."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "None"}
    limits = {"ge": "of at least", "gt": "above", "le": "of at most"}
    said = []
    for one in kinds:
        origin, parts = typing.get_origin(one), typing.get_args(one)
        if origin is Annotated:
            said.append(" ".join([words[parts[0]], *(f"{limits[name]} {bound:g}" for name, bound in bounds(one).items())]))
        elif origin is tuple:
            said.append(f"a list of {accepted(alternatives(parts[0]))}")
        else:
            said.append(str(parts[0]) if origin is Literal else words.get(one, "names with values"))
    return " or ".join(said) if len(said) < 3 else f"{', '.join(said[:-1])} or {said[-1]}"


class Numeric(Section):
    """Settings of a stage that multiplies: in the formats of a `Precision`, each by itself."""

    @property
    def precision(self) -> Precision:
        """The number formats as one value."""
        return Precision(**{part: getattr(self, name) for name, part in FORMATS.items() if hasattr(self, name)})

    def changed(self, **changes: Any) -> Self:
        """These settings with some of them changed; `precision` stands for those of its formats that are here."""
        if (precision := changes.pop("precision", None)) is not None:
            changes = {name: getattr(precision, part) for name, part in FORMATS.items() if hasattr(self, name)} | changes
        return super().changed(**changes)

    def keywords(self) -> dict[str, Any]:
        """The settings as keywords of the function that takes them."""
        values = {setting.name: getattr(self, setting.name) for setting in settings_of(type(self))}
        full = {"rank": None} if values.get("rank") == "full" else {}
        return {name: value for name, value in values.items() if name not in FORMATS} | {"precision": self.precision, **full}


FORMATS = {"statistics": "statistics", "operands": "scores", "products": "products"}
"""What of a `Precision` a setting decides."""

Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
Sample = Count | Literal["all"] | None
"""How many examples: a number, all, or (None) enough."""

Columns = Annotated[
    dict[str, str],
    Doc(
        "Which column plays which part: prompt, completion, text, messages, source, id.",
        "--columns",
        "-c",
        metavar="PART=COLUMN",
    ),
]
Damping = Annotated[float, Ge(0), Doc("Damping, in units of each module's mean eigenvalue.")]
NewTokens = Annotated[Count, Doc("Tokens to generate at most.")]
Seed = Annotated[int, Doc("Seed of everything drawn.", yaml=False)]
BatchTokens = Annotated[Count | None, Doc("Positions per batch; halved by itself if it does not fit.")]
Chunks = Annotated[Count, Doc("Parts of the data after which the work is saved.")]
ProductFormat = Annotated[Products, Doc("Format to multiply in; auto takes bfloat16 where it is fast and hardly moves scores.")]
Operands = Annotated[Dtype, Doc("Number format of the inner products.")]


@dataclass(frozen=True, kw_only=True)
class Weights(Section):
    """How a model is loaded."""

    adapter: Annotated[str | None, Doc("LoRA adapter to put on the model.")] = None
    tokenizer: Annotated[str | None, Doc("Tokenizer, for models that come without.")] = None
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "float64"], Doc("Number format of the weights.")] = (
        "auto"
    )
    device: Annotated[str | None, Doc("cpu, cuda, cuda:1; the GPU if there is one.")] = None


@dataclass(frozen=True, kw_only=True)
class Normalise(Section):
    """What is done to every text before it is tokenized, for training, factors and scores alike."""

    unicode: Annotated[
        Literal["NFC", "NFKC"] | None,
        Doc("Unicode normal form; NFKC also makes special characters plain (full-width letters, ligatures)."),
    ] = "NFKC"
    whitespace: Annotated[bool, Doc("Runs of blanks become one, blank ends go, line breaks stay.")] = True
    lowercase: bool = False


@dataclass(frozen=True, kw_only=True)
class Format(Section):
    """How prompt and completion are written; `{prompt}` and `{completion}` stand for the columns."""

    prompt: str = "{prompt}"
    completion: str = "{completion}"


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """The training data."""

    path: Annotated[
        str,
        Doc(
            "Training data: file (jsonl, json, csv, tsv, parquet, text), folder of `save_to_disk`, or data set of the hub.",
            "--data",
            "-d",
        ),
    ]
    columns: Columns = field(default_factory=dict)
    split: Annotated[str, Doc("Split of a data set that has several.")] = "train"
    limit: Annotated[Count | None, Doc("Read only the first rows.")] = None
    format: Annotated[
        Literal["plain", "qa", "instruction"] | Format,
        Doc(
            'plain: as it is; qa: "Question: ... Answer: ..."; instruction: Alpaca\'s; or templates of your own. '
            "Prompts get it too."
        ),
    ] = "plain"
    normalise: Normalise | None = None
    max_length: Annotated[int, Ge(2), Doc("Tokens at which a row is cut.")] = 512
    chat_template: Annotated[str | None, Doc("Chat template for conversations: chatml, or one in Jinja.", "--template")] = None
    append_eos: Annotated[bool, Doc("End rows with the end-of-text token, as in training.")] = False


@dataclass(frozen=True, kw_only=True)
class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), by PEFT."""

    r: Annotated[Count, Doc("Its rank.", "--lora-r")] = 8
    alpha: Annotated[float, Doc("", "--lora-alpha")] = 16.0
    dropout: Annotated[Share, Doc("", "--lora-dropout")] = 0.0
    targets: Annotated[Literal["all-linear"] | tuple[str, ...], Doc("Names of the layers that get one.", "--lora-targets")] = (
        "all-linear"
    )


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """Fine-tuning with the Hugging Face Trainer. The loss is that of the answers only."""

    epochs: Annotated[float, Gt(0), Doc("Passes over the data.")] = 1.0
    max_steps: Annotated[Count | None, Doc("Stop after so many steps.")] = None
    batch_size: Annotated[Count, Doc("Rows at a time.", "--batch-size", "-b")] = 8
    gradient_accumulation: Annotated[Count, Doc("Batches that make a step.")] = 1
    learning_rate: Annotated[float, Gt(0), Doc("The highest.", "--learning-rate", "--lr")] = 2e-5
    weight_decay: Annotated[float, Ge(0)] = 0.01
    schedule: Annotated[str, Doc("A learning-rate schedule of transformers.")] = "cosine_with_restarts"
    schedule_options: Annotated[
        dict[str, Any], Doc("What the schedule takes, such as {num_cycles: 2}.", "--schedule-option", metavar="NAME=VALUE")
    ] = field(default_factory=dict)
    warmup: Annotated[float, Ge(0), Doc("Steps over which the learning rate rises; a share of all below 1.")] = 0.0
    max_grad_norm: Annotated[
        Annotated[float, Ge(0)] | Literal["auto"],
        Doc("Norm at which gradients are clipped, 0 for never; auto: 1, and never in bfloat16."),
    ] = "auto"
    bf16: Annotated[bool | Literal["auto"], Doc("Compute in bfloat16; if not said (auto), where the GPU has it.")] = "auto"
    optimizer: Annotated[str, Doc("An optimizer of transformers.")] = "adamw_torch_fused"
    gradient_checkpointing: Annotated[bool, Doc("Less memory, a third more time.")] = False
    workers: Annotated[int, Ge(0), Doc("Processes that prepare batches.")] = 0
    drop_last: Annotated[bool, Doc("Leave out the last, incomplete batch of an epoch.")] = True
    save_steps: Annotated[Count, Doc("Steps between checkpoints.")] = 100
    log_steps: Annotated[Count, Doc("Steps between lines of metrics.jsonl.")] = 20
    keep: Annotated[Count | None, Doc("Checkpoints to keep, the newest.", none="all")] = 3
    evaluation: Annotated[Share, Doc("Share of the rows kept out of training, to measure the loss on.")] = 0.1
    evaluation_limit: Annotated[Count | None, Doc("Rows kept out at most.")] = 7000
    eval_steps: Annotated[Count | None, Doc("Measure every so many steps; only at the end if not said.")] = None
    lora: Lora | None = None
    tracker: Annotated[Literal["none", "tensorboard", "trackio", "wandb"], Doc("Where metrics go besides the files.")] = "none"
    arguments: Annotated[
        dict[str, Any],
        Doc("Any other argument of `transformers.TrainingArguments`.", "--argument", metavar="NAME=VALUE"),
    ] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Generate(Section):
    """The answers that are asked about."""

    max_new_tokens: NewTokens = 64
    temperature: Annotated[float, Ge(0), Doc("0 takes the likeliest token each time.")] = 0.0
    base: Annotated[bool, Doc("Also ask the base model, to compare.")] = True
    batch_size: Annotated[Count, Doc("Prompts at a time.")] = 8


@dataclass(frozen=True, kw_only=True)
class Fit(Numeric):
    """The curvature factors."""

    method: Annotated[Literal["ekfac", "kfac", "shampoo", "diagonal", "identity"], Doc("How curvature is approximated.")] = (
        "ekfac"
    )
    modules: Annotated[
        str | tuple[str, ...] | None,
        Doc("mlp, attention, all, lora, last-K, or globs on names, joined by commas; mlp if not said.", "--modules", "-m"),
    ] = None
    examples: Annotated[Sample, Doc("Rows to fit the factors on; if not said, enough for steady scores.")] = None
    eigenvalue_examples: Annotated[Sample, Doc("Rows for the corrected eigenvalues; if not said, enough.")] = None
    disjoint: Annotated[
        bool | None,
        Doc(
            "Take other rows for the eigenvalues than for the factors; if not said, where there are enough.",
            "--disjoint/--overlapping",
        ),
    ] = None
    until: Annotated[
        Share | None,
        Doc("Double the sample until scores correlate by R (0.99, say) with those of half of it.", metavar="R"),
    ] = None
    labels: Annotated[
        Literal["model", "data"], Doc("Labels drawn from the model (true Fisher), or the data's own (empirical Fisher).")
    ] = "model"
    draws: Annotated[Count, Doc("Labels drawn for each row: less noise where rows are few, N times the cost.")] = 1
    seed: Seed = 0
    largest_factor: Annotated[Count | None, Doc("Split wider covariances into blocks of this width.")] = None
    statistics: Annotated[Dtype, Doc("Number format of the sums' operands.")] = "float32"
    products: ProductFormat = "auto"
    batch_tokens: BatchTokens = None
    groups: Annotated[Count, Doc("Groups of modules fitted one after the other: less memory.")] = 1
    chunks: Chunks = 8


@dataclass(frozen=True, kw_only=True)
class Inspect(Section):
    """Plots and health of the factors."""

    layer: Annotated[int | None, Doc("Number of the layer whose modules are drawn; the last if not said.", metavar="N")] = None
    modules: Annotated[tuple[str, ...], Doc("Modules to draw instead, by name or glob.")] = ()
    clip_percentile: Annotated[
        float, Gt(0), Le(100), Doc("Largest eigenvalues beyond it share the last colour.", "--clip", metavar="P")
    ] = 99.5
    cmap: Annotated[str, Doc("Matplotlib's name of the colours.")] = "viridis"


@dataclass(frozen=True, kw_only=True)
class Measured(Section):
    """What is asked about an answer, and with what damping."""

    damping: Damping = 0.1
    measurement: Annotated[
        Literal["logprob", "margin", "loss"],
        Doc("What is asked about the answer: its log-probability, log-odds, or loss."),
    ] = "logprob"


@dataclass(frozen=True, kw_only=True)
class Score(Numeric):
    """The scores."""

    per: Annotated[Literal["example", "token", "module"], Doc("Also keep the parts of each score.")] = "example"
    aggregate: Annotated[tuple[str, ...], Doc("Add up queries, examples, or both.", yaml=False)] = ()
    rank: Annotated[Count | Literal["full", "auto"], Doc("Rank of the queries' gradients: a number, full or auto.")] = "auto"
    rescore: Annotated[
        int, Ge(0), Doc("Compute each query's N highest and lowest scores again, at full rank and in float32.")
    ] = 0
    norms: Annotated[
        tuple[Literal["cosine", "relatif"], ...],
        Doc("Also compute what normalising needs: cosine or relatif.", "--norm", metavar="NORM"),
    ] = ()
    seed: Seed = 0
    n_train: Annotated[Count | None, Doc("Rows the model was trained on, if these are only some of them.")] = None
    operands: Operands = "float32"
    products: ProductFormat = "auto"
    batch_tokens: BatchTokens = None
    chunks: Chunks = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescore and self.per != "example":
            raise UsageError(f"`rescore` computes whole scores again, and `per` asks for them per {self.per}: one of them")


@dataclass(frozen=True, kw_only=True)
class Index(Numeric):
    """The index of projected gradients."""

    dim: Annotated[Count, Doc("Numbers per side to which the gradient of a module is projected.")] = 16
    modules: Annotated[
        str | tuple[str, ...] | None,
        Doc("mlp, attention, all, lora, last-K, or globs on names, joined by commas; mlp if not said.", "--modules", "-m"),
    ] = None
    seed: Seed = 0
    kept: Annotated[Literal["int8", "float16", "float32"], Doc("Number format of the rows.")] = "int8"
    operands: Operands = "float32"
    products: ProductFormat = "auto"
    batch_tokens: BatchTokens = None
    chunks: Chunks = 8


@dataclass(frozen=True, kw_only=True)
class Benchmark(Section):
    """A benchmark of lm-eval."""

    tasks: Annotated[tuple[str, ...], Doc("Names of lm-eval.")] = (
        "mmlu_professional_law",
        "mmlu_business_ethics",
        "mmlu_international_law",
    )
    fewshot: Annotated[int, Ge(0), Doc("Worked examples before each question.")] = 5
    limit: Annotated[Count | None, Doc("Questions per task at most.")] = None
    data: Annotated[str | None, Doc("Folder of MMLU's csv files (dev/, test/), instead of the hub.", "--data", "-d")] = None
    base: bool = True
    tuned: bool = True
    batch_size: Annotated[Count, Doc("Questions at a time.")] = 8
