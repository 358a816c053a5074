import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.loaded_artifact import load_artifact
from feature_repo.artifact import current_run, load_run_manifest
from feature_repo.errors import ArtifactError, MissingStepError
from tests.serving.conftest import (
    EVIDENCE,
    RUN,
    ToyModel,
    World,
    export_program,
    rewritten,
    toy_manifest,
    toy_table,
    write_run,
)


def refused(world: World, run: str = RUN) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_artifact(world.home, run)
    return str(caught.value)


def test_loads_a_run_and_scores_any_sizes(world: World) -> None:
    artifact = load_artifact(world.home, current_run(world.home))
    assert artifact.manifest == toy_manifest()
    for b, c, v in ((1, 1, 2), (2, 9, 30)):
        sequence = torch.zeros((b, 2, 4), dtype=torch.int64)
        integers = torch.zeros((b, c), dtype=torch.int64)
        inputs = (
            torch.zeros(v, 4),
            sequence,
            sequence,
            torch.zeros(b, 2, 4),
            torch.zeros(b, 2),
            torch.zeros(b, 1),
            integers,
            integers + 1,
            torch.zeros(b, c, 2),
            integers[..., None],
            torch.zeros(b, c, 1),
            torch.zeros(b, c, len(EVIDENCE)),
        )
        with torch.inference_mode():
            assert torch.equal(artifact.score(*inputs), torch.full((b, c), -1.0))


def test_no_run_at_all(world: World) -> None:
    shutil.rmtree(world.home.runs)
    with pytest.raises(MissingStepError, match=r"run `longtrail train` first"):
        current_run(world.home)


@pytest.mark.parametrize("run", ["other", "../runs/toy-run", ".", ""])
def test_missing_folder_names_the_runs(world: World, run: str) -> None:
    assert refused(world, run) == (
        f"there is no run {run!r} in {world.home.runs}; there are: {RUN}"
    )


def test_missing_folder_without_any_run(world: World) -> None:
    (world.folder / "manifest.json").unlink()
    assert refused(world, "other").endswith("run `longtrail train` first")


@pytest.mark.parametrize("name", ["manifest.json", "score.pt2"])
def test_missing_file(world: World, name: str) -> None:
    (world.folder / name).unlink()
    assert refused(world) == (
        f"{world.folder} has no {name}: the run is incomplete; run `longtrail train` again"
    )


def changed_manifest(world: World, change: Callable[[dict[str, Any]], object]) -> None:
    path = world.folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_unknown_format(world: World) -> None:
    changed_manifest(world, lambda document: document.update(format=2, new="field"))
    assert "has format 2, this version reads format 1: run `longtrail train` again" in refused(
        world
    )


def test_manifest_is_no_json(world: World) -> None:
    (world.folder / "manifest.json").write_text("{")
    assert "is not JSON (" in refused(world)


def test_manifest_misses_a_field(world: World) -> None:
    changed_manifest(world, lambda document: document.pop("scenes"))
    assert "is not the manifest of a model (scenes: Field required)" in refused(world)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_program_is_no_archive(world: World, content: bytes) -> None:
    (world.folder / "score.pt2").write_bytes(content)
    assert f"{world.folder / 'score.pt2'} is not a readable archive" in refused(world)


