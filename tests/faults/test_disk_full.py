"""A full disk under the home: one sentence, nothing corrupt, done when there is room again.

The disk is a small tmpfs; where this process may not mount one, the size of a file is limited for
the command, which its writes meet as the same kind of error.
"""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.commands import Done, Stop
from tests.faults.world import TRAIN, Stage, World, differences, stops
from tests.servers import scratch_folder

pytestmark = pytest.mark.timeout(900)  # with the world's own setup, on a busy machine

SIZE = 64 * 2**20
ROOM = 8192
"""Bytes that are left: too few for what any step writes, enough for its locks."""


@dataclass(frozen=True)
class SmallDisk:
    """A folder whose disk can be filled."""

    folder: Path
    mounted: bool

    def run(self, stage: Stage, arguments: list[str], *, room: int) -> Done:
        """Run a command with room for so many bytes."""
        if not self.mounted:
            return stage.run(arguments, file_size=room)
        ballast = self.folder / "ballast"
        size = shutil.disk_usage(self.folder).free - room
        with ballast.open("wb") as file:
            file.write(bytes(size))
        try:
            return stage.run(arguments)
        finally:
            ballast.unlink()


@pytest.fixture(scope="module")
def disk(world: World) -> Iterator[SmallDisk]:
    folder = scratch_folder()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=711", "tmpfs", str(folder)]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    yield SmallDisk(folder, mounted)
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


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
