"""Moments as epoch microseconds, in which every store compares times, and back."""

from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def micros(moment: datetime) -> int:
    """Epoch microseconds of a moment with a zone, exactly: a float would round them."""
    return (moment - EPOCH) // MICROSECOND


def moment_of(time: int) -> datetime:
    """The moment of epoch microseconds, UTC."""
    return EPOCH + time * MICROSECOND
