import json
import logging
import subprocess
import sys

import pytest
from asgi_correlation_id import CorrelationIdFilter, correlation_id

from serving.logs import formatter


def line(log_format: str, *, error: Exception | None = None) -> str:
    """What a record of one request becomes."""
    info = (type(error), error, None) if error else None
    record = logging.LogRecord(
        "serving.access", logging.INFO, __file__, 7, "%s %d", ("GET /v1/rank", 200), info
    )
    record.created, record.msecs = 1717243200.25, 250.0
    record.route, record.status, record.color_message = "/v1/rank", 200, "for a terminal"
    token = correlation_id.set("request-7")
    try:
        CorrelationIdFilter(default_value="-").filter(record)
        return formatter("json" if log_format == "json" else "text").format(record)
    finally:
        correlation_id.reset(token)


def test_text() -> None:
    expected = "2024-06-01T12:00:00.250Z INFO serving.access [request-7] GET /v1/rank 200"
    assert line("text") == expected


def test_json() -> None:
    assert json.loads(line("json")) == {
        "time": "2024-06-01T12:00:00.250Z",
        "level": "INFO",
        "logger": "serving.access",
        "request_id": "request-7",
        "message": "GET /v1/rank 200",
        "route": "/v1/rank",
        "status": 200,
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_defect_has_its_name(log_format: str) -> None:
    assert "KeyError" in line(log_format, error=KeyError("x"))
    assert "\n" not in line("json", error=KeyError("x"))


def test_configured_logs_go_to_stderr_and_without_access_lines_if_asked() -> None:
    code = (
        "import logging; from serving.logs import configure_logs\n"
        "configure_logs('json', access=False)\n"
        "logging.getLogger('serving.access').info('a request')\n"
        "logging.getLogger('serving.server').info('stopped')\n"
        "logging.getLogger('feast').info('chatter')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    (only,) = done.stderr.splitlines()
    assert json.loads(only)["message"] == "stopped"
    assert json.loads(only)["request_id"] == "-"
