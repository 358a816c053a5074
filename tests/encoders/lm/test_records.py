"""Records as text: what templates write, and that no text from outside can write a token."""

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.lm.records import (
    SPECIAL_TOKENS,
    Order,
    field_texts,
    field_token,
    format_number,
    history_text,
    listing_text,
    order_text,
    plain,
    scene_token,
    special_tokens,
)
from feature_repo.manifest import ItemColumn
from tests.encoders.planted import START, manifest

FIRST = Order(datetime(2024, 3, 1, 9, tzinfo=UTC), [("buy", "red bag"), ("return", "blue cup")])
SECOND = Order(datetime(2024, 3, 15, 8, tzinfo=UTC), [("buy", "red bag")])


def test_listings_name_their_columns_and_leave_out_what_is_missing() -> None:
    fields = {"price": 2.5499999523, "category": "home", "weight": math.nan, "brand": None}
    assert (
        listing_text("red bag", fields)
        == "<|listing|><|title|>red bag<|field:price|>2.55<|field:category|>home"
    )


def test_orders_and_histories_name_scenes_and_the_days_between() -> None:
    first = "<|order|><|month|>3<|scene:buy|>red bag<|scene:return|>blue cup"
    assert order_text(FIRST) == first
    second = "<|order|><|month|>3<|days|>13<|scene:buy|>red bag"
    assert history_text([FIRST, SECOND]) == f"<|history|>{first}{second}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.55, "2.55"),
        (0.857142, "0.857"),
        (1.0, "1"),
        (12345.678, "12345.68"),
        (0.000123456, "0.000123"),
        (-3.5, "-3.5"),
        (0.0, "0"),
        (math.inf, "inf"),
        (100.0, "100"),
    ],
)
def test_numbers_are_written_as_people_write_them(value: float, text: str) -> None:
    assert format_number(value) == text


def test_names_become_tokens_of_their_own() -> None:
    assert field_token("unit price|>") == "<|field:unit_price__|>"
    assert scene_token("buy") == "<|scene:buy|>"
    columns = (ItemColumn(name="price", kind="numeric"),)
    told = manifest(START, START).model_copy(update={"item_columns": columns})
    assert special_tokens(told) == (*SPECIAL_TOKENS, "<|field:price|>", "<|scene:view|>")
    assert len(set(SPECIAL_TOKENS)) == len(SPECIAL_TOKENS)


@settings(derandomize=True, max_examples=200)
@given(st.text("<|>end:a "), st.text("<|>buy "))
def test_text_from_outside_writes_no_token(title: str, value: str) -> None:
    document = listing_text(title, {"brand": value})
    assert document.count("<|listing|>") + document.count("<|title|>") == 2
    kept = [text for text in (plain(title), plain(value)) if text]
    assert field_texts(document) == kept
