"""SIGKILL of every step and of the servers, at seeded random events of their work: 21 points.

After a restart and the same command again the stores hold what an undisturbed run leaves. Training
is killed in :mod:`tests.faults.test_disk_full`.
"""

import pytest

from tests.faults.commands import Stop
from tests.faults.world import COUNTED, World, differences, kill, stops

pytestmark = pytest.mark.timeout(900)  # with the world's own setup, on a busy machine

POINTS = {"ingest": 3, "encode": 3, "sequences": 3, "apply": 1, "materialize": 3}
"""Step -> how often it is killed."""


@pytest.mark.parametrize(
    ("step", "place"), [(step, place) for step, num in POINTS.items() for place in range(num)]
)
def test_a_killed_step_run_again_leaves_what_an_undisturbed_one_does(
    world: World, step: str, place: int
) -> None:
    points = stops(step, world.snapshots[step].events, COUNTED[step], POINTS[step])
    with world.stage(world.before(step)) as stage:
        command = stage.start(world.steps[step], stop=points[place])
        command.wait_for_stop()
        command.kill()
        assert command.end().code == -9
        assert stage.run(world.steps[step]).code == 0
        assert differences(stage.contents(), world.expected(step)) == []


@pytest.fixture(scope="module")
def load_calls(world: World) -> int:
    """Calls of a load of all tables by `sequences`, which has nothing else to do here."""
    with world.stage("sequences", tables_after="nothing") as stage:
        done = stage.start(world.steps["sequences"], counted=["call"]).end()
        assert differences(stage.contents(), world.expected("sequences")) == []
    assert done.result["loaded"]["user_sequences"] > 0
    return done.events["call"]


@pytest.mark.parametrize("place", range(4))
def test_a_killed_load_or_its_killed_server_loses_nothing(
    world: World, load_calls: int, place: int
) -> None:
    # Before its second half it compares the home with what is built.
    (half,) = stops(f"load {place}", {"call": load_calls // 2}, ["call"], 1)
    stop = Stop("call", load_calls // 2 + half.number)
    with world.stage("sequences", tables_after="nothing") as stage:
        command = stage.start(world.steps["sequences"], stop=stop)
        command.wait_for_stop()
        if place % 2:
            kill(world.servers.postgres)
            world.servers.postgres.start()
            command.go_on()
            done = command.end()
            assert done.code == 0 or "nothing is lost" in done.sentence
        else:
            command.kill()
            assert command.end().code == -9
        assert stage.run(world.steps["sequences"]).code == 0
        assert differences(stage.contents(), world.expected("sequences")) == []


@pytest.mark.parametrize("name", ["redis 1", "redis 2", "redis 3", "postgres 1"])
def test_a_server_killed_while_rows_are_copied_online(world: World, name: str) -> None:
    servers = world.servers
    server = servers.redis if name.startswith("redis") else servers.postgres
    events = world.snapshots["materialize"].events
    (stop,) = stops(f"materialize {name}", events, ["call"], 1)
    with world.stage("apply") as stage:
        command = stage.start(world.steps["materialize"], stop=stop)
        command.wait_for_stop()
        kill(server)
        if server is servers.postgres:
            server.start()
        command.go_on()
        done = command.end()
        if server is servers.redis:
            assert "Redis at 127.0.0.1" in done.sentence
            server.start()
        else:
            assert done.code == 0 or "PostgreSQL" in done.sentence
        assert stage.run(world.steps["materialize"]).code == 0
        assert differences(stage.contents(), world.expected("materialize")) == []
