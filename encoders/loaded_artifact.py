"""A trained model's folder, opened to score with: checked first, then loaded, never unpickled.

The exported program is code that PyTorch runs, so open only artifacts whose origin is known. What
is refused here is every archive member that PyTorch would hand to ``pickle``: data would become
code while it is being read.
"""

import io
import json
import logging
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.export import ExportedProgram

from encoders.table import EmbeddingTable
from feature_repo.artifact import (
    HEAD_FILE,
    ITEM_FILE,
    MANIFEST_FILE,
    PROGRAM_FILE,
    PROGRAM_INPUTS,
    USER_FILE,
    ArtifactManifest,
    ProgramParts,
    check_run_folder,
    finished_runs,
)
from feature_repo.errors import ArtifactError
from feature_repo.home import Home

FORMAT = 1
"""The artifact format that this version reads (``ArtifactManifest.format``)."""

# Members of an archive of torch.export (PyTorch 2.8 to 2.13) that are read as JSON, text or raw
# tensor bytes, below the archive's root folder. torch.export.load unpickles every other kind.
_PLAIN_MEMBERS = re.compile(
    r"models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
    r"|\.format_version|\.storage_alignment"
)
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_PAYLOADS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The program in three; see :class:`feature_repo.artifact.ProgramParts`.

    Args:
        form: Sizes, and what the users' outputs depend on.
        users: table, history_rows, history_ages -> deep outputs [B, S, Q].
        items: table, candidate_rows [R] -> deep outputs [R, Q].
        head: Both, then tensors in the order of ``PROGRAM_INPUTS`` -> logits [B, C].
    """

    form: ProgramParts
    users: Callable[..., Tensor]
    items: Callable[..., Tensor]
    head: Callable[..., Tensor]

    def score(self, *inputs: Tensor) -> Tensor:
        """One after another: tensors in the order of ``PROGRAM_INPUTS`` -> logits [B, C]."""
        by_name = dict(zip(PROGRAM_INPUTS, inputs, strict=True))
        table, rows = by_name["table"], by_name["candidate_rows"]
        users = self.users(table, by_name["history_rows"], by_name["history_ages"])
        items = self.items(table, rows.flatten()).reshape(*rows.shape, -1)
        return self.head(users, items, *inputs)


@dataclass(frozen=True)
class Artifact:
    """A loaded model.

    Args:
        manifest: What the model is and what it reads.
        score: The program: tensors in the order of ``PROGRAM_INPUTS`` -> logits [B, C].
        parts: What it is made of; None where it is one program.
    """

    manifest: ArtifactManifest
    score: Callable[..., Tensor]
    parts: Parts | None = None

    def check_table(self, table: EmbeddingTable) -> None:
        """Make sure that the vectors are those that the weights were trained on.

        Raises:
            ArtifactError: If the encoder differs.
        """
        expected, found = self.manifest.encoder_fingerprint, table.fingerprint
        if expected != found:
            raise ArtifactError(
                f"run {self.manifest.run} was trained on vectors of encoder {expected}, but the "
                f"embedding table holds those of encoder {found}: run `longtrail train` again, or "
                "`longtrail encode` with the encoder of the run"
            )
        if self.manifest.encoder_width != table.width:
            raise ArtifactError(
                f"run {self.manifest.run} reads vectors of {self.manifest.encoder_width} numbers, "
                f"but those of the embedding table have {table.width}: run `longtrail train` again"
            )


def load_artifact(home: Home, run: str) -> Artifact:
    """Open ``home.runs/<run>``.

    Args:
        home: Where the runs are.
        run: Name of the run's folder.

    Raises:
        ArtifactError: If the folder or a file is missing, is of an unknown format, is broken,
            carries pickled data or does not do what its manifest says.
    """
    folder = home.runs / run
    if not run or Path(run).name != run or not folder.is_dir():
        runs = finished_runs(home)
        raise ArtifactError(
            f"there is no run {run!r} in {home.runs}; "
            + (f"there are: {', '.join(runs)}" if runs else "run `longtrail train` first")
        )
    manifest = _read_manifest(folder / MANIFEST_FILE)
    check_run_folder(folder, manifest)
    artifact = open_programs(folder, manifest)
    _log.info("loaded run %s from %s", manifest.run, folder)
    return artifact


def open_programs(folder: Path, manifest: ArtifactManifest) -> Artifact:
    """The programs in a folder.

    Args:
        folder: Where they lie.
        manifest: What it must say of them; it need not be there yet.

    Raises:
        ArtifactError: If one is missing, is broken, carries pickled data or is another model's.
    """
    if manifest.parts is None:
        return Artifact(manifest, _load_program(folder / PROGRAM_FILE, _input_shapes(manifest)))
    parts = _load_parts(folder, manifest, manifest.parts)
    return Artifact(manifest, parts.score, parts)


_Shape = tuple[int | None, ...]
"""None = any size."""


def _load_parts(folder: Path, manifest: ArtifactManifest, form: ProgramParts) -> Parts:
    shapes = _input_shapes(manifest)
    users: _Shape = (None, len(manifest.scenes), form.output_width)
    items: _Shape = (None, None, form.output_width)
    of_users = {name: shapes[name] for name in ("table", "history_rows", "history_ages")}
    of_items: dict[str, _Shape] = {"table": shapes["table"], "candidate_rows": (None,)}
    of_head = {"user_outputs": users, "item_outputs": items, **shapes}
    return Parts(
        form=form,
        users=_load_program(folder / USER_FILE, of_users),
        items=_load_program(folder / ITEM_FILE, of_items),
        head=_load_program(folder / HEAD_FILE, of_head),
    )


def _load_program(path: Path, shapes: dict[str, _Shape]) -> Callable[..., Tensor]:
    program = read_program(path)
    _check_signature(program, shapes, path)
    module = program.module()
    # The sizes of every call follow from the manifest, which was just compared; checking them again
    # symbolically in each call took 11 ms where a small model took 15.
    module.validate_inputs = False  # type: ignore[assignment]  # declared as Tensor | Module
    return module


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path.parent} has no {path.name}: the run is incomplete; run `longtrail train` again"
        ) from error


def _read_manifest(path: Path) -> ArtifactManifest:
    content = _read_bytes(path)
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}): run `longtrail train` again") from error
    if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
        raise ArtifactError(
            f"{path} has format {found['format']!r}, this version reads format {FORMAT}: "
            "run `longtrail train` again, or use the version that wrote it"
        )
    try:
        return ArtifactManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise ArtifactError(
            f"{path} is not the manifest of a model ({place}: {first['msg']}): "
            "run `longtrail train` again"
        ) from error


def read_program(path: Path) -> ExportedProgram:
    """One exported program.

    Raises:
        ArtifactError: If the file is missing, is broken or carries pickled data.
    """
    # One read into memory: what was checked is what is loaded.
    content = _read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"{broken} is damaged")
            _refuse_pickles(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ArtifactError(
            f"{path} is not a readable archive ({error}): run `longtrail train` again"
        ) from error
    try:
        return torch.export.load(io.BytesIO(content))
    # PyTorch names no exception of its own: a JSON that does not fit its schema, an operator or a
    # weight that is not there come as whatever its parser happened to raise.
    except Exception as error:
        raise ArtifactError(
            f"{path} is not a program that PyTorch {torch.__version__} can load "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'})"
            ": run `longtrail train` again"
        ) from error


def _refuse_pickles(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise unless every member is read by PyTorch as JSON, text or raw tensor bytes."""
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise ArtifactError(f"{path} holds two members of one name and is refused")
    for info in archive.infolist():
        _, _, name = info.filename.partition("/")
        if name == _SAMPLE_INPUTS and info.file_size == 0:
            continue  # torch.export.save writes the member even where there are no inputs
        if not _PLAIN_MEMBERS.fullmatch(name):
            raise ArtifactError(
                f"{path} holds {info.filename}, which would be unpickled, and is refused: export "
                "the program without example inputs (`longtrail train` does)"
            )
        if name in _PAYLOADS and _names_pickles(archive.read(info)):
            raise ArtifactError(
                f"{path} holds pickled weights ({info.filename} says use_pickle) and is refused: "
                "run `longtrail train` again"
            )


