"""A full disk under the home: one sentence, nothing corrupt, done when there is room again.

See :mod:`tests.faults.test_server_disks` for those under the servers.
"""

from collections.abc import Iterator

import pytest

from tests.faults.commands import Stop
from tests.faults.small_disk import SmallDisk, small_disk
from tests.faults.world import TRAIN, World, differences, stops

pytestmark = pytest.mark.timeout(900)  # with the world's own setup, on a busy machine

ROOM = 8192
"""Bytes that are left: too few for what any step writes, enough for its locks."""


@pytest.fixture(scope="module")
def disk(world: World) -> Iterator[SmallDisk]:
    with small_disk(64 * 2**20) as made:
        yield made


@pytest.mark.parametrize("step", ["ingest", "encode", "sequences", "materialize"])
def test_a_step_on_a_full_disk(world: World, disk: SmallDisk, step: str) -> None:
    before = world.before(step)
    with world.stage(before, disk=disk.folder) as stage:
        done = disk.run(stage, world.steps[step], room=ROOM)
        assert "a disk is full" in done.sentence
        if step != "materialize":  # rows that were copied stay
            found = stage.contents()
            kept = {name: found.get(name) for name in world.expected(before)}
            assert differences(kept, world.expected(before)) == []
        assert stage.run(world.steps[step]).code == 0
        assert differences(stage.contents(), world.expected(step)) == []


def test_training_is_killed_twice_and_then_has_no_room(world: World, disk: SmallDisk) -> None:
    """Each run goes on where the one before was, and the last has the same weights and metrics."""
    third = world.snapshots["train"].events["change"] // 3
    late, early = stops("train", {"change": third}, ["change"], 2)
    with world.stage("materialize", disk=disk.folder) as stage:
        # Behind the first checkpoint, then before that of the second run: some is left to do.
        for stop in (Stop("change", third + late.number), early):
            command = stage.start(TRAIN, stop=stop)
            command.wait_for_stop()
            command.kill()
            assert command.end().code == -9
        assert "a disk is full" in disk.run(stage, TRAIN, room=ROOM).sentence
        assert stage.run(TRAIN).result["resumed"]
        found = stage.contents()
        assert found.keys() >= {"metrics", "weights"}
        assert differences(found, world.expected("train")) == []
