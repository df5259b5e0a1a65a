"""A griffe extension that shows constructors of attrs classes, and events and costs, in the docs.

Griffe reads the code without importing it, so it does not find an `__init__` that attrs generates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

DECORATORS = {"attrs.define", "attrs.frozen"}
REMARK = re.compile(r"^(Event|Cost): (.*(?:\n[ ]+\S.*)*)", re.MULTILINE)


class AttrsSignatures(griffe.Extension):
    """Adds the constructors of attrs classes, and formats the remarks on events and costs."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the constructor that attrs generates, and format the docstring."""
        if cls.docstring is not None:
            cls.docstring.value = REMARK.sub(_paragraph, cls.docstring.value)
        if is_attrs(cls) and "__init__" not in cls.members:
            itself = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
            found = {parameter.name: parameter for parameter in parameters(cls)}
            ordered = sorted(found.values(), key=_is_keyword_only)
            made = griffe.Function(
                "__init__", parameters=griffe.Parameters(itself, *ordered), returns="None"
            )
            cls.set_member("__init__", made)


def _paragraph(match: re.Match[str]) -> str:
    return f"**{match[1]}:** {' '.join(match[2].split())}\n"


def _is_keyword_only(parameter: griffe.Parameter) -> bool:
    return parameter.kind is griffe.ParameterKind.keyword_only


def is_attrs(cls: griffe.Class) -> bool:
    """Return whether a class is decorated with attrs."""
    return any(decorator.callable_path in DECORATORS for decorator in cls.decorators)


def parameters(cls: griffe.Class) -> Iterator[griffe.Parameter]:
    """Yield the parameters of an attrs class's constructor, those of its bases first."""
    for base in reversed([base for base in cls.mro() if is_attrs(base)]):
        yield from _own_parameters(base)
    yield from _own_parameters(cls)


def _own_parameters(cls: griffe.Class) -> Iterator[griffe.Parameter]:
    all_by_keyword = any(
        str(_keywords(decorator.value).get("kw_only")) == "True" for decorator in cls.decorators
    )
    for attribute in cls.members.values():
        if (
            not isinstance(attribute, griffe.Attribute)
            or "instance-attribute" not in attribute.labels
        ):
            continue
        is_field = str(getattr(attribute.value, "function", "")) == "attrs.field"
        options = _keywords(attribute.value) if is_field else {"default": attribute.value}
        if str(options.get("init")) == "False":
            continue
        if attribute.name in _computed(cls):
            options["default"] = "..."
        by_keyword = all_by_keyword or str(options.get("kw_only")) == "True"
        kinds = griffe.ParameterKind
        alias = str(options.get("alias", attribute.name.lstrip("_"))).strip("'\"")
        yield griffe.Parameter(
            alias,
            annotation=attribute.annotation,
            kind=kinds.keyword_only if by_keyword else kinds.positional_or_keyword,
            default=_default(options),
        )


def _fields(cls: griffe.Class) -> Iterator[griffe.Attribute]:
    for member in cls.members.values():
        is_own = isinstance(member, griffe.Attribute) and "instance-attribute" in member.labels
        if is_own and member.annotation is not None:
            yield member


def _computed(cls: griffe.Class) -> set[str]:
    """Return the fields whose default a method decorated with `@field.default` computes."""
    decorators = [str(d.value) for function in cls.functions.values() for d in function.decorators]
    return {text.removesuffix(".default") for text in decorators if text.endswith(".default")}


def _keywords(call: str | griffe.Expr | None) -> dict[str, Any]:
    arguments = call.arguments if isinstance(call, griffe.ExprCall) else ()
    return {a.name: a.value for a in arguments if isinstance(a, griffe.ExprKeyword)}


def _default(options: dict[str, Any]) -> str | griffe.Expr | None:
    if "factory" in options:
        return f"{options['factory']}()"
    return options.get("default")
