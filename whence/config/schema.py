"""What a `whence.yaml` may say: one section per stage, every setting with its meaning and default.

These are the settings of the stages themselves too: `train` takes a `Train`, and so on, so a setting has one name everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Settings that can't be changed once made; an unknown name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Model(Section):
    """The model: what training starts from, or weights to use as they are."""

    base: str
    """Hub id, or folder of a model or LoRA adapter: where fine-tuning starts, and what answers are compared with."""
    path: str | None = None
    """Weights that were fine-tuned already: used as they are, and nothing is trained."""
    adapter: str | None = None
    """LoRA adapter to put on the base, instead of `path`."""
    tokenizer: str | None = None
    """For models that come without."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Number format of the weights."""
    device: str | None = None
    """cpu, cuda, cuda:1; the GPU if there is one."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention kernels; those of transformers' choice if not said."""


class Normalise(Section):
    """What is done to every text before it is tokenized, for training, factors and scores alike."""

    unicode: Literal["NFC", "NFKC"] | None = "NFKC"
    """Unicode normal form; NFKC also makes special characters plain (full-width letters, ligatures)."""
    whitespace: bool = True
    """Runs of blanks become one, blank ends go, line breaks stay."""
    lowercase: bool = False


class Format(Section):
    """How prompt and completion are written; `{prompt}` and `{completion}` stand for the columns."""

    prompt: str = "{prompt}"
    completion: str = "{completion}"


class Data(Section):
    """The training data."""

    path: str
    """File (jsonl, json, csv, tsv, parquet, text), folder of `save_to_disk`, or data set of the hub."""
    columns: dict[str, str] = {}
    """Which column plays which part: prompt, completion, text, messages, source, id."""
    split: str = "train"
    limit: Count | None = None
    """Read only the first rows."""
    format: Literal["plain", "qa", "instruction"] | Format = "plain"
    """plain: as it is; qa: "Question: ... Answer: ..."; instruction: Alpaca's; or templates of your own. Prompts get it too."""
    normalise: Normalise | None = None
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens at which a row is cut."""
    chat_template: str | None = None
    """chatml, or one in Jinja, for conversations."""
    append_eos: bool = False
    """End rows with the end-of-text token."""


class Prompts(Section):
    """What is asked."""

    path: str | None = None
    """File of prompts, with completions or without."""
    items: tuple[str | dict[str, Any], ...] = ()
    """Prompts written here, instead of a file."""
    columns: dict[str, str] = {}
    limit: Count | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Prompts:
        if (self.path is None) == (not self.items):
            raise ValueError("prompts come from `path` (a file) or from `items` (a list), one of them")
        return self


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), by PEFT."""

    r: Count = 8
    alpha: float = 16.0
    dropout: Share = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get one."""


class Train(Section):
    """Fine-tuning with the Hugging Face Trainer. The loss is that of the answers only."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Count | None = None
    """Stop after so many steps."""
    batch_size: Count = 8
    """Rows per device and step."""
    gradient_accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: str = "cosine_with_restarts"
    """A learning-rate schedule of transformers."""
    schedule_options: dict[str, Any] = {}
    """What the schedule takes, such as {num_cycles: 2}."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Steps over which the learning rate rises; a share of all below 1."""
    max_grad_norm: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Norm at which gradients are clipped, 0 for never; auto: 1, and never in bfloat16."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16; auto: where the GPU has it."""
    optimizer: str = "adamw_torch_fused"
    """An optimizer of transformers."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches."""
    drop_last: bool = True
    """Leave out the last, incomplete batch of an epoch."""
    save_steps: Count = 100
    log_steps: Count = 20
    keep: Count | None = 3
    """Checkpoints to keep, the newest; null for all."""
    evaluation: Share = 0.1
    """Share of the rows kept out of training, to measure the loss on."""
    evaluation_limit: Count | None = 7000
    """Rows kept out at most."""
    eval_steps: Count | None = None
    """Measure every so many steps; only at the end if not said."""
    lora: Lora | None = None
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where metrics go besides the files."""
    arguments: dict[str, Any] = {}
    """Any other argument of `transformers.TrainingArguments`."""


class Generate(Section):
    """The answers that are asked about."""

    max_new_tokens: Count = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time."""
    base: bool = True
    """Also ask the base model, to compare."""
    batch_size: Count = 8


