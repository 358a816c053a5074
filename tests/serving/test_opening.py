"""A real home, opened and asked: what the command line puts together works together."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor, nn

from encoders.evidence import evidence_names
from feature_repo.artifact import (
    MANIFEST_FILE,
    PROGRAM_FILE,
    PROGRAM_INPUTS,
    load_run_manifest,
    set_current_run,
)
from feature_repo.errors import ArtifactError
from feature_repo.home import Home
from serving.opening import ServiceOptions, open_service
from serving.server import OpenedApp
from tests import waiting
from tests.live_home import RUN, live_home

wait_until = partial(waiting.wait_until, most_s=30)


class CountsModel(nn.Module):
    """More for what the user met more often; the same for users without a history."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.nan_to_num(inputs[-1]).sum(-1) * 0.01 + inputs[4].sum(1, keepdim=True) * 0.001


def write_program(home: Home) -> None:
    """Make the home's run one that can be served: a program that reads no dense features."""
    manifest = load_run_manifest(home, RUN)
    names = evidence_names(manifest.scenes)
    manifest = manifest.model_copy(
        update={
            "user_dense_names": (),
            "item_dense_names": (),
            "context_names": (),
            "category_vocabularies": {},
            "evidence_names": names,
            "sequence_length": 5,
        }
    )
    b, c, s, m, whole = 3, 5, len(manifest.scenes), 5, torch.int64
    example = (
        torch.zeros(7, manifest.encoder_width),
        torch.zeros((b, s, m), dtype=whole),
        torch.zeros((b, s, m), dtype=whole),
        torch.zeros(b, s, m),
        torch.zeros(b, s),
        torch.zeros(b, 0),
        torch.zeros((b, c), dtype=whole),
        torch.zeros((b, c), dtype=whole),
        torch.zeros(b, c, 0),
        torch.zeros((b, c, 0), dtype=whole),
        torch.zeros(b, c, 0),
        torch.zeros(b, c, len(names)),
    )
    batch, candidates, rows = (torch.export.Dim(name) for name in "BCV")
    sizes: list[Any] = [{0: rows}]
    for name in PROGRAM_INPUTS[1:]:
        of_item = name.startswith("candidate") or name in ("context", "evidence")
        sizes.append({0: batch, 1: candidates} if of_item else {0: batch})
    program = torch.export.export(CountsModel().eval(), example, dynamic_shapes=(tuple(sizes),))
    program._example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    for run in (RUN, "other-run"):
        (home.runs / run).mkdir(exist_ok=True)
        (home.runs / run / PROGRAM_FILE).write_bytes(buffer.getvalue())
        manifest.model_copy(update={"run": run}).save(home.runs / run / MANIFEST_FILE)


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Home]:
    with live_home(tmp_path_factory.mktemp("opening"), "embedded", request) as home:
        write_program(home)
        yield home


@pytest.fixture(scope="module")
def opened(home: Home) -> Iterator[OpenedApp]:
    options = ServiceOptions(shadow_run="other-run", shadow_share=1, served_share=1)
    opened = open_service(home, "embedded", options)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(opened: OpenedApp) -> Iterator[TestClient]:
    with TestClient(opened.app, raise_server_exceptions=False) as client:
        yield client


def test_users_and_items_of_the_home_are_found_and_ranked(client: TestClient) -> None:
    user_id = client.get("/v1/users").json()["users"][0]
    assert client.get(f"/v1/users/{user_id}").json()["known"]
    ranked = client.post("/v1/rank", json={"user_id": user_id, "top_k": 3}).json()
    assert ranked["known"]
    item_id = ranked["ranked"][0]["item_id"]
    title = client.get(f"/v1/items/{item_id}").json()["text"]
    assert title == ranked["ranked"][0]["text"]
    found = client.get("/v1/items", params={"query": title}).json()["items"]
    assert {"item_id": item_id, "text": title} in found
    assert client.get("/readyz").json() == {"ready": True, "run": RUN, "notes": []}
    assert client.get("/v1/model").json()["shadow"] == "other-run"


def test_an_event_is_in_the_next_history_of_the_user(client: TestClient, home: Home) -> None:
    scene = load_run_manifest(home, RUN).scenes[0]
    event = {"event_id": "1", "user_id": "newcomer", "scene": scene, "text": "word1 word2"}
    before = client.post("/v1/rank", json={"user_id": "newcomer"}).json()
    answer = client.post("/v1/events", json={"events": [event]})
    assert answer.json() == {"accepted": 1, "duplicates": 0, "rejected": []}
    after = client.get("/v1/users/newcomer").json()
    assert not before["known"]
    assert after["known"]
    assert [one["text"] for one in after["history"]] == ["word1 word2"]
    again = client.post("/v1/events", json={"events": [event]})
    assert again.json() == {"accepted": 0, "duplicates": 1, "rejected": []}


