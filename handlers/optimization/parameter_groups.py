"""Parameter groups of an optimizer: learning rate and weight decay by component and layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from diptych.engine.modules import named_parameters, unwrapped
from diptych.engine.name_patterns import check_pattern, matches
from diptych.handlers.argument_checks import not_negative

LayerDecay = float | Mapping[str, float]
"""A factor in (0, 1], or a factor for each sequence of blocks, by its path."""

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def _check_layer_decay(_: Any, __: attrs.Attribute[Any], value: LayerDecay) -> None:
    for factor in value.values() if isinstance(value, Mapping) else [value]:
        if not 0 < factor <= 1:
            raise ValueError(f"layer_decay must be a factor in (0, 1], got {factor!r}")


@attrs.frozen(kw_only=True)
class GroupRules:
    """Rules that assign parameters to groups; the arguments of `parameter_groups`.

    Attributes:
        lr: the rate of parameters outside all components; None: there must be none.
        weight_decay: for parameters with two or more dimensions that are not biases or norms.
        by_component: pattern to a rate, or to a mapping of options of the optimizer.
        layer_decay: the factor of the rate from each block to the one below it.
        no_decay: patterns of further parameters without weight decay.

    Raises:
        ValueError: if a rate, the weight decay or the factor is out of range.
    """

    lr: float | None = attrs.field(default=None, validator=attrs.validators.optional(not_negative))
    weight_decay: float = attrs.field(default=0.0, validator=not_negative)
    by_component: Mapping[str, float | Mapping[str, Any]] = attrs.field(factory=dict)
    layer_decay: LayerDecay | None = attrs.field(
        default=None, validator=attrs.validators.optional(_check_layer_decay)
    )
    no_decay: Sequence[str] = ()


@attrs.frozen
class Membership:
    """The group of a parameter.

    Attributes:
        name: the group's name.
        options: the group's options for the optimizer, including `lr` and `weight_decay`.
    """

    name: str
    options: dict[str, Any]


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    by_component: Mapping[str, float | Mapping[str, Any]] | None = None,
    layer_decay: LayerDecay | None = None,
    *,
    lr: float | None = None,
    loss: nn.Module | None = None,
    no_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return named optimizer groups that hold each trainable parameter exactly once.

    ```python
    groups = parameter_groups(
        model, 0.05, {"encode_text": 1e-4}, layer_decay={"encode_image.blocks": 0.75},
        lr=1e-3, loss=loss,
    )
    optimizer = torch.optim.AdamW(groups)
    ```

    Biases, the parameters of norms, and all parameters with fewer than two dimensions (also
    temperatures and gains) get no weight decay. A pattern is the beginning of a parameter's name in
    whole parts, each of which may contain wildcards: "blocks.1" matches "blocks.1.weight" and not
    "blocks.10.weight"; "blocks.*.norm" matches the norms of all blocks. Names of the loss's
    parameters begin with "loss". Parameters that do not require a gradient are left out.

    With `layer_decay` d, the rate of block i of n, counted from 0, is multiplied by d^(n - i). That
    of parameters which the parent module registers before the blocks (a stem, embeddings) is
    multiplied by d^(n + 1); that of later ones does not change.

    Source: layer-wise rates from Clark et al. 2020, arXiv:2003.10555 (ELECTRA), and Bao et al.
    2021, arXiv:2106.08254 (BEiT).

    Args:
        model: the model.
        weight_decay: >= 0, for the parameters that are not exempt.
        by_component: pattern to a rate, or to a mapping of options: `{"lr": 1e-4, "betas": ...}`.
        layer_decay: the factor d in (0, 1] for each sequence of two or more modules of one class;
            or a factor for each of some sequences, by path.
        lr: the rate of parameters outside all components; None: there must be none.
        loss: a loss whose parameters are included.
        no_decay: patterns of further parameters without weight decay (a class token, positions).

    Returns:
        Groups with `params`, `name`, `lr`, `weight_decay` and the options of their component. The
        name is the component's pattern ("model" or "loss" outside components), followed by
        "/layer_2" (after the path if there are several sequences) and "/no_decay" if they apply.

    Raises:
        ValueError: if a number is out of range, a pattern matches no parameter (the message lists
            similar names), or a parameter is in two components, or in none and `lr` is None.
    """
    rules = GroupRules(
        lr=lr,
        weight_decay=weight_decay,
        by_component=by_component or {},
        layer_decay=layer_decay,
        no_decay=no_decay,
    )
    named = named_parameters(model, loss)
    groups: dict[str, dict[str, Any]] = {}
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    for name, member in memberships(model, loss, rules, trained).items():
        group = groups.setdefault(
            member.name, {"params": [], "name": member.name, **member.options}
        )
        group["params"].append(named[name])
    return list(groups.values())


