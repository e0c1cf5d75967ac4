"""Which modules are tracked, and what share that is of the parameters that training moved.

Training moved what requires a gradient. Where nothing does, as in a model that was loaded to be used, it moved the adapters
that are in use, or everything if there are none.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from whence.adapters import adapter_layers, adapter_weights, inside_adapter, is_adapter, refuse_unused
from whence.errors import CoverageError
from whence.experts import expert_layers
from whence.layers import Layer, beside, layer_of, makes_weights, restricted
from whence.show.numbers import many

MLP_WORDS = re.compile(
    r"(^|[._])(mlp|ffn|ff|feed_?forward|fc\d?|fc_in|fc_out|c_fc|dense_h_to_4h|dense_4h_to_h|densereludense|wi(_\d)?|wo|intermediate"
    r"|output|gate_proj|up_proj|down_proj|gate_up_proj|lin1|lin2|w1|w2|w3)([._]|$)"
)
ATTENTION_WORDS = re.compile(r"attn|attention|(^|[._])(q|k|v|o|qkv|query|key|value)(_proj|_lin)?([._]|$)", re.IGNORECASE)

KINDS = ("mlp", "attention", "all", "trained", "lora")

THIN = 0.3
"""Share of the parameters that training moved below which a coverage is thin."""

WIDE = 20_000
"""Width of a side from which a full covariance deserves a warning."""

SELECTORS = (
    "mlp (linear layers of the feed-forward blocks), attention, all (every linear layer and convolution but the head), "
    "trained (whatever training moved), lora, last-K, "
    "or glob patterns on module names such as 'model.layers.*.mlp.down_proj', separated by commas"
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
    """The tracked sites, and how many of the parameters that training moved they hold."""

    sites: dict[str, Site]
    parameters: int
    """What training moved."""
    left_out: dict[str, int]
    """Parameters that training moved and that are not tracked, by class of module."""
    frozen: int = 0
    """Parameters that training left as they were."""
    frozen_sites: tuple[str, ...] = ()
    """Tracked sites of such parameters."""

    @property
    def share(self) -> float:
        """Tracked parameters as a share of those that training moved."""
        tracked = sum(site.parameters for name, site in self.sites.items() if name not in self.frozen_sites)
        return tracked / max(1, self.parameters)

    @property
    def thin(self) -> bool:
        """Whether so little is tracked that it should be said loudly."""
        return self.share < THIN

    @property
    def finest(self) -> Literal["example", "token"]:
        """What scores can be kept for: tokens, unless the gradient of a site is known as a whole only."""
        return "example" if any(site.layer.whole for site in self.sites.values()) else "token"

    def without(self, names: Sequence[str]) -> Coverage:
        """The same, with these sites left out."""
        left_out = Counter(self.left_out)
        for name in names:
            site = self.sites[name]
            if name not in self.frozen_sites:
                left_out[type(site.uses[0][0]).__name__] += site.parameters
        return replace(self, sites={name: site for name, site in self.sites.items() if name not in names}, left_out=left_out)

    def __str__(self) -> str:
        rest = ", ".join(
            f"{kind} {count / max(1, self.parameters):.0%}"
            for kind, count in sorted(self.left_out.items(), key=lambda pair: -pair[1])[:4]
        )
        trained = f" that training moved, {self.frozen:,} are frozen" if self.frozen else ""
        text = f"{many(len(self.sites), 'module')} tracked, {self.share:.1%} of {self.parameters:,} parameters{trained}"
        return f"{text} (left out: {rest})" if rest else text


def cover(model: nn.Module, modules: str | Sequence[str]) -> Coverage:
    """Choose the modules that the selector names.

    Terms are joined by comma or given as a list: `mlp`, `attention`, `all`, `trained`, `lora`, a glob on module names, and
    `last-K`, which narrows the others to the last K layers. Heads, embeddings and norms only come along where a glob names
    them, or as `trained`. Of what a term matches, weights that training did not move are left out; a glob that matches
    nothing else takes them all the same.

    Raises CoverageError where nothing matches, listing what the model has, and for models without gradients.
    """
    refuse_model(model)
    terms = [term.strip() for term in modules.split(",")] if isinstance(modules, str) else list(modules)
    known, moved = _trackable(model), trained(model)
    live = {name for name, (module, layer) in known.items() if _moves(module, layer, moved)}
    heads = _heads(model)
    chosen, asleep = set[str](), set[str]()
    for term in [term for term in terms if not term.startswith("last-")] or ["mlp"]:
        matched = {name for name, pair in known.items() if _matches(term, name, pair[1], id(pair[0]) in heads)}
        asleep |= matched - live
        chosen |= (matched & live) or (set() if term in KINDS else matched)
    names = [name for name in known if name in chosen]
    for term in terms:
        if term.startswith("last-"):
            names = _last_layers(names, term)
    if not names:
        raise CoverageError(
            f"No module of {type(model).__name__} {'that training moved ' if asleep else ''}matches {', '.join(terms)!r}",
            given=f"{len(asleep)} frozen modules; trained: {_inventory(model, moved)}" if asleep else _inventory(model),
            accepted=SELECTORS,
            fix=f"modules={min(asleep)!r} (--modules {min(asleep)}) tracks a frozen module all the same"
            if asleep
            else "whence inspect MODEL --modules all   lists every module that can be tracked",
        )
    sites = _merge_tied(names, known, moved)
    return _count(model, sites, moved, tuple(name for name in sites if name not in live))


def trained(model: nn.Module) -> set[int]:
    """The ids of the parameters that training moved.

    Weights of 4 or 8 bits can't require a gradient, so that nothing says of them that they were left as they were, but
    adapters beside them. Adapters that were loaded to be used are frozen, at times without the copies of modules beside them.
    """
    adapted, unused = any(map(is_adapter, model.modules())), adapter_weights(model, active=False)
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in unused]
    flagged = {id(each) for each in parameters if each.requires_grad}
    if adapted and not flagged & adapter_weights(model, active=True, copies=False):
        return flagged | adapter_weights(model, active=True)
    packed = {id(each) for each in parameters if not (adapted or each.is_floating_point())}
    return flagged | packed if flagged else {id(parameter) for parameter in parameters}


def refuse_model(model: nn.Module) -> None:
    """Raise CoverageError for a model whose layers can't be watched, and say what to do with it."""
    if torch.is_inference_mode_enabled():
        raise CoverageError(
            "There are no gradients under torch.inference_mode()", fix="make this call outside of torch.inference_mode()"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CoverageError(
                f"{name or 'The model'} is scripted, and runs no hooks in Python that gradients could be caught with",
                given=type(module).__name__,
                accepted="the nn.Module that it was made from",
                fix="build the model in Python and load the weights: model.load_state_dict(scripted.state_dict())",
            )
        for parameter, weight in module.named_parameters(recurse=False):
            place = f"{name}.{parameter}".lstrip(".")
            if is_lazy(weight):
                raise CoverageError(
                    f"{place} has no shape yet: the layer is lazy, and never saw an input",
                    given=type(module).__name__,
                    fix="call the model once on a batch (model(inputs)), then load the trained weights into it",
                )
            if weight.is_inference():
                raise CoverageError(
                    f"{place} was made under torch.inference_mode(), and can have no gradient",
                    fix="load the model outside of torch.inference_mode()",
                )
    refuse_unused(model)


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
        layer = None if is_adapter(module) else layer_of(module)
        inside = adapter_layers(module) | expert_layers(module)
        layers = {name: layer} if layer else {f"{name}.{part}": each for part, each in inside.items()}
        known |= {each: (module, layer) for each, layer in layers.items()}
        inner |= {id(each) for each in module.modules()} if layer and makes_weights(module) else inside_adapter(module)
        unknown |= set() if layers else {id(parameter) for parameter in module.parameters(recurse=False)}
    of_adapters = [(module, layer) for module, layer in known.values() if layer.kind == "adapter"]
    unknown -= {id(parameter) for module, layer in of_adapters for parameter in layer.parameters(module)}
    return {
        name: pair for name, pair in known.items() if not _inside_attention(name, known) and _weight(*pair)[0] not in unknown
    }


def _inside_attention(name: str, known: dict[str, tuple[nn.Module, Layer]]) -> bool:
    """Whether the module is the output projection of a MultiheadAttention, which stands for it."""
    parent = name.rpartition(".")[0]
    return parent in known and isinstance(known[parent][0], nn.MultiheadAttention)


def _heads(model: nn.Module) -> set[int]:
    """The ids of the modules that make logits of hidden states: a language model's, however deep in wrappers, and copies."""
    heads: set[int] = set()
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            copies = [each for name, each in head.named_modules() if ".lora_" not in f".{name}"]
            heads |= {id(each) for each in copies}
    return heads


def _matches(term: str, name: str, layer: Layer, is_head: bool) -> bool:
    """Whether one selector term takes the module."""
    if term not in KINDS:
        return fnmatch.fnmatchcase(name, term)
    if term == "trained":
        return True
    if term == "lora":
        return ".lora_" in name
    if layer.kind in ("embedding", "norm") or layer.one_hot or is_head:
        return False
    in_attention = bool(ATTENTION_WORDS.search(name))
    if term == "attention":
        return in_attention
    return term == "all" or (not in_attention and bool(MLP_WORDS.search(name.lower())))


def _moves(module: nn.Module, layer: Layer, moved: set[int]) -> bool:
    """Whether training moved the weight, or a part of it; of one that is no parameter nothing says that it did not."""
    parameters = layer.parameters(module)
    return not parameters or any(id(parameter) in moved for parameter in parameters)


def _last_layers(names: list[str], term: str) -> list[str]:
    """Keep the names in the last K layers; a layer's number is the first one in its name."""
    number = {name: int(found.group(1)) for name in names if (found := re.search(r"\.(\d+)(\.|$)", name))}
    if not term[5:].isdigit() or not number:
        raise CoverageError(
            f"{term!r} does not select layers", accepted="last-K with a number, on a model with numbered layers"
        )
    first = max(number.values()) - int(term[5:]) + 1
    return [name for name in names if number.get(name, -1) >= first]


def _merge_tied(names: list[str], known: dict[str, tuple[nn.Module, Layer]], moved: set[int]) -> dict[str, Site]:
    """One site per weight: a module that shares the weight of a chosen one is a further use of it, chosen or not.

    Of a weight with a bias of which training moved only one, that one.
    """
    sites: dict[str, Site] = {}
    uses: dict[tuple[int, int | None], list[tuple[nn.Module, Layer]]] = {}
    for module, layer in known.values():
        uses.setdefault(_weight(module, layer), []).append((module, layer))
    for name in names:
        tied = uses.pop(_weight(*known[name]), None)
        if tied:
            each, shape = _with_all_biases(name, tied)
            flags = [id(parameter) in moved for parameter in each[0][1].parameters(each[0][0])]
            if any(flags) and not all(flags):
                each = tuple((module, restricted(layer, module, flags)) for module, layer in each)
                shape = each[0][1].shape(each[0][0])
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


def _count(model: nn.Module, sites: dict[str, Site], moved: set[int], frozen_sites: tuple[str, ...]) -> Coverage:
    """How many parameters training moved (packed 4/8-bit weights by their real size), and which of them are not tracked."""
    uses = [use for name, site in sites.items() if name not in frozen_sites for use in site.uses]
    pieces = {
        (id(p), layer.piece): p if layer.piece is None else p[0] for module, layer in uses for p in layer.parameters(module)
    }
    tracked = Counter[int]()
    for (parameter, _), piece in pieces.items():
        tracked[parameter] += piece.numel()
    seen: set[int] = set()
    total, left_out, frozen = sum(sites[name].parameters for name in sites if name not in frozen_sites), Counter[str](), 0
    for module in model.modules():
        layer = layer_of(module)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or tracked[id(parameter)] >= parameter.numel():
                continue
            seen.add(id(parameter))
            packed = layer is not None and layer.kind == "linear" and parameter.ndim == 2 and not parameter.is_floating_point()
            size = layer.shape(module)[0] * layer.shape(module)[1] if packed and layer else parameter.numel()
            if id(parameter) in moved:
                left_out[type(module).__name__] += size - tracked[id(parameter)]
            else:
                frozen += size
    return Coverage(sites, total + sum(left_out.values()), dict(left_out), frozen, frozen_sites)


def _inventory(model: nn.Module, moved: set[int] | None = None) -> str:
    """The classes of the model's modules; with `moved`, of those that hold parameters that training moved, how many."""
    if moved is None:
        counts = Counter(type(module).__name__ for module in model.modules() if not any(module.children()))
        return ", ".join(f"{count} x {kind}" for kind, count in counts.most_common(8))
    sizes = Counter[str]()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            sizes[type(module).__name__] += parameter.numel() * (id(parameter) in moved)
    return ", ".join(f"{kind} {count:,}" for kind, count in sizes.most_common(8) if count) or "nothing"