def test_metrics_tell_of_all_parts(client: TestClient) -> None:
    client.post("/v1/rank", json={"user_id": "newcomer"})
    compared = 'longtrail_shadow_total{outcome="compared"}'
    wait_until(lambda: compared in client.get("/metrics").text)
    text = client.get("/metrics").text
    assert "longtrail_store_breaker_open 0.0" in text
    assert "longtrail_store_failures_total 0.0" in text
    assert 'longtrail_served_log_requests_total{outcome="dropped"} 0.0' in text
    assert f'run="{RUN}"}} 1.0' in text


def test_the_run_that_becomes_current_serves(
    client: TestClient, opened: OpenedApp, home: Home
) -> None:
    set_current_run(home, "other-run")
    opened.refresh()
    wait_until(lambda: client.get("/readyz").json()["run"] == "other-run")
    assert client.post("/v1/rank", json={"user_id": "x"}).json()["model"] == "other-run"


def test_a_named_run_is_for_good_and_parts_can_be_left_out(home: Home) -> None:
    pinned = open_service(home, "embedded", ServiceOptions(run=RUN, takes_events=False))
    try:
        with TestClient(pinned.app) as client:
            set_current_run(home, "other-run")
            pinned.refresh()
            assert client.get("/readyz").json()["run"] == RUN
            assert "/v1/events" not in client.get("/openapi.json").json()["paths"]
    finally:
        pinned.close()


def test_a_shadow_that_is_not_there_is_said_at_once(home: Home) -> None:
    with pytest.raises(ArtifactError, match="there is no run 'nothing'"):
        open_service(home, "embedded", ServiceOptions(run=RUN, shadow_run="nothing"))


def hide_program(home: Home, run: str) -> Path:
    """Take the program of a run away; where it lies instead."""
    program = home.runs / run / PROGRAM_FILE
    return program.rename(program.with_suffix(".hidden"))


def test_one_that_takes_anothers_place_answers_before_it_can_load(home: Home) -> None:
    hidden = [hide_program(home, run) for run in (RUN, "other-run")]
    options = ServiceOptions(run=RUN, shadow_run="other-run", shadow_share=1)
    try:
        with pytest.raises(ArtifactError, match=PROGRAM_FILE):
            open_service(home, "embedded", options)
        opened = open_service(home, "embedded", options, is_replacement=True)
        assert opened.run == RUN
        scene = load_run_manifest(home, RUN).scenes[0]
        event = {"event_id": "late", "user_id": "late", "scene": scene, "text": "word1 word2"}
        with TestClient(opened.app, raise_server_exceptions=False) as client:
            ready = client.get("/readyz")
            assert ready.status_code == 503
            assert ready.json()["run"] is None
            assert f"run {RUN} cannot be served yet: " in ready.json()["detail"]
            assert PROGRAM_FILE in ready.json()["detail"]
            for answer in (
                client.post("/v1/rank", json={"user_id": "late"}),
                client.post("/v1/events", json={"events": [event]}),
            ):
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
                assert answer.json() == {"detail": ready.json()["detail"]}
            # Then the model can be loaded, and with it comes its shadow.
            for one in hidden:
                one.rename(one.with_name(PROGRAM_FILE))
            opened.refresh()
            wait_until(lambda: client.get("/readyz").status_code == 200)
            assert client.get("/v1/model").json()["shadow"] == "other-run"
            assert client.post("/v1/events", json={"events": [event]}).json()["accepted"] == 1
            assert client.post("/v1/rank", json={"user_id": "late"}).json()["known"]
        opened.close()
    finally:
        for one in hidden:
            if one.exists():
                one.rename(one.with_name(PROGRAM_FILE))


def test_a_shadow_that_cannot_be_loaded_late_keeps_no_model_back(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    hidden = hide_program(home, "other-run")
    options = ServiceOptions(run=RUN, shadow_run="other-run", takes_events=False)
    opened = open_service(home, "embedded", options, is_replacement=True)
    try:
        with TestClient(opened.app, raise_server_exceptions=False) as client:
            opened.refresh()
            wait_until(lambda: client.get("/readyz").status_code == 200)
            assert client.get("/v1/model").json()["shadow"] is None
        assert "nothing ranks in the shadow: " in caplog.text
    finally:
        hidden.rename(hidden.with_name(PROGRAM_FILE))
        opened.close()


def test_closing_writes_the_log_of_served_features(home: Home) -> None:
    opened = open_service(
        home, "embedded", ServiceOptions(run=RUN, served_share=1, takes_events=False)
    )
    before = set(home.served.glob("*/*.parquet"))
    with TestClient(opened.app) as client:
        assert client.post("/v1/rank", json={"user_id": "newcomer"}).status_code == 200
    opened.close()
    assert len(set(home.served.glob("*/*.parquet")) - before) == 1
