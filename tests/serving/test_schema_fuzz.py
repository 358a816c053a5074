"""Every address with what its description allows and with what it does not: never a 5xx.

The application is the real one, over the toy shop.

``LONGTRAIL_FUZZ_CASES`` is the number of cases per address and mode; a thousand in all by default.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import negative_data_rejection, positive_data_acceptance

from encoders.loaded_artifact import Artifact
from feature_repo.home import Home
from serving.app import create_app
from serving.deployment import Deployment
from tests.serving.conftest import World
from tests.serving.stand_in import EventList, toy_directory

CASES = int(os.environ.get("LONGTRAIL_FUZZ_CASES", "60"))
OPERATIONS = [
    ("POST", "/v1/rank"),
    ("POST", "/v1/rank:batch"),
    ("POST", "/v1/explain"),
    ("POST", "/v1/events"),
    ("GET", "/v1/users"),
    ("GET", "/v1/users/{user_id}"),
    ("GET", "/v1/items"),
    ("GET", "/v1/items/{item_id}"),
    ("GET", "/v1/items/{item_id}/similar"),
]
WITHOUT_INPUT = [("GET", "/v1/model"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics")]


@pytest.fixture(scope="module")
def schema(
    toy_program: bytes, toy_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    world = World(Home(tmp_path_factory.mktemp("fuzz")), toy_program, toy_artifact)
    ranker = world.ranker()
    ranker.warm_up()
    app = create_app(Deployment(ranker), directory=toy_directory(), events=EventList())
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.fixture(scope="module")
def num_cases(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Cases per address that were answered as described; told at the end."""
    counted: Counter[str] = Counter()
    yield counted
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if reporter is not None:  # tests in several processes have none
        with capture.global_and_fixture_disabled():
            reporter.write_line(f"\n{counted.total()} cases answered as described: {dict(counted)}")


def test_no_address_is_left_out(schema: Any) -> None:
    found = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert found == {*OPERATIONS, *WITHOUT_INPUT}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_one_that_the_description_names(
    schema: Any, num_cases: Counter[str], method: str, path: str, mode: GenerationMode
) -> None:
    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: Case[Any]) -> None:
        # What the model reads and which items there are is no part of the description, so what
        # fits it may still be refused.
        excluded = [positive_data_acceptance]
        if path == "/v1/events":  # one that is malformed comes back among the rejected
            excluded.append(negative_data_rejection)
        case.call_and_validate(excluded_checks=excluded)
        num_cases[f"{method} {path}"] += 1

    check()


@pytest.mark.parametrize(("method", "path"), WITHOUT_INPUT)
def test_answers_without_input_are_as_described(schema: Any, method: str, path: str) -> None:
    schema[path][method].Case().call_and_validate()
