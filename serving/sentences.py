"""What is wrong with a body, a query or an event, in words for people."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

_SENTENCES = {
    "model_attributes_type": "A JSON object is expected, with content type application/json",
    "model_type": "A JSON object is expected",
    "json_invalid": "The body is not JSON",
    # The only pattern of the interface (serving.schemas).
    "string_pattern_mismatch": "Control characters are not taken",
    "missing": "This field is needed",
}
"""Where pydantic's own words help nobody."""


def sentence(problem: Mapping[str, Any], model: type[BaseModel] | None = None) -> str:
    """Say what is wrong; nothing of what came is repeated.

    Args:
        problem: One of a ValidationError's.
        model: What its place begins in; names the fields that an unknown one could have been.
    """
    if problem["type"] == "extra_forbidden" and model is not None:
        inner = _model_at(model, problem["loc"][:-1])
        if inner is not None:
            return f"This field is unknown; there are {', '.join(inner.model_fields)}"
    return _SENTENCES.get(problem["type"]) or str(problem["msg"])


def _model_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel] | None:
    found: type[BaseModel] | None = model
    for part in place:
        if isinstance(part, str) and found is not None:
            field = found.model_fields.get(part)
            found = None if field is None else _model_in(field.annotation)
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in a list, a union or an annotated type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _model_in(one))), None)
