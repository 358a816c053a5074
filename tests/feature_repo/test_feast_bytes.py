"""The bytes are protobuf's and Feast's; what is read back is what Feast's messages say."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.internal.encoder import _VarintBytes  # type: ignore[import-untyped]
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]

from feature_repo.columns import Ragged, column_from_values
from feature_repo.errors import StoreError
from feature_repo.feast_bytes import (
    VALUE_FIELDS,
    KeyCodec,
    column_from_bytes,
    time_bytes,
    times_from_bytes,
    value_bytes,
    varints,
)
from tests.feature_repo.online_stores import ARROW, TYPES, random_columns


def test_varints_are_protobufs() -> None:
    powers = [2**k for k in range(64)]
    numbers = [0, *powers, *(p - 1 for p in powers), 2**64 - 1]
    numbers += np.random.default_rng(0).integers(0, 2**63, 20_000).tolist()  # several blocks
    data, ends = varints(np.array(numbers, dtype=np.uint64))
    expected = [_VarintBytes(number) for number in numbers]
    assert data == b"".join(expected)
    assert np.diff(ends).tolist() == [len(piece) for piece in expected]
    assert varints(np.zeros(0, dtype=np.uint64))[0] == b""


@pytest.mark.parametrize("name", list(TYPES))
def test_a_column_read_back_is_what_feast_reads(name: str) -> None:
    column = pa.array(random_columns(np.random.default_rng(1), 200)[name], ARROW[name])
    field = VALUE_FIELDS[TYPES[name]]
    sliced = pa.concat_arrays([column[:3], column])[3:]
    messages = value_bytes(column, field)
    assert value_bytes(sliced, field) == messages
    valid = np.arange(len(column)) % 5 != 0
    ours = column_from_bytes([*messages[:-1], None], valid, field)
    values = [Value.FromString(message) for message in (*messages[:-1], b"")]
    feasts = column_from_values(values, valid, field)
    if isinstance(ours, Ragged):
        assert isinstance(feasts, Ragged)
        assert ours.values.dtype == feasts.values.dtype
        assert ours.values.tobytes() == feasts.values.tobytes()
        assert ours.lengths.tolist() == feasts.lengths.tolist()
        assert ours.lengths.sum() > 100
    else:
        assert isinstance(feasts, np.ndarray)
        assert ours.dtype == feasts.dtype
        if ours.dtype == object:
            assert ours.tolist() == feasts.tolist()
        else:
            assert ours.tobytes() == feasts.tobytes()


def test_times_are_feasts_and_come_back() -> None:
    moments = [
        datetime(2024, 1, 1, tzinfo=UTC),
        datetime(2024, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(1900, 1, 1, tzinfo=UTC),
    ]
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    micros = np.array([(m - epoch) // timedelta(microseconds=1) for m in moments])
    expected = []
    for moment in moments:
        message = Timestamp()
        message.FromDatetime(moment)
        expected.append(message.SerializeToString())
    assert time_bytes(micros) == expected
    assert times_from_bytes(expected).tolist() == micros.tolist()
    assert times_from_bytes([None, b""]).tolist() == [0, 0]


def test_keys_are_feasts_and_come_back() -> None:
    words, numbers = ["a", "", "Straße 東京", "longtrail"], [0, -1, 2**53 + 1, 2**63 - 1]
    for values, is_string in ((words, True), (numbers, False)):
        codec = KeyCodec("the_id", "longtrail", is_string=is_string)
        keys = codec.encode(values)
        assert keys == [
            serialize_entity_key(
                EntityKey(
                    join_keys=["the_id"],
                    entity_values=[
                        Value(string_val=v) if isinstance(v, str) else Value(int64_val=v)
                    ],
                )
            )
            + b"longtrail"
            for v in values
        ]
        assert codec.decode(keys).to_pylist() == values
        assert all(codec.owns(key) for key in keys)
        assert not codec.owns(
            KeyCodec("the_id", "mylongtrail", is_string=is_string).encode(values)[0]
        )
        assert not codec.owns(KeyCodec("an_id", "longtrail", is_string=is_string).encode(values)[0])


def test_a_null_in_a_list_is_refused() -> None:
    with pytest.raises(StoreError, match="must not have null elements"):
        value_bytes(pa.array([[1, None]], pa.list_(pa.int64())), "int64_list_val")


def test_values_of_another_type_are_missing() -> None:
    """What was written before a feature's type changed is no value of the new type."""
    messages = {}
    for name, dtype in TYPES.items():
        column = pa.array(random_columns(np.random.default_rng(2), 40)[name], ARROW[name])
        messages[VALUE_FIELDS[dtype]] = value_bytes(column, VALUE_FIELDS[dtype])
    valid = np.ones(40, dtype=bool)
    for field in messages:
        nothing = column_from_bytes([None] * 40, valid, field)
        for other in messages.keys() - {field}:
            found = column_from_bytes(messages[other], valid, field)
            if isinstance(nothing, Ragged):
                assert isinstance(found, Ragged)
                assert found.lengths.sum() == 0
            else:
                assert isinstance(found, np.ndarray)
                assert isinstance(nothing, np.ndarray)
                assert str(found.tolist()) == str(nothing.tolist())  # NaN too