def memberships(
    model: nn.Module, loss: nn.Module | None, rules: GroupRules, trained: Iterable[str]
) -> dict[str, Membership]:
    """Return the group of each trained parameter, by its name.

    Raises:
        ValueError: see `parameter_groups`.
    """
    named = named_parameters(model, loss)
    for pattern in (*rules.by_component, *rules.no_decay):
        check_pattern(pattern, named)
    norms = norm_parameters(model, loss)
    depths = layer_scales(model, rules.layer_decay)
    found = {}
    for name in trained:
        component = component_of(name, rules)
        options = _options(component, rules)
        spared = options["weight_decay"] > 0 and (
            id(named[name]) in norms or _is_spared(name, named[name], rules.no_decay)
        )
        if spared:
            options["weight_decay"] = 0.0
        label, scale = depths.get(name, ("", 1.0))
        options["lr"] *= scale
        title = component or ("loss" if name.startswith("loss.") else "model")
        suffix = "/no_decay" if spared else ""
        found[name] = Membership(f"{title}{label}{suffix}", options)
    return found


def _is_spared(name: str, parameter: nn.Parameter, patterns: Sequence[str]) -> bool:
    is_small = parameter.ndim < 2 or name.rpartition(".")[2] == "bias"
    return is_small or any(matches(name, pattern) for pattern in patterns)


def component_of(name: str, rules: GroupRules) -> str | None:
    """Return the component that contains a parameter, or None if `lr` is its rate.

    Raises:
        ValueError: if two components contain it, or none does and there is no `lr`.
    """
    holders = [pattern for pattern in rules.by_component if matches(name, pattern)]
    if len(holders) > 1:
        raise ValueError(
            f"each parameter must be in one group, got {name} in {' and in '.join(holders)}. Make "
            "the patterns narrower"
        )
    if not holders and rules.lr is None:
        raise ValueError(
            f"each trainable parameter must be in a group, got {name} in none of "
            f"{', '.join(rules.by_component) or 'no components'}. Add a component that has it, or "
            "pass lr, the rate of all other parameters"
        )
    return holders[0] if holders else None


def _options(component: str | None, rules: GroupRules) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": rules.lr, "weight_decay": rules.weight_decay}
    if component is not None:
        given = rules.by_component[component]
        options.update(given if isinstance(given, Mapping) else {"lr": given})
    for key in ("lr", "weight_decay"):
        if options[key] is None or not 0 <= options[key] < math.inf:
            raise ValueError(
                f"{key} of {component!r} must be >= 0 and finite, got {options[key]!r}"
            )
    return options


def norm_parameters(*modules: nn.Module | None) -> set[int]:
    """Return the ids of the parameters of all normalisation layers."""
    return {
        id(parameter)
        for module in modules
        if module is not None
        for part in module.modules()
        if isinstance(part, NORMS)
        for parameter in part.parameters(recurse=False)
    }


def layer_scales(model: nn.Module, decay: LayerDecay | None) -> dict[str, tuple[str, float]]:
    """Return the label and the factor of each parameter with a layer-wise rate, by name.

    Raises:
        ValueError: if there is no sequence of blocks, or none at a given path.
    """
    if decay is None:
        return {}
    bare = unwrapped(model)
    factors = decay if isinstance(decay, Mapping) else dict.fromkeys(_sequences(bare), decay)
    if not factors:
        raise ValueError(
            "layer_decay needs a sequence of two or more modules of one class, got none. Pass the "
            "paths of the blocks, layer_decay={'encoder.blocks': 0.75}"
        )
    names = [name.replace("_orig_mod.", "") for name, _ in bare.named_parameters()]
    scales: dict[str, tuple[str, float]] = {}
    for path, factor in factors.items():
        check_pattern(path, names)
        label = f"/{path}/layer" if len(factors) > 1 else "/layer"
        scales |= _scales_of(names, path, factor, label)
    return scales


def _scales_of(
    names: Sequence[str], path: str, factor: float, label: str
) -> dict[str, tuple[str, float]]:
    parent, depth = path.rpartition(".")[0], len(path.split("."))
    inside = [name for name in names if matches(name, path)]
    order = list(dict.fromkeys(name.split(".")[depth] for name in inside))
    below = names[: names.index(inside[0])]
    layers = {name: 1 + order.index(name.split(".")[depth]) for name in inside}
    layers |= {name: 0 for name in below if not parent or matches(name, parent)}
    top = len(order) + 1
    return {name: (f"{label}_{i}", factor ** (top - i)) for name, i in layers.items()}


def _sequences(model: nn.Module) -> list[str]:
    """Return the paths of sequences of modules of one class with parameters, outermost only."""
    found: list[str] = []
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inner and _are_blocks(module):
            found.append(path)
    return found


def _are_blocks(module: nn.Module) -> bool:
    parts = list(module.children())
    if not isinstance(module, (nn.Sequential, nn.ModuleList)) or len(parts) < 2:
        return False
    alike = len({type(part) for part in parts}) == 1
    return alike and all(any(True for _ in part.parameters()) for part in parts)
