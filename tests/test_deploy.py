"""What of deploy/ can be checked without Docker, systemd, Prometheus and Grafana."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from configparser import RawConfigParser
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from feature_repo.connections import DatabaseAddress, RedisAddress
from feature_repo.home import HOME_VARIABLE, PROJECT_ROOT, Home
from feature_repo.parity_series import METRICS_FILE, ParityRun, ServedCounts, ViewCounts, record_run
from longtrail import main
from serving.metrics import Metrics

DEPLOY = PROJECT_ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
UNITS = sorted((DEPLOY / "systemd").iterdir())
VARIABLES = {
    "POSTGRES_PASSWORD": "pa55",
    "REDIS_PASSWORD": "pa66",
    "GRAFANA_PASSWORD": "pa77",
}
_METRIC = re.compile(r"\blongtrail_[a-z0-9_]+")
_LABELS = re.compile(r"\bby \(([^)]*)\)|\{([^}]*)\}")
_BUILT_IN_LABELS = {"le", "job"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def substituted(text: str) -> str:
    """What compose makes of ${NAME}, ${NAME:-default} and ${NAME:?why}."""

    def value(found: re.Match[str]) -> str:
        name, operator, rest = found.groups()
        if operator == ":?":
            return VARIABLES[name]
        return VARIABLES.get(name, rest if operator == ":-" else "")

    return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, text)


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load(substituted((DEPLOY / "compose.yaml").read_text(encoding="utf-8")))


def check_command(words: list[str]) -> None:
    """Parse a longtrail command line as the command line itself does, and run nothing."""
    command: click.Command = main
    context = main.make_context("longtrail", list(words))
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert found is not None, words
        command = found
        context = command.make_context(name, rest, parent=context)


# Containers.
def test_compose_has_the_services(compose: Any) -> None:
    assert set(compose["services"]) == {
        "serve", "nightly", "postgres", "redis", "prometheus", "node-exporter", "grafana",
    }  # fmt: skip
    for name, service in compose["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), (name, port)
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source.startswith("./logs") or source in compose["volumes"] or (
                DEPLOY / source
            ).exists(), volume  # fmt: skip
    assert compose["services"]["nightly"]["profiles"] == ["jobs"]


@pytest.mark.parametrize("service", ["serve", "nightly"])
def test_compose_gives_addresses_that_are_understood(compose: Any, service: str) -> None:
    environment = compose["services"][service]["environment"]
    database = DatabaseAddress.parse(environment["DATABASE_URL"])
    cache = RedisAddress.parse(environment["REDIS_URL"])
    services = compose["services"]
    assert {database.host, cache.hosts[0][0]} <= set(services)
    assert database.password == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert database.name == services["postgres"]["environment"]["POSTGRES_DB"]
    words = services["redis"]["command"]
    assert cache.password == words[words.index("--requirepass") + 1]
    assert HOME_VARIABLE in environment
    known = {"DATABASE_URL", "REDIS_URL", *variables_in_use()}
    assert set(environment) <= known, set(environment) - known


def variables_in_use() -> set[str]:
    """LONGTRAIL_ variables that code or the nightly script read."""
    files = [PROJECT_ROOT / "longtrail.py", DEPLOY / "nightly.sh"]
    for folder in ("feature_repo", "encoders", "training", "serving"):
        files += (PROJECT_ROOT / folder).rglob("*.py")
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return set(re.findall(r"\bLONGTRAIL_[A-Z_]+\b", text))


def test_compose_starts_commands_that_there_are(compose: Any) -> None:
    check_command(compose["services"]["serve"]["command"])
    (script,) = compose["services"]["nightly"]["entrypoint"]
    assert (PROJECT_ROOT / Path(script).relative_to("/app")).exists()


def test_redis_forgets_nothing_and_evicts_nobody(compose: Any) -> None:
    words = compose["services"]["redis"]["command"]
    settings = dict(zip(words[1::2], words[2::2], strict=True))
    assert settings["--appendonly"] == "yes"
    assert settings["--maxmemory-policy"] == "noeviction"


def test_the_example_of_variables_names_all_that_are_needed() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    needed = set(re.findall(r"\$\{(\w+):\?", text))
    example = (DEPLOY / "env.example").read_text(encoding="utf-8")
    assert needed == set(VARIABLES)
    assert needed <= set(re.findall(r"^(\w+)=$", example, re.MULTILINE))


def instructions() -> Iterator[tuple[str, list[str]]]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            yield word, json.loads(rest) if rest.startswith("[") else rest.split()


def test_the_image_copies_what_exists_and_may_be_copied() -> None:
    allowed = {
        line[1:]
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    sources = [s for word, rest in instructions() if word == "COPY" for s in rest[:-1]]
    assert set(sources) == allowed
    for source in sources:
        assert (PROJECT_ROOT / source).exists(), source
    packages = {"feature_repo", "encoders", "training", "serving"}
    assert packages <= set(sources)


def test_the_image_runs_without_privileges_what_there_is() -> None:
    found = dict(instructions())
    assert found["USER"] == ["longtrail"]
    assert found["ENTRYPOINT"] == ["longtrail"]
    check_command(found["CMD"])
    assert "/healthz" in " ".join(found["HEALTHCHECK"])


# The nightly run.
def nightly_commands() -> list[list[str]]:
    """Its longtrail commands, in order, with what the shell would put in."""
    text = (DEPLOY / "nightly.sh").read_text(encoding="utf-8")
    commands = []
    for line in text.splitlines():
        line = re.sub(r'"\$\(date [^)]*\)"', "2024-06-01", line.strip())
        line = line.replace('"$LONGTRAIL_DATASET"', "shop.toml")
        line = re.sub(r"\$\{LONGTRAIL_ENCODE_OPTIONS:-\}", "--model models/tuned", line)
        if line.startswith("longtrail "):
            commands.append(shlex.split(line.split(" || ")[0], comments=True)[1:])
    return commands


def test_the_nightly_run_takes_the_steps_in_order() -> None:
    commands = nightly_commands()
    assert [words[0] for words in commands] == [
        "ingest", "encode", "sequences", "apply", "export", "apply", "materialize",
        "parity", "parity", "drift",
    ]  # fmt: skip
    for words in commands:
        check_command(words)


@pytest.mark.parametrize(
    ("broken", "code", "last"),
    [("", 0, "drift"), ("sequences", 7, "sequences"), ("parity", 1, "drift")],
)
def test_a_failed_step_ends_the_night_and_a_finding_fails_it(
    tmp_path: Path, broken: str, code: int, last: str
) -> None:
    """The script itself, over a `longtrail` that only writes down how it was called."""
    stand_in = tmp_path / "longtrail"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" != "{broken}" ] || exit 7\n'
    )
    stand_in.chmod(0o755)
    (tmp_path / "served").mkdir()
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "LONGTRAIL_DATASET": "my shop.toml",
        "LONGTRAIL_ENCODE_OPTIONS": "--split-layer 2",
        "LONGTRAIL_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [DEPLOY / "nightly.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "ingest my shop.toml"
    assert calls[1] == "encode --split-layer 2"
    assert calls[-1].split()[0] == last
    yesterday = re.compile(r"parity --served --join fast --since \d{4}-\d\d-\d\d")
    assert any(map(yesterday.fullmatch, calls)) == (last == "drift")


def test_the_nightly_run_wants_a_data_set() -> None:
    done = subprocess.run(
        [DEPLOY / "nightly.sh"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "LONGTRAIL_DATASET: set it to the data set file" in done.stderr


# systemd.
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_start_what_there_is(path: Path) -> None:
    unit = RawConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # names are case-sensitive
    unit.read(path, encoding="utf-8")
    if path.suffix == ".timer":
        assert (path.parent / f"{path.stem}.service").exists()
        assert unit["Timer"]["OnCalendar"]
        return
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    if program.endswith("/longtrail"):
        check_command(words)
    else:
        assert (PROJECT_ROOT / Path(program).relative_to("/opt/longtrail")).exists()
    assert unit["Service"]["User"] != "root"


# Prometheus and Grafana.
@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Sample -> its labels: of the service, and of what the nightly run leaves."""
    found: dict[str, set[str]] = {}
    service = Metrics()
    labels = {
        value._name: set(value._labelnames)
        for value in vars(service).values()
        if hasattr(value, "_labelnames")
    }
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    for family in service.registry.collect():
        for ending in endings[family.type]:
            found[family.name + ending] = labels[family.name]
    home = Home(tmp_path_factory.mktemp("home"))
    counts = ViewCounts(num_keys=1, values=1, mismatches=0, missing_offline=0, missing_online=0)
    served = ServedCounts(requests=1, degraded=0, without_model=0, max_score_difference=0.0)
    for of_served in (None, served):
        run = ParityRun(
            time=datetime(2024, 6, 1, tzinfo=UTC), profile="production", sample=1, join="fast",
            views={"items": counts}, seconds=1.0, served=of_served,
        )  # fmt: skip
        record_run(home, run)
    text = (home.metrics / METRICS_FILE).read_text(encoding="utf-8")
    for family in text_string_to_metric_families(text):
        found |= {sample.name: set(sample.labels) for sample in family.samples}
    return found