class Fit(Section):
    """The curvature factors."""

    method: Literal["ekfac", "kfac", "shampoo", "diagonal", "identity"] = "ekfac"
    modules: str | None = None
    """mlp, attention, all, lora, last-K, or globs on names, joined by commas; mlp if not said."""
    examples: Count | Literal["all"] | None = None
    """Rows for the covariances; enough for steady scores if not said."""
    eigenvalue_examples: Count | Literal["all"] | None = None
    disjoint: bool | None = None
    """Other rows for the eigenvalues; where there are enough if not said."""
    until: Share | None = None
    """Double the sample until scores correlate so with those of half of it."""
    labels: Literal["model", "data"] = "model"
    """Labels drawn from the model (true Fisher), or the data's own (empirical Fisher)."""
    draws: Count = 1
    """Labels drawn for each row; more where there are few rows."""
    largest_factor: Count | None = None
    """Split wider covariances into blocks of this width."""
    statistics: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_tokens: Count | None = None
    """Positions per batch."""
    groups: Count = 1
    """Groups of modules, fitted one after the other: less memory."""
    chunks: Count = 8
    """Parts of the data after which work is saved."""


class Inspect(Section):
    """Plots and health of the factors."""

    layer: int | None = None
    """Number of the layer whose modules are drawn; the last if not said."""
    modules: tuple[str, ...] = ()
    """Modules to draw instead, by name or glob."""
    clip_percentile: Annotated[float, Field(gt=0, le=100)] = 99.5
    """Largest eigenvalues beyond it share the last colour."""
    cmap: str = "viridis"
    """Matplotlib's name of the colours."""


class Score(Section):
    """The scores."""

    queries: Literal["generated", "prompts"] = "generated"
    """What the tuned model answered, or the prompts file with its own completions."""
    damping: Annotated[float, Field(ge=0)] = 0.1
    """In units of each module's mean eigenvalue."""
    measurement: Literal["logprob", "margin", "loss"] = "logprob"
    rank: Count | Literal["full", "auto"] = "auto"
    """Of the queries' gradients."""
    rescore: Annotated[int, Field(ge=0)] = 0
    """Compute each query's K highest and lowest scores again, at full rank and in float32."""
    per: Literal["example", "token", "module"] = "example"
    norms: tuple[Literal["cosine", "relatif"], ...] = ()
    self_influence: bool = False
    """Also score every row against itself."""
    n_train: Count | None = None
    """Rows the model was trained on, if `data` is only some of them."""
    operands: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_tokens: Count | None = None
    chunks: Count = 8
    check: bool = True
    """Check what can be checked in seconds: copies of questions come first, and dampings and seeds agree."""
    export: tuple[Literal["npz", "parquet", "csv", "jsonl"], ...] = ("npz", "parquet")
    """Files written beside the scores."""

    @model_validator(mode="after")
    def _rescored_whole(self) -> Score:
        if self.rescore and self.per != "example":
            raise ValueError(f"`rescore` computes whole scores again, and `per` asks for them per {self.per}: one of them")
        return self


class Benchmark(Section):
    """A benchmark of lm-eval."""

    tasks: tuple[str, ...] = ("mmlu_professional_law", "mmlu_business_ethics", "mmlu_international_law")
    fewshot: Annotated[int, Field(ge=0)] = 5
    limit: Count | None = None
    """Questions per task at most."""
    data: str | None = None
    """Folder of MMLU's csv files (dev/, test/), instead of the hub."""
    base: bool = True
    tuned: bool = True
    batch_size: Count = 8


class Evaluate(Section):
    """How good the answers are."""

    compare: bool = True
    """Compare base and tuned answers: BLEU and ROUGE against the references, or against each other."""
    benchmark: Benchmark | None = None


class Report(Section):
    """What people read."""

    top: Count = 10
    """Rows per query that raise it most, and as many that lower it."""
    title: str | None = None


class Config(Section):
    """A whole run, from fine-tuning to report."""

    run: Annotated[str, Field(pattern=r"^[\w][\w.-]*$")]
    """Name of the run."""
    out: str | None = None
    """Folder of the run; runs/NAME if not said."""
    seed: int = 0
    """Of everything drawn."""
    model: Model
    data: Data
    prompts: Prompts
    train: Train | None = None
    """Leave it out to use `model.path`, or the base as it is."""
    generate: Generate = Generate()
    fit: Fit = Fit()
    inspect: Inspect = Inspect()
    score: Score = Score()
    evaluate: Evaluate | None = Evaluate()
    report: Report = Report()

    @model_validator(mode="after")
    def _trained_once(self) -> Config:
        if self.train is not None and (self.model.path or self.model.adapter):
            raise ValueError(
                "`train` trains `model.base`, and `model.path`/`model.adapter` are weights used as they are: one of them"
            )
        return self
