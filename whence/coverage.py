"""Which modules are tracked, and what share of the model's parameters that covers."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import nn

from whence.errors import CoverageError
from whence.experts import expert_layers
from whence.layers import Layer, beside, layer_of, makes_weights

MLP_WORDS = re.compile(
    r"(^|[._])(mlp|ffn|ff|feed_?forward|fc\d?|fc_in|fc_out|c_fc|dense_h_to_4h|dense_4h_to_h|densereludense|wi(_\d)?|wo|intermediate"
    r"|output|gate_proj|up_proj|down_proj|gate_up_proj|lin1|lin2|w1|w2|w3)([._]|$)"
)
ATTENTION_WORDS = re.compile(r"attn|attention|(^|[._])(q|k|v|o|qkv|query|key|value)(_proj|_lin)?([._]|$)", re.IGNORECASE)

THIN = 0.3
"""Share of the parameters below which a coverage is thin."""

SELECTORS = (
    "mlp (linear layers of the feed-forward blocks), attention, all (every linear layer and convolution but the head), "
    "lora, last-K, or glob patterns on module names such as 'model.layers.*.mlp.down_proj', separated by commas"
)


Use = tuple[nn.Module, Layer]
"""A module, and how its weight's gradient is taken."""


@dataclass(frozen=True)
class Site:
    """A tracked weight: its canonical name, the modules that use it (several where it is tied), and its matrix shape (O, I)."""

    name: str
    uses: tuple[Use, ...]
    shape: tuple[int, int]
    parameters: int

    @property
    def layer(self) -> Layer:
        """The kind of the first use."""
        return self.uses[0][1]

    @property
    def reads_columns(self) -> bool:
        """Whether all its uses multiply their input as it is."""
        return all(layer.columns is not None for _, layer in self.uses)


@dataclass(frozen=True)
class Coverage:
    """The tracked sites, and how many of the model's parameters they hold."""

    sites: dict[str, Site]
    parameters: int
    left_out: dict[str, int]
    """Parameters that are not tracked, by class of module."""

    @property
    def share(self) -> float:
        """Tracked parameters as a share of all."""
        return sum(site.parameters for site in self.sites.values()) / max(1, self.parameters)

    @property
    def thin(self) -> bool:
        """Whether so little is tracked that it should be said loudly; adapters are small, and all that was trained."""
        return self.share < THIN and not all(".lora_" in name for name in self.sites)

    def without(self, names: Sequence[str]) -> Coverage:
        """The same, with these sites left out."""
        left_out = Counter(self.left_out)
        for name in names:
            site = self.sites[name]
            left_out[type(site.uses[0][0]).__name__] += site.parameters
        return replace(self, sites={name: site for name, site in self.sites.items() if name not in names}, left_out=left_out)

    def __str__(self) -> str:
        rest = ", ".join(
            f"{kind} {count / max(1, self.parameters):.0%}"
            for kind, count in sorted(self.left_out.items(), key=lambda pair: -pair[1])[:4]
        )
        text = f"{len(self.sites)} modules tracked, {self.share:.1%} of {self.parameters:,} parameters"
        return f"{text} (left out: {rest})" if rest else text


def cover(model: nn.Module, modules: str | Sequence[str]) -> Coverage:
    """Choose the modules that the selector names.

    Terms are joined by comma or given as a list: `mlp`, `attention`, `all`, `lora`, a glob on module names, and `last-K`, which
    narrows the others to the last K layers. Heads, embeddings and norms only come along where a glob names them.

    Raises CoverageError where nothing matches, listing what the model has.
    """
    terms = [term.strip() for term in modules.split(",")] if isinstance(modules, str) else list(modules)
    known = _trackable(model)
    kinds = [term for term in terms if not term.startswith("last-")] or ["mlp"]
    head = _head(model)
    named, patterns = {kind for kind in kinds if kind in known}, [kind for kind in kinds if kind not in known]
    chosen = [
        name
        for name, (module, layer) in known.items()
        if name in named or any(_matches(pattern, name, layer, module is head) for pattern in patterns)
    ]
    for term in terms:
        if term.startswith("last-"):
            chosen = _last_layers(chosen, term)
    if not chosen:
        raise CoverageError(
            f"No module of {type(model).__name__} matches {', '.join(terms)!r}",
            given=_inventory(model),
            accepted=SELECTORS,
            fix="whence inspect MODEL --modules all   lists every module that can be tracked",
        )
    sites = _merge_tied(chosen, known)
    return Coverage(sites, *_count(model, sites))


def selector_without(sites: Collection[str], left_out: Collection[str]) -> str:
    """A selector that takes the other sites: globs in which layers have no numbers, where these match no site left out."""
    globs = {name: re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in sites if name not in left_out}
    short = {name: glob for name, glob in globs.items() if not fnmatch.filter(left_out, glob)}
    return ",".join(dict.fromkeys(short.get(name, name) for name in globs))


def _trackable(model: nn.Module) -> dict[str, tuple[nn.Module, Layer]]:
    """Every weight whose gradient can be taken, by name; not where it is also that of a module of an unknown kind."""
    known, unknown, inner = {}, set[int](), set[int]()
    for name, module in model.named_modules():
        if id(module) in inner:  # what makes the weight of the module around it
            continue
        layer = layer_of(module)
        layers = {name: layer} if layer else {f"{name}.{part}": each for part, each in expert_layers(module).items()}
        known |= {each: (module, layer) for each, layer in layers.items()}
        inner |= {id(each) for each in module.modules()} if layer and makes_weights(module) else set()
        unknown |= set() if layers else {id(parameter) for parameter in module.parameters(recurse=False)}
    return {
        name: pair for name, pair in known.items() if not _inside_attention(name, known) and _weight(*pair)[0] not in unknown
    }


