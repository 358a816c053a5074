"""The serving benchmark: the generator against small servers whose behaviour is known."""

import asyncio
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import psutil
import pytest
from feast.feature_server import convert_response_to_dict
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import Value

from benchmarks.bench_serving import (
    PATH,
    RIVAL_PATH,
    check_same_answers,
    highest_rate,
    key_figures,
    make_requests,
)
from benchmarks.load import LoadPlan, LoadResult, run_load
from benchmarks.load_generator import generate
from benchmarks.rival_server import columns_of
from benchmarks.serving_processes import Server, ending, usage
from feature_repo.columns import Ragged
from feature_repo.view_reader import ReadView

ANSWER = {"ranked": [{"item_id": "a", "score": 0.5}, {"item_id": "b", "score": 0.25}]}
PLAN = LoadPlan(
    "http://127.0.0.1:1", PATH, ('{"n": 0}', '{"n": 1}', '{"n": 2}'), rate=100.0, seconds=0.5,
    num_ranked=2, answer_path="cached", warm_up_s=0.1, check_every=1,
)  # fmt: skip
GOOD = ANSWER | {"path": "cached"}

Answering = Callable[[dict[str, Any], int], Awaitable[bytes]]
"""A request and how many came before -> the whole answer; empty closes the connection."""


def response(document: Any, status: str = "200 OK", more: str = "") -> bytes:
    body = json.dumps(document).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


class Seen:
    """What a server met."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.num_connections = 0


def load(plan: LoadPlan, answering: Answering) -> tuple[LoadResult, Seen]:
    """Put a plan's load on a server that answers so, both in this process."""
    seen = Seen()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(size))
                seen.heads.append(head)
                seen.bodies.append(body)
                answer = await answering(body, len(seen.bodies) - 1)
                if not answer:
                    break
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the generator is done
        finally:
            writer.close()

    async def both() -> LoadResult:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await generate(replace(plan, url=f"http://127.0.0.1:{port}"))
        finally:
            server.close()

    return asyncio.run(both()), seen


async def good(_: dict[str, Any], __: int) -> bytes:
    return response(GOOD)


# The generator.
def test_every_request_is_sent_once_in_turn_over_kept_connections() -> None:
    result, seen = load(PLAN, good)
    assert (result.num_requests, result.num_errors, result.num_checked) == (50, 0, 50)
    assert len(seen.bodies) == 60  # ten of the warm-up
    assert sorted(body["n"] for body in seen.bodies) == [0] * 20 + [1] * 20 + [2] * 20
    assert seen.num_connections == result.num_connections == PLAN.num_connections
    assert seen.heads[0].startswith("POST /v1/rank HTTP/1.1\r\nHost: 127.0.0.1:")
    assert "\r\nContent-Type: application/json\r\n" in seen.heads[0]
    assert result.achieved_rate == pytest.approx(100, rel=0.3)
    assert 0 < result.latency_ms["p50"] <= result.latency_ms["p99"] <= result.latency_ms["max"]
    assert result.cpu_s > 0


def test_a_stall_is_charged_to_every_request_that_it_kept_waiting() -> None:
    """0.4 s of nothing at 100/s: forty requests wait 0.4, 0.39, ... s, whenever they left."""

    async def stalling(_: dict[str, Any], number: int) -> bytes:
        if number == 20:
            time.sleep(0.4)  # the whole loop, the generator with it
        return response(GOOD)

    result, _ = load(replace(PLAN, seconds=1.0, warm_up_s=0.0), stalling)
    assert result.num_errors == 0
    assert result.latency_ms["max"] >= 390
    # A generator that measures from when it could send would see one slow request in a hundred.
    assert result.latency_ms["p90"] >= 250
    assert result.latency_ms["p50"] < 250


def test_requests_that_find_no_connection_wait_and_their_time_counts() -> None:
    async def slow(_: dict[str, Any], __: int) -> bytes:
        await asyncio.sleep(0.05)
        return response(GOOD)

    # Two connections answer 40 requests a second, 60 come: the last of 30 waits about 0.25 s.
    plan = replace(PLAN, rate=60.0, warm_up_s=0.0, num_connections=2, max_connections=2)
    result, seen = load(plan, slow)
    assert (result.num_errors, seen.num_connections) == (0, 2)
    assert result.latency_ms["max"] > 200
    assert 50 <= result.answer_ms["p50"] < result.latency_ms["p50"]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (response({}, "503 Service Unavailable"), "status 503"),
        (response(GOOD | {"path": "live"}), "path live"),
        (response(GOOD | {"ranked": []}), "0 ranked items"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "answer without content-length"),
        (b"", "connection lost"),
    ],
)
def test_a_bad_answer_is_an_error_with_its_reason(answer: bytes, why: str) -> None:
    async def one_bad(_: dict[str, Any], number: int) -> bytes:
        return answer if number in (0, 30) else response(GOOD)  # the first is of the warm-up

    result, _ = load(PLAN, one_bad)
    assert result.errors == {why: 1}
    assert result.num_errors == 1


