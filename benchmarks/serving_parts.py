"""The bare parts of one ranking: what it cannot do without, each as plain as it can be.

They are measured as the service that they are compared with works: in as many processes side by
side as it has workers, in turns, and each as seldom as a worker is asked. In a tight loop all would
be in the processor's caches, and alone a process has both threads of a core.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import orjson
import redis
import torch

from encoders.loaded_artifact import load_artifact
from encoders.table import EmbeddingTable
from feature_repo.artifact import current_run
from feature_repo.catalog import Catalog
from feature_repo.home import Home
from feature_repo.reader import FeatureReader
from feature_repo.redis_lookup import ViewLayout
from feature_repo.services import local
from serving.ranker import Ranker

_WARM = 20


class Recorded:
    """A program that keeps the inputs of its calls."""

    def __init__(self, program: Callable[..., Any], calls: list[Callable[[], Any]]) -> None:
        self._program = program
        self._calls = calls

    def __call__(self, *inputs: Any) -> Any:
        """Run the program."""
        self._calls.append(lambda: self._program(*inputs))
        return self._program(*inputs)


def measure_parts(
    home: Home,
    profile: str,
    bodies: Sequence[str],
    answer: str,
    *,
    num: int,
    rate: float,
    workers: int,
) -> dict[str, Any]:
    """Median milliseconds of each bare part of a ranking on the cached path, and their sum.

    ``model_ms`` is the model's forward pass from what was read to logits: evidence and programs.
    ``programs_ms`` is the programs alone, a part of it that does not count again; with it in the
    model's place the sum is ``sum_with_programs_ms``.

    Args:
        home: With a served run and local servers.
        profile: Whose stores.
        bodies: Requests, used in turn.
        answer: One answer.
        num: Repetitions of each part in each process, at least 1.
        rate: How often each part is met per second, in all processes together.
        workers: Processes side by side.
    """
    context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_keep, initargs=(context.Barrier(workers),)
    ) as pool:
        jobs = [
            pool.submit(_measure, home, profile, bodies, answer, num, workers / rate)
            for _ in range(workers)
        ]
        times, sizes = zip(*(job.result() for job in jobs), strict=True)
    medians = {
        name: float(np.median(np.concatenate([one[name] for one in times])) * 1e3)
        for name in times[0]
    }
    around_ms = medians["redis_ms"] + medians["json_ms"]
    return {
        **medians,
        "sum_ms": around_ms + medians["model_ms"],
        "sum_with_programs_ms": around_ms + medians["programs_ms"],
        **sizes[0],
    }


_together: Barrier
"""Of a process that measures: none begins before all are ready."""


def _keep(barrier: Barrier) -> None:
    global _together  # a barrier can be handed over to a process' start only
    _together = barrier


def _measure(
    home: Home, profile: str, bodies: Sequence[str], answer: str, num: int, interval_s: float
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each part, and sizes; one of the processes."""
    torch.set_num_threads(1)
    reader = FeatureReader(home, profile, outputs_of=current_run(home))
    read, num_bytes = _redis_read(home, reader, bodies)
    documents = json.loads(answer)
    forward, programs = _forward(home, reader, bodies[0])
    parts: dict[str, Callable[[int], Any]] = {
        "redis_ms": read,
        "model_ms": lambda _: forward(),
        "programs_ms": lambda _: [program() for program in programs],
        "json_ms": lambda n: (orjson.loads(bodies[n % len(bodies)]), orjson.dumps(documents)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    _together.wait()
    with torch.inference_mode():
        for number in range(num + _WARM):
            for name, part in parts.items():
                time.sleep(interval_s / len(parts))
                began = time.perf_counter()
                part(number)
                seconds[name].append(time.perf_counter() - began)
    return {name: times[_WARM:] for name, times in seconds.items()}, {
        "num_programs": len(programs),
        "redis_bytes": num_bytes,
        "body_bytes": len(bodies[0]),
        "answer_bytes": len(answer),
    }


def _redis_read(
    home: Home, reader: FeatureReader, bodies: Sequence[str]
) -> tuple[Callable[[int], Any], int]:
    """A function that reads one user's fields, and how many bytes the first one has."""
    views = [*reader._user_views, *([reader._outputs_view] if reader._outputs_view else [])]
    layouts = {
        view.name: ViewLayout.of(reader.store, reader.store.get_feature_view(view.name))
        for view in views
    }
    wanted: list[Any] = []
    for view in views:
        layout = layouts[view.name]
        wanted += [layout.time, *(layout.features[name][0] for name in view.kinds)]
    codec = layouts[views[0].name].codec
    keys: list[Any] = codec.encode([json.loads(body)["user_id"] for body in bodies])
    client = redis.Redis.from_url(local.addresses(home, ["redis"])["redis"])

    def read(number: int) -> Any:
        return client.hmget(keys[number % len(keys)], wanted)

    return read, sum(len(value) for value in read(0) if value is not None)


def _forward(
    home: Home, reader: FeatureReader, body: str
) -> tuple[Callable[[], Any], list[Callable[[], Any]]]:
    """The forward pass of one ranking, and the calls of programs in it with their inputs."""
    artifact = load_artifact(home, current_run(home))
    calls: list[Callable[[], Any]] = []
    parts = artifact.parts
    if parts is not None:
        parts = replace(
            parts,
            users=Recorded(parts.users, calls),
            items=Recorded(parts.items, calls),
            head=Recorded(parts.head, calls),
        )
    recorded = replace(artifact, score=Recorded(artifact.score, calls), parts=parts)
    table = EmbeddingTable.open(home, fingerprint=artifact.manifest.encoder_fingerprint)
    ranker = Ranker(recorded, reader, table, Catalog.load(home), clock=reader.manifest.now)
    ranker.warm_up()
    wanted = json.loads(body)
    preparation, at = ranker._preparation, reader.manifest.now()
    request = preparation.prepare(wanted["user_id"], at, None, may_degrade=False)
    items, _ = preparation.candidates(request, wanted["candidates"], may_degrade=False)
    calls.clear()  # what is computed once and kept is no part of a request

    def forward() -> None:
        calls.clear()
        ranker._logits(request, items, {})

    forward()
    return forward, list(calls)
