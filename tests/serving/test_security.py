"""Keys, scopes, limits and headers."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from feature_repo.errors import LongtrailError, StoreError
from serving.app import AppSettings, create_app
from serving.deployment import Deployment
from serving.logs import ACCESS
from serving.rate_limit import RateLimit
from serving.security import (
    ApiKeys,
    hosts_allowed,
    is_loopback,
    new_key,
    required_scope,
    secret_of,
)
from tests.serving.stand_in import StandIn, stand_in_app, toy_directory

EVENTS = {"events": [{"event_id": "e1", "user_id": "ann", "scene": "purchase", "text": "x"}]}
ANN = {"user_id": "ann", "top_k": 1}


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, str]:
    """Name -> secret of the keys in keys.toml."""
    made = {
        "reader": new_key("reader", ["read"]),
        "writer": new_key("writer", ["write"]),
        "both": new_key("both", ["read", "write"]),
    }
    entries = "\n".join(entry for _, entry in made.values())
    (tmp_path / "keys.toml").write_text(entries, encoding="utf-8")
    return {name: secret for name, (secret, _) in made.items()}


@pytest.fixture
def client(tmp_path: Path, secrets: dict[str, str]) -> Iterator[TestClient]:
    app = stand_in_app(keys=ApiKeys(tmp_path / "keys.toml"))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# Keys.
def test_a_key_is_found_by_its_secret_alone(tmp_path: Path, secrets: dict[str, str]) -> None:
    keys = ApiKeys(tmp_path / "keys.toml")
    assert len(keys) == 3
    for name, secret in secrets.items():
        found = keys.find(secret)
        assert found is not None
        assert found.name == name
    for wrong in ("", "reader", secrets["reader"][:-1], secrets["reader"] + "x", "\udcff"):
        assert keys.find(wrong) is None


def test_secrets_differ_and_are_nowhere_in_the_file(
    tmp_path: Path, secrets: dict[str, str]
) -> None:
    text = (tmp_path / "keys.toml").read_text(encoding="utf-8")
    assert len(set(secrets.values())) == 3
    for secret in secrets.values():
        assert len(secret) == 46  # "lt_" and 256 bits, 6 in a character
        assert secret not in text
        assert hashlib.sha256(secret.encode()).hexdigest() in text


def test_a_changed_file_is_taken_and_a_broken_one_is_not(
    tmp_path: Path, secrets: dict[str, str]
) -> None:
    path = tmp_path / "keys.toml"
    keys = ApiKeys(path)
    secret, entry = new_key("new", ["read"])
    path.write_text("nonsense", encoding="utf-8")
    with pytest.raises(LongtrailError, match=r"is not TOML.*; until then the keys of before"):
        keys.reload()
    assert keys.find(secrets["reader"]) is not None
    path.write_text(entry, encoding="utf-8")
    keys.reload()
    assert keys.find(secret) is not None
    assert keys.find(secrets["reader"]) is None


DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read: No such file or directory"),
        ("[keys", "is not TOML"),
        ("", r"is not usable \(keys: it has no \[keys\.NAME\] entry\)"),
        ("[keys]", "names no key, so nobody could ask"),
        (
            "[keys.a]\nsha256 = 'my-secret'\nscopes = ['read']",
            r"keys\.a\.sha256: expected 64 hexadecimal",
        ),
        (
            f"[keys.a]\nsha256 = '{DIGEST}'\nscopes = ['read']\nx = 1",
            r"keys\.a\.x: there is no such field",
        ),
        (f"[keys.a]\nsha256 = '{DIGEST}'\nscopes = []", r"keys\.a\.scopes: expected a list"),
        (f"[keys.a]\nsha256 = '{DIGEST}'\nscopes = ['all']", r"keys\.a\.scopes\.0: Input should"),
        (f"[keys.a]\nsha256 = '{DIGEST}'\nscope = ['read']", r"keys\.a\.scopes: expected a list"),
        (f"[keys.'a b']\nsha256 = '{DIGEST}'\nscopes = ['read']", "expected a name of letters"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, text: str | None, sentence: str
) -> None:
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(LongtrailError, match=sentence) as caught:
        ApiKeys(path)
    assert "my-secret" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ({b"authorization": b"Bearer lt_x"}, "lt_x"),
        ({b"authorization": b"bearer  lt_x "}, "lt_x"),
        ({b"x-api-key": b"lt_x"}, "lt_x"),
        ({b"authorization": b"Basic abc", b"x-api-key": b"lt_x"}, "lt_x"),
        ({b"authorization": b"lt_x"}, None),
        ({b"authorization": b"Bearer"}, None),
        ({}, None),
    ],
)
def test_where_a_secret_is_looked_for(headers: dict[bytes, bytes], secret: str | None) -> None:
    assert secret_of(headers) == secret


# Scopes.
@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/rank", "read"),
        ("/v1/rank:batch", "read"),
        ("/v1/users/a/b", "read"),
        ("/v1/events", "write"),
        ("/v1/events/", "write"),
        ("/healthz", None),
        ("/metrics", None),
        ("/", None),
        ("/js/api.js", None),
    ],
)
def test_required_scope(path: str, scope: str | None) -> None:
    assert required_scope(path) == scope


@pytest.mark.parametrize(
    ("name", "reading", "writing"),
    [("reader", 200, 403), ("writer", 403, 200), ("both", 200, 200), ("nobody", 401, 401)],
)
def test_scopes(
    client: TestClient, secrets: dict[str, str], name: str, reading: int, writing: int
) -> None:
    headers = bearer(secrets.get(name, "lt_wrong"))
    answers = [
        client.post("/v1/rank", json=ANN, headers=headers),
        client.post("/v1/events", json=EVENTS, headers=headers),
        client.get("/v1/users/ann", headers={"x-api-key": secrets.get(name, "lt_wrong")}),
    ]
    assert [answer.status_code for answer in answers] == [reading, writing, reading]
    for answer in answers:
        if answer.status_code == 403:
            assert "has no scope" in answer.json()["detail"]
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]


def test_what_needs_no_key(client: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/"):
        assert client.get(path).status_code == 200
    assert client.post("/v1/rank", json=ANN).status_code == 401
    # Without a key nobody learns what a body should be like, and nothing is parsed.
    assert client.post("/v1/rank", content=b"{").status_code == 401


def test_why_it_is_not_ready_is_for_those_with_a_key(
    tmp_path: Path, secrets: dict[str, str]
) -> None:
    def away() -> None:
        raise StoreError("Redis at 10.0.0.7:6379 does not answer")

    deployment = Deployment(StandIn(before=away))
    deployment.keep("new-run", "/srv/home/runs/new-run has no program")
    settings = AppSettings(keys=ApiKeys(tmp_path / "keys.toml"))
    with TestClient(create_app(deployment, directory=toy_directory(), settings=settings)) as client:
        for headers in ({}, bearer("lt_wrong")):
            hidden = client.get("/readyz", headers=headers)
            assert hidden.status_code == 503
            assert hidden.json() == {
                "ready": False,
                "run": "toy-run",
                "notes": ["another run cannot be served; callers with an API key are told why"],
                "detail": "it cannot rank now; callers with an API key are told why",
            }
        told = client.get("/readyz", headers=bearer(secrets["writer"]))
        assert told.json()["detail"] == "Redis at 10.0.0.7:6379 does not answer"
        assert "/srv/home" in told.json()["notes"][0]


def test_openapi_asks_for_keys_where_they_are_asked_for(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
    assert document["paths"]["/v1/rank"]["post"]["security"] == [{"bearer": []}, {"header": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_logs_name_the_key_and_the_route_and_never_the_secret_or_the_user(
    client: TestClient, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        client.get("/v1/users/ann-hathaway", headers=bearer(secrets["both"]))
        client.get("/v1/users/ann-hathaway", headers=bearer("lt_wrong"))
    lines = [record.getMessage() for record in caplog.records if record.name == ACCESS]
    assert lines[0].startswith("GET /v1/users/{user_id} 200 ")
    assert lines[0].endswith("ms key=both")
    assert lines[1].startswith("other other 401 ")
    everything = json.dumps([vars(record) for record in caplog.records], default=str)
    for secret in (*secrets.values(), "lt_wrong"):
        assert secret not in everything
    ours = [record for record in caplog.records if record.name.startswith("serving")]
    assert "hathaway" not in json.dumps([vars(record) for record in ours], default=str)


# Addresses.
@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("192.168.1.4", False),
        ("shop.example", False),
    ],
)
def test_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


LOCAL = ("localhost", "127.0.0.1", "[::1]")


@pytest.mark.parametrize(
    ("host", "named", "asks_for_keys", "hosts"),
    [
        ("127.0.0.1", (), False, LOCAL),
        ("127.0.0.2", (), False, (*LOCAL, "127.0.0.2")),
        ("::1", (), False, LOCAL),
        ("127.0.0.1", ("Shop.example", "[fe80::1]"), False, (*LOCAL, "shop.example", "[fe80::1]")),
        ("127.0.0.1", ("*",), False, (*LOCAL, "*")),
        ("127.0.0.1", (), True, ("*",)),
        ("127.0.0.1", ("shop.example",), True, (*LOCAL, "shop.example")),
        ("0.0.0.0", (), False, ("*",)),  # noqa: S104
        ("10.0.0.7", ("shop.example",), False, (*LOCAL, "10.0.0.7", "shop.example")),
    ],
)
def test_hosts_that_requests_may_name(
    host: str, named: tuple[str, ...], asks_for_keys: bool, hosts: tuple[str, ...]
) -> None:
    assert hosts_allowed(host, named, asks_for_keys=asks_for_keys) == hosts


@pytest.mark.parametrize(
    "name", ["", "shop.example:80", "https://shop.example", "*.example", "::1"]
)
def test_an_allowed_host_that_is_none_is_one_sentence(name: str) -> None:
    with pytest.raises(LongtrailError, match="an allowed host is a name or an address without por"):
        hosts_allowed("127.0.0.1", [name], asks_for_keys=False)


def test_a_page_that_points_its_name_at_this_machine_reads_nothing() -> None:
    app = stand_in_app(allowed_hosts=hosts_allowed("127.0.0.1", (), asks_for_keys=False))
    with TestClient(app) as client:

        def status(host: str, path: str = "/v1/model") -> int:
            return client.get(path, headers={"host": host}).status_code

        for host in ("localhost", "LOCALHOST:8080", "127.0.0.1:8080", "[::1]:8080", "[::1]"):
            assert status(host) == 200, host
        for host in ("evil.example", "evil.example:8080", "localhost.evil.example", "[::2]", "",
                     "localhost:x", "127.0.0.1@evil.example"):  # fmt: skip
            for path in ("/v1/model", "/readyz", "/", "/openapi.json"):
                assert status(host, path) == 421, (host, path)
        refused = client.post("/v1/rank", json=ANN, headers={"host": "evil.example"})
        assert "--allowed-host" in refused.json()["detail"]
        assert refused.headers["x-content-type-options"] == "nosniff"
        metrics = client.get("/metrics", headers={"host": "localhost"}).text
    assert 'refused_total{reason="host"} 29.0' in metrics


# Limits.
def test_readiness_and_metrics_are_limited_apart_from_the_api() -> None:
    with TestClient(stand_in_app(rate_limit="2/minute")) as client:

        def statuses(path: str) -> list[int]:
            return [client.get(path).status_code for _ in range(3)]

        assert statuses("/v1/model") == [200, 200, 429]
        # A flood of requests does not make it look as if it were not ready.
        assert [client.get(path).status_code for path in ("/readyz", "/metrics")] == [200, 200]
        assert statuses("/readyz") == [429] * 3
        assert statuses("/metrics") == [429] * 3
        assert statuses("/healthz") == [200] * 3


def test_a_rate_is_per_key_and_address(tmp_path: Path, secrets: dict[str, str]) -> None:
    app = stand_in_app(keys=ApiKeys(tmp_path / "keys.toml"), rate_limit="2/minute")
    with TestClient(app) as client:

        def statuses(headers: dict[str, str]) -> list[int]:
            answers = [client.get("/v1/model", headers=headers) for _ in range(3)]
            assert all(
                1 <= int(one.headers["retry-after"]) <= 60
                for one in answers
                if one.status_code == 429
            )
            return [one.status_code for one in answers]

        assert statuses(bearer(secrets["reader"])) == [200, 200, 429]
        assert statuses(bearer(secrets["both"])) == [200, 200, 429]
        # Whoever guesses is counted by address, whatever the guess.
        guesses = [client.get("/v1/model", headers=bearer(f"lt_{n}")) for n in range(3)]
        assert [one.status_code for one in guesses] == [401, 401, 429]
        assert client.get("/healthz").status_code == 200


def test_the_window_moves() -> None:
    limit = RateLimit("1/second")
    assert limit.wait_s("ann") == 0
    assert limit.wait_s("ann") == 1
    assert limit.wait_s("bob") == 0
    time.sleep(1.05)
    assert limit.wait_s("ann") == 0


@pytest.mark.parametrize("rate", ["often", "0/second", "-1/minute", ""])
def test_a_rate_that_is_none_is_one_sentence(rate: str) -> None:
    with pytest.raises(LongtrailError, match="rate limit"):
        RateLimit(rate)


def test_a_body_that_is_too_large() -> None:
    with TestClient(stand_in_app(max_body_bytes=100)) as client:
        body = json.dumps(ANN | {"candidates": ["x" * 100]}).encode()
        json_type = {"content-type": "application/json"}
        said = client.post("/v1/rank", content=body, headers=json_type)
        chunks = (body[at : at + 10] for at in range(0, len(body), 10))
        unsaid = client.post("/v1/rank", content=chunks, headers=json_type)
        for answer in (said, unsaid):
            assert answer.status_code == 413
            assert answer.json() == {"detail": "a body has at most 100 bytes: send less at once"}
        assert client.post("/v1/rank", json=ANN).status_code == 200
        assert 'refused_total{reason="body"} 2.0' in client.get("/metrics").text


# Headers.
def test_headers_that_make_answers_safe(client: TestClient, secrets: dict[str, str]) -> None:
    headers = bearer(secrets["both"])
    for answer in (
        client.get("/v1/model", headers=headers),
        client.get("/v1/model"),
        client.get("/v1/nothing", headers=headers),
        client.post("/v1/rank", json={}, headers=headers),
        client.get("/"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        is_page = answer.headers["content-type"].startswith("text/html")
        assert answer.headers["cache-control"] == ("no-cache" if is_page else "no-store")
        assert "server" not in answer.headers


def test_request_ids_are_taken_over_or_made(client: TestClient) -> None:
    def id_of(sent: str) -> str:
        return str(client.get("/healthz", headers={"x-request-id": sent}).headers["x-request-id"])

    assert id_of("order-581587/1") == "order-581587/1"
    for bad in ("a b", "x" * 129, 'a"b', "a\tb"):
        made = id_of(bad)
        assert len(made) == 32
        assert made != bad
    assert id_of("") != id_of("")


def test_other_origins_may_not_ask_unless_they_are_named(
    client: TestClient, tmp_path: Path, secrets: dict[str, str]
) -> None:
    shop = {"origin": "https://shop.example"}
    preflight = {**shop, "access-control-request-method": "POST"}
    assert client.options("/v1/rank", headers=preflight).status_code == 401
    origin = "access-control-allow-origin"
    assert origin not in client.get("/healthz", headers=shop).headers

    app = stand_in_app(keys=ApiKeys(tmp_path / "keys.toml"), cors_origins=("https://shop.example",))
    with TestClient(app) as named:
        allowed = named.options("/v1/rank", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers[origin] == "https://shop.example"
        other = {"origin": "https://other.example"}
        assert origin not in named.get("/healthz", headers=other).headers
        assert named.post("/v1/rank", json=ANN, headers=shop).status_code == 401
