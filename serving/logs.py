"""Log lines on stderr, one per event, as text or JSON, each with the id of its request.

stdout is data. A line names the route, never the raw path: that holds the ids of people.
"""

import logging
import sys
import time
from typing import Literal

from asgi_correlation_id import CorrelationIdFilter
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

LogFormat = Literal["text", "json"]
ACCESS = "serving.access"

_OURS = ("serving", "feature_repo", "encoders", "uvicorn")
_TEXT = "%(asctime)s %(levelname)s %(name)s [%(correlation_id)s] %(message)s"


def configure_logs(log_format: LogFormat, *, access: bool = True) -> None:
    """Send every log line of this process to stderr in one form.

    Args:
        log_format: ``text`` for people, ``json`` for collectors.
        access: Whether each request gets a line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(CorrelationIdFilter(default_value="-"))
    handler.setFormatter(formatter(log_format))
    logging.getLogger().handlers = [handler]
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    # It warns of every request whose id is not taken over.
    logging.getLogger("asgi_correlation_id").setLevel(logging.ERROR)
    logging.getLogger(ACCESS).disabled = not access


def formatter(log_format: LogFormat) -> logging.Formatter:
    """Return what makes a line of a record that has a ``correlation_id``; times are UTC."""
    made = logging.Formatter(_TEXT) if log_format == "text" else _json()
    made.converter = time.gmtime
    made.default_time_format = "%Y-%m-%dT%H:%M:%S"
    made.default_msec_format = "%s.%03dZ"
    return made


def _json() -> logging.Formatter:
    """One object per line; what a call gives as ``extra`` becomes fields."""
    return OrjsonFormatter(
        ["asctime", "levelname", "name", "correlation_id", "message"],
        rename_fields={
            "asctime": "time",
            "levelname": "level",
            "name": "logger",
            "correlation_id": "request_id",
        },
        # uvicorn's own, for terminals.
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],
    )