def _names_pickles(config: bytes) -> bool:
    """Whether a payload config has an entry that is not raw tensor bytes; broken ones count."""
    try:
        entries = json.loads(config)["config"].values()
        return any(
            entry["use_pickle"] is not False
            or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"])
            for entry in entries
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


def _input_shapes(manifest: ArtifactManifest) -> dict[str, _Shape]:
    """Shapes of the program's inputs, in their order."""
    num_scenes, num_categories = len(manifest.scenes), len(manifest.category_vocabularies)
    shapes: dict[str, _Shape] = {
        "table": (None, manifest.encoder_width),
        "history_rows": (None, num_scenes, manifest.sequence_length),
        "history_item_keys": (None, num_scenes, manifest.sequence_length),
        "history_ages": (None, num_scenes, manifest.sequence_length),
        "history_totals": (None, num_scenes),
        "user_dense": (None, len(manifest.user_dense_names)),
        "candidate_rows": (None, None),
        "candidate_item_keys": (None, None),
        "candidate_dense": (None, None, len(manifest.item_dense_names)),
        "candidate_categories": (None, None, num_categories),
        "context": (None, None, len(manifest.context_names)),
        "evidence": (None, None, len(manifest.evidence_names)),
    }
    return {name: shapes[name] for name in PROGRAM_INPUTS}


def _check_signature(program: ExportedProgram, expected: dict[str, _Shape], path: Path) -> None:
    """Compare the inputs with the manifest, so that a mix-up is found before a request."""
    names = program.graph_signature.user_inputs
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    if len(names) != len(expected):
        raise ArtifactError(
            f"the program {path} takes {len(names)} inputs, {len(expected)} are expected "
            f"({', '.join(expected)}): run `longtrail train` again"
        )
    for (what, shape_expected), name in zip(expected.items(), names, strict=True):
        shape = placeholders[str(name)].meta["val"].shape
        # A symbolic size is a dynamic one and fits everything.
        if len(shape) != len(shape_expected) or any(
            want is not None and isinstance(size, int) and size != want
            for size, want in zip(shape, shape_expected, strict=True)
        ):
            raise ArtifactError(
                f"the program {path} takes {what} of shape {list(shape)}, its manifest says "
                f"{['any' if want is None else want for want in shape_expected]}: the two files "
                "are not of one run; run `longtrail train` again"
            )