def test_a_server_that_closes_after_an_answer_loses_nothing() -> None:
    async def closing(_: dict[str, Any], number: int) -> bytes:
        return response(GOOD, more="Connection: close\r\n" if number % 10 == 0 else "")

    result, seen = load(replace(PLAN, num_connections=2), closing)
    assert result.num_errors == 0
    assert seen.num_connections > 2


def test_a_request_that_is_not_answered_times_out() -> None:
    async def silent(_: dict[str, Any], number: int) -> bytes:
        if number == 20:
            await asyncio.sleep(60)
        return response(GOOD)

    result, _ = load(replace(PLAN, timeout_s=0.4), silent)
    assert result.errors == {"timeout": 1}


def test_nothing_listens() -> None:
    with pytest.raises(ConnectionError, match=r"nothing answers at http://127\.0\.0\.1:1: is the"):
        asyncio.run(generate(PLAN))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bodies": ()}, "bodies must hold at least one request, got none"),
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
        ({"url": "https://shop.example"}, "url must be of the form http://HOST:PORT, got"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(PLAN, **changes)


@contextmanager
def threaded_server(answers: dict[str, Any]) -> Iterator[str]:
    """A server that gives the same answer to every request of a path; ends with this process."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(answers[self.path]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_generator_runs_in_a_process_of_its_own() -> None:
    calls: list[float] = []

    def meanwhile() -> None:
        calls.append(time.monotonic())
        time.sleep(0.05)

    with threaded_server({PATH: GOOD}) as url:
        result = run_load(replace(PLAN, url=url), meanwhile=meanwhile)
    assert (result.num_requests, result.errors) == (50, {})
    assert len(calls) > 5


def test_a_generator_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"nothing answers at http://127\.0\.0\.1:1"):
        run_load(PLAN)


# Rates.
def result_of(p99_ms: float | None, errors: int = 0) -> LoadResult:
    latency = {} if p99_ms is None else {"p99": p99_ms}
    return LoadResult(1.0, 1.0, 1, errors, {}, 0, latency, {}, 0.0, 1, 0.0, 1.0)


@pytest.mark.parametrize("true_rate", [3.0, 97.0, 137.0, 1000.0])
def test_the_highest_rate_is_found_from_below_and_above(true_rate: float) -> None:
    found, results = highest_rate(
        lambda rate: result_of(10.0 if rate <= true_rate else 20.0), limit_ms=15.0, start=100.0
    )
    assert true_rate / 1.1 <= found <= true_rate
    assert len(results) < 12


@pytest.mark.parametrize("result", [result_of(1.0, errors=1), result_of(None), result_of(15.1)])
def test_a_server_that_cannot_has_rate_zero(result: LoadResult) -> None:
    found, results = highest_rate(lambda _: result, limit_ms=15.0, start=8.0, lowest=1.0)
    assert (found, len(results)) == (0.0, 4)  # at 8, 4, 2 and 1


def test_requests_are_of_known_users_and_items() -> None:
    users, items = ["u1", "u2"], [f"i{n}" for n in range(20)]
    requests = make_requests(
        users, items, scene="purchase", num_requests=5, num_candidates=8, top_k=3
    )
    assert requests.num_ranked == 3
    for cached, live in zip(
        map(json.loads, requests.cached), map(json.loads, requests.live), strict=True
    ):
        assert cached["user_id"] in users
        assert len(set(cached["candidates"])) == 8
        assert set(cached["candidates"]) <= set(items)
        (added,) = live.pop("changes")["added"]
        assert added["scene"] == "purchase"
        assert added["item_id"] in items
        assert live == cached
    few = make_requests(users, items, scene="s", num_requests=1, num_candidates=50, top_k=50)
    assert few.num_ranked == 20


# Servers.
def test_usage_counts_children() -> None:
    program = "x = bytearray(60_000_000); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    try:
        before = usage(os.getpid()).own_mib
        for _ in range(100):
            with_child = usage(os.getpid()).own_mib
            if usage(child.pid).own_mib > 55:
                break
            time.sleep(0.05)
        assert usage(child.pid).own_mib > 55
        assert with_child > before - 5
        assert usage(os.getpid()).own_mib > usage(child.pid).own_mib
        assert usage(os.getpid()).cpu_s > 0
    finally:
        child.communicate(b"\n")


def test_no_child_of_a_server_outlives_it() -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    with ending(process) as started:
        output = started.stdout
        child = psutil.Process(int(output.readline() if output else 0))
        assert child.is_running()
    assert process.poll() is not None
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        ([("a", 0.5), ("b", 0.25)], True),
        ([("a", 0.5), ("c", 0.25)], True),  # a tie at the end
        ([("a", 0.5), ("b", 0.26)], False),
        ([("c", 0.6), ("a", 0.5)], False),
    ],
)
def test_the_rival_must_give_the_same_scores(
    other: list[tuple[str, float]], *, is_same: bool
) -> None:
    theirs = {"ranked": [{"item_id": item, "score": score} for item, score in other]}
    with threaded_server({PATH: ANSWER, RIVAL_PATH: theirs}) as url:
        server = Server(url, os.getpid())
        if is_same:
            assert check_same_answers(server, server, ["{}"]) <= 1e-4
        else:
            with pytest.raises(SystemExit, match=r"scores differ by 0\.0?[12]"):
                check_same_answers(server, server, ["{}"])


def test_the_rival_reads_what_feast_serve_answers() -> None:
    """Feast's own message, made JSON by its own server's function."""
    kinds = {
        "ids": "int64_list_val", "weights": "float_list_val", "total": "int64_val",
        "rate": "float_val", "kind": "string_val",
    }  # fmt: skip
    large = 2**62 + 1
    rows = [(large, 0.5, 3, 0.25, "lamp"), None]
    message = GetOnlineFeaturesResponse()
    for name, kind in kinds.items():
        message.metadata.feature_names.val.append(f"v__{name}")
        vector = message.results.add()
        for row in rows:
            value = Value()
            if row is not None:
                entry = row[list(kinds).index(name)]
                if "_list_" in kind:
                    getattr(value, kind).val.extend([entry, entry])
                else:
                    setattr(value, kind, entry)
            vector.values.append(value)
    answer = json.dumps(convert_response_to_dict(message)).encode()
    columns = columns_of(answer, [ReadView("v", "user_id", None, kinds)])["v"]
    assert columns.present.tolist() == [True, False]
    ids, weights = columns.values["ids"], columns.values["weights"]
    assert isinstance(ids, Ragged)
    assert isinstance(weights, Ragged)
    total, rate, words = (np.asarray(columns.values[name]) for name in ("total", "rate", "kind"))
    assert (ids.values.tolist(), ids.lengths.tolist()) == ([large, large], [2, 0])
    assert ids.values.dtype == np.int64
    assert weights.values.dtype == np.float32
    assert total.tolist() == [3, 0]
    assert (rate[0], math.isnan(rate[1])) == (0.25, True)
    assert words.tolist() == ["lamp", None]


def test_key_figures_are_those_of_the_goals() -> None:
    load_figures = {"latency_ms": {"p99": 9.0}, "num_errors": 1}
    rival = {"rate": 4.0, "limit_ms": 20.0, "ours_at_its_limit": {"rate": 12.0}, "ratio": 3.0}
    found = key_figures(
        {
            "cached": {**load_figures, "own_mib": {"start": 5.0, "middle": 7.0, "end": 7.5}},
            "live": {**load_figures, "num_errors": 2},
            "parts": {"ratio": 1.5, "ratio_with_programs": 3.5},
            "alone": {"ratio": 2.5},
            "ours": {"rate": 8.0},
            "rival": rival,
            "rival_kept_items": rival | {"ratio": 2.0},
        }
    )
    assert found == {
        "cached_p99_ms": 9.0, "live_p99_ms": 9.0, "errors": 3, "whole_to_parts": 1.5,
        "whole_to_parts_alone": 2.5, "our_rate": 8.0, "rival_rate": 4.0, "rival_limit_ms": 20.0,
        "our_rate_at_rival_limit": 12.0, "ratio": 3.0, "ratio_to_rival_with_kept_items": 2.0,
        "memory_growth_mib": 0.5, "memory_growth_from_start_mib": 2.5, "whole_to_programs": 3.5,
    }  # fmt: skip