def test_program_is_cut_off(world: World) -> None:
    (world.folder / "score.pt2").write_bytes(world.program[: len(world.program) // 2])
    assert "is not a readable archive" in refused(world)


def test_program_is_damaged(world: World) -> None:
    place = world.program.index(b'"graph_module"')
    damaged = world.program[:place] + b"'" + world.program[place + 1 :]
    (world.folder / "score.pt2").write_bytes(damaged)
    assert "models/model.json is damaged" in refused(world)


def test_program_that_pytorch_cannot_load(world: World) -> None:
    archive = rewritten(
        world.program, lambda name, data: b"{}" if name.endswith("model.json") else data
    )
    (world.folder / "score.pt2").write_bytes(archive)
    assert f"is not a program that PyTorch {torch.__version__} can load (" in refused(world)


def test_example_inputs_are_refused(world: World) -> None:
    (world.folder / "score.pt2").write_bytes(export_program(ToyModel(), keep_examples=True))
    assert "data/sample_inputs/model.pt, which would be unpickled, and is refused" in refused(world)


class Bomb:
    """Unpickling it is what must never happen."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize(
    "member",
    [
        "data/sample_inputs/model.pt",
        "data/sample_inputs/other.pt",
        "data/weights/model.pt",  # PyTorch's older form of all weights
        "data/constants/model.pt",
        "data/constants/opaque_obj_0",
        "data/constants/custom_obj_0",
        "data/aotinductor/model/model.so",
        "serialized_state_dict.pt",
    ],
)
def test_members_that_would_be_unpickled_are_refused(world: World, member: str) -> None:
    bomb = pickle.dumps(Bomb())
    with zipfile.ZipFile(io.BytesIO(world.program)) as archive:
        root = archive.namelist()[0].partition("/")[0]
        is_there = f"{root}/{member}" in archive.namelist()
    changed = rewritten(
        world.program,
        lambda name, data: bomb if name == f"{root}/{member}" else data,
        extra={} if is_there else {f"{root}/{member}": bomb},
    )
    (world.folder / "score.pt2").write_bytes(changed)
    assert f"holds {root}/{member}, which would be unpickled, and is refused" in refused(world)


@pytest.mark.parametrize("field", ["use_pickle", "path_name", "config"])
def test_pickled_weights_are_refused(world: World, field: str) -> None:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("model_weights_config.json"):
            return data
        config = json.loads(data)
        if field == "config":
            return b"[]"
        for entry in config["config"].values():
            entry[field] = {"use_pickle": True, "path_name": "custom_obj_0"}[field]
        return json.dumps(config).encode()

    (world.folder / "score.pt2").write_bytes(rewritten(world.program, change))
    assert "holds pickled weights" in refused(world)


def test_two_members_of_one_name_are_refused(world: World) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        doubled = rewritten(world.program, lambda _, data: data, extra=first_member(world.program))
    (world.folder / "score.pt2").write_bytes(doubled)
    assert "two members of one name" in refused(world)


def first_member(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        name = opened.namelist()[0]
        return {name: opened.read(name)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sequence_length": 5}, "takes history_rows of shape"),
        ({"scenes": ("purchase",)}, "takes history_rows of shape"),
        ({"item_dense_names": ("price",)}, "takes candidate_dense of shape"),
        ({"user_dense_names": ()}, "takes user_dense of shape"),
        ({"category_vocabularies": {}}, "takes candidate_categories of shape"),
        ({"context_names": ()}, "takes context of shape"),
        ({"evidence_names": EVIDENCE[1:]}, "takes evidence of shape"),
    ],
)
def test_program_of_another_manifest(world: World, changes: dict[str, Any], sentence: str) -> None:
    write_run(world.home, world.program, toy_manifest(**changes))
    assert sentence in refused(world)


class TwoInputs(nn.Module):
    def forward(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows].sum(-1)


def test_program_of_other_inputs(world: World) -> None:
    program = torch.export.export(
        TwoInputs(), (torch.zeros(3, 4), torch.zeros((2, 2), dtype=torch.int64))
    )
    program._example_inputs = None
    torch.export.save(program, world.folder / "score.pt2")
    assert "takes 2 inputs, 12 are expected (table, history_rows," in refused(world)


def test_encoder_must_be_the_trained_one(world: World) -> None:
    artifact = load_artifact(world.home, RUN)
    artifact.check_table(toy_table())
    with pytest.raises(ArtifactError) as caught:
        artifact.check_table(toy_table("other-encoder"))
    assert str(caught.value) == (
        "run toy-run was trained on vectors of encoder toy-encoder, but the embedding table holds "
        "those of encoder other-encoder: run `longtrail train` again, or `longtrail encode` with "
        "the encoder of the run"
    )
    with pytest.raises(ArtifactError, match="reads vectors of 4 numbers, but those of the embed"):
        artifact.check_table(toy_table(width=5))


def test_a_copy_under_another_name_is_refused(world: World) -> None:
    shutil.copytree(world.folder, world.home.runs / "copy")
    with pytest.raises(ArtifactError, match="holds the run 'toy-run', expected one of the folder"):
        load_artifact(world.home, "copy")
    with pytest.raises(ArtifactError, match="holds the run 'toy-run'"):
        load_run_manifest(world.home, "copy")


def test_without_a_current_run_the_sentence_names_those_that_there_are(world: World) -> None:
    (world.home.runs / "current.json").unlink()
    with pytest.raises(MissingStepError, match=r"`longtrail promote RUN`.* are: toy-run"):
        current_run(world.home)