def expressions() -> list[tuple[str, str]]:
    rules = load(DEPLOY / "alerts.yml")["groups"]
    found = [(rule["alert"], rule["expr"]) for group in rules for rule in group["rules"]]
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            found += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    return found


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_rules_and_panels_ask_for_metrics_that_there_are(
    metrics: dict[str, set[str]], title: str, expression: str
) -> None:
    names = set(_METRIC.findall(re.sub(r'"[^"]*"', "", expression)))
    assert names <= set(metrics), (title, names - set(metrics))
    known = {label for name in names for label in metrics[name]} | _BUILT_IN_LABELS
    for groups, selector in _LABELS.findall(expression):
        asked = {part.strip() for part in groups.split(",")} if groups else set()
        asked |= {re.split(r"[=!~]", part)[0].strip() for part in selector.split(",") if part}
        assert asked <= known, (title, asked - known)
    assert expression.count("(") == expression.count(")")


def test_every_metric_of_the_service_is_on_the_dashboard(metrics: dict[str, set[str]]) -> None:
    text = " ".join(expression for _, expression in expressions())
    shown = set(_METRIC.findall(text))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in metrics}
    missing = {
        name
        for name in families
        if "parity" not in name and not any(one.startswith(name) for one in shown)
    }
    assert missing == set()


def test_dashboards_use_the_data_source_that_is_provisioned() -> None:
    (source,) = load(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert DASHBOARDS
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
        assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_prometheus_asks_the_services_of_the_compose_file(compose: Any) -> None:
    configuration = load(DEPLOY / "prometheus.yml")
    for file in configuration["rule_files"]:
        assert (DEPLOY / file).exists()
    for job in configuration["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            assert target.split(":")[0] in compose["services"]
    jobs = {job["job_name"] for job in configuration["scrape_configs"]}
    text = (DEPLOY / "alerts.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'job="([^"]+)"', text)) <= jobs


# docs/serving.md.
def test_the_documentation_names_every_option_address_and_metric(
    metrics: dict[str, set[str]],
) -> None:
    text = (PROJECT_ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--[a-z-]+", text))
    for option in main.commands["serve"].params:
        assert named & {*option.opts, *option.secondary_opts}, option.name
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in metrics}
    of_service = {name for name in families if "parity" not in name}
    assert of_service <= set(_METRIC.findall(text))
    for file in DEPLOY.iterdir():
        assert file.name.removesuffix(".dockerignore") in text, file
