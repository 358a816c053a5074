"""Fields of a recipe set by name: ``training.epochs=5``, ``model.hidden=256,128``.

A value is read as the field's type says: ``none`` is None where that is allowed, and commas part
the values of a tuple.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from feature_repo.errors import LongtrailError
from training.recipes import Recipe

_Config = TypeVar("_Config")


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """A recipe with some fields set.

    Args:
        recipe: Stays as it is.
        settings: ``<dotted name>=<value>`` each; the last one of a name counts.

    Raises:
        LongtrailError: If a field is unknown or a value is not one that it takes.
    """
    tree: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise LongtrailError(f"--set takes NAME=VALUE, got {setting!r}")
        _place(recipe, name.strip(), text.strip(), tree)
    try:
        return _apply(recipe, tree)
    except LongtrailError:
        raise
    except ValueError as error:  # of a dataclass' own checks
        raise LongtrailError(f"--set: {error}") from error


def _place(recipe: Recipe, name: str, text: str, tree: dict[str, Any]) -> None:
    """Put a value into the tree of changes, after a look at the field that it is for."""
    *groups, last = name.split(".")
    owner: Any = recipe
    for group in groups:
        _check_field(owner, group, name)
        owner, tree = getattr(owner, group), tree.setdefault(group, {})
        if not is_dataclass(owner):
            raise LongtrailError(f"--set {name}: {group} has no fields, it is a value itself")
    _check_field(owner, last, name)
    if is_dataclass(getattr(owner, last)):
        known = ", ".join(f"{name}.{field.name}" for field in fields(getattr(owner, last)))
        raise LongtrailError(f"--set {name} is a group of fields: set one of {known}")
    tree[last] = _parse(get_type_hints(type(owner))[last], name, text)


def _check_field(owner: Any, field: str, name: str) -> None:
    known = [field.name for field in fields(owner)]
    if field not in known:
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {close[0]}" if close else f"it has {', '.join(known)}"
        raise LongtrailError(f"--set {name}: {type(owner).__name__} has no field {field!r}; {hint}")


def _parse(annotation: Any, name: str, text: str) -> Any:
    """The value of a field's type that ``text`` means."""
    # pydantic is slow to import, and the command line imports this module for its help.
    from pydantic import TypeAdapter, ValidationError

    kinds = get_args(annotation) or (annotation,)
    value: Any = text
    if type(None) in kinds and text.lower() in ("none", "null"):
        value = None
    elif tuple in {get_origin(annotation), *map(get_origin, kinds)}:
        value = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise LongtrailError(
            f"--set {name} takes {_spell(annotation)}, got {text!r} ({error.errors()[0]['msg']})"
        ) from error


def _spell(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _apply(config: _Config, changes: Mapping[str, Any]) -> _Config:
    """A dataclass with a tree of changes, each dataclass made once: its checks see all of them."""
    values = {
        name: _apply(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(config, **values)  # type: ignore[type-var]