def _inside_attention(name: str, known: dict[str, tuple[nn.Module, Layer]]) -> bool:
    """Whether the module is the output projection of a MultiheadAttention, which stands for it."""
    parent = name.rpartition(".")[0]
    return parent in known and isinstance(known[parent][0], nn.MultiheadAttention)


def _head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head else None


def _matches(term: str, name: str, layer: Layer, is_head: bool) -> bool:
    """Whether one selector term takes the module."""
    if term not in ("mlp", "attention", "all", "lora"):
        return fnmatch.fnmatchcase(name, term)
    if term == "lora":
        return ".lora_" in name
    if layer.kind in ("embedding", "norm") or is_head or ".base_layer" in name:  # an adapter stands for its frozen base
        return False
    in_attention = bool(ATTENTION_WORDS.search(name))
    if term == "attention":
        return in_attention
    return term == "all" or (not in_attention and bool(MLP_WORDS.search(name.lower())))


def _last_layers(names: list[str], term: str) -> list[str]:
    """Keep the names in the last K layers; a layer's number is the first one in its name."""
    number = {name: int(found.group(1)) for name in names if (found := re.search(r"\.(\d+)(\.|$)", name))}
    if not term[5:].isdigit() or not number:
        raise CoverageError(
            f"{term!r} does not select layers", accepted="last-K with a number, on a model with numbered layers"
        )
    first = max(number.values()) - int(term[5:]) + 1
    return [name for name in names if number.get(name, -1) >= first]


def _merge_tied(names: list[str], known: dict[str, tuple[nn.Module, Layer]]) -> dict[str, Site]:
    """One site per weight: a module that shares the weight of a chosen one is a further use of it, chosen or not."""
    sites: dict[str, Site] = {}
    uses: dict[tuple[int, int | None], list[tuple[nn.Module, Layer]]] = {}
    for module, layer in known.values():
        uses.setdefault(_weight(module, layer), []).append((module, layer))
    for name in names:
        tied = uses.pop(_weight(*known[name]), None)
        if tied:
            each, shape = _with_all_biases(name, tied)
            sites[name] = Site(name, each, shape, shape[0] * shape[1])
    return sites


def _with_all_biases(name: str, tied: list[Use]) -> tuple[tuple[Use, ...], tuple[int, int]]:
    """The uses of one weight, each with a column for each bias that goes with it somewhere, and their matrix's shape.

    Raises CoverageError where they don't use it alike.
    """
    biases = [layer.parameters(module)[1:] for module, layer in tied]
    every = list({id(bias): bias for some in biases for bias in some}.values())
    shapes = [layer.shape(module) for module, layer in tied]
    if all(len(some) == len(every) for some in biases):
        return tuple(tied), shapes[0]
    weights = {(n_out, n_in - len(some)) for some, (n_out, n_in) in zip(biases, shapes, strict=True)}
    if len(weights) > 1 or any(layer.side != -1 or layer.piece is not None for _, layer in tied):
        raise CoverageError(
            f"The weight of {name} is shared by modules that use it in different ways",
            given=", ".join(f"{type(module).__name__} {layer.shape(module)}" for module, layer in tied),
            fix=f"leave it out: --modules with globs that don't match {name}",
        )
    ((n_out, n_in),) = weights
    return tuple((module, beside(layer, every, module)) for module, layer in tied), (n_out, n_in + len(every))


def _weight(module: nn.Module, layer: Layer) -> tuple[int, int | None]:
    """What tells a weight from all others; a quantised one may be no parameter."""
    return id(next(iter(layer.parameters(module)), module)), layer.piece


def _count(model: nn.Module, sites: dict[str, Site]) -> tuple[int, dict[str, int]]:
    """All parameters of the model (packed 4/8-bit weights by their real size), and those left out by class of module."""
    uses = [use for site in sites.values() for use in site.uses]
    pieces = {
        (id(p), layer.piece): p if layer.piece is None else p[0] for module, layer in uses for p in layer.parameters(module)
    }
    tracked = Counter[int]()
    for (parameter, _), piece in pieces.items():
        tracked[parameter] += piece.numel()
    seen: set[int] = set()
    total, left_out = sum(site.parameters for site in sites.values()), Counter[str]()
    for module in model.modules():
        layer = layer_of(module)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or tracked[id(parameter)] >= parameter.numel():
                continue
            seen.add(id(parameter))
            packed = layer is not None and layer.kind == "linear" and parameter.ndim == 2 and not parameter.is_floating_point()
            size = layer.shape(module)[0] * layer.shape(module)[1] if packed and layer else parameter.numel()
            left_out[type(module).__name__] += size - tracked[id(parameter)]
    return total + sum(left_out.values()), dict(left_out)


def _inventory(model: nn.Module) -> str:
    counts = Counter(type(module).__name__ for module in model.modules() if not any(module.children()))
    return ", ".join(f"{count} x {kind}" for kind, count in counts.most_common(8))
