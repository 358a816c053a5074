"""Training curves in TensorBoard or MLflow, both optional extras.

TensorBoard's event files lie in ``HOME/tracking/<run>``; MLflow writes to ``MLFLOW_TRACKING_URI``
or, where that is not set, to the SQLite file ``HOME/tracking/mlflow.db``. A run that goes on after
a kill goes on in its curves, too.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from feature_repo.errors import LongtrailError
from feature_repo.home import Home

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from torch.utils.tensorboard import SummaryWriter

TRACKERS = ("tensorboard", "mlflow")
EXPERIMENT = "longtrail"
"""MLflow's experiment: one for all runs, so that they can be compared."""
MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"
_MAX_PARAMETERS = 100
"""Parameters that MLflow takes in one call."""


class Tracker(Protocol):
    """Receives what a run was told and how it goes."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """Take the run's settings, as nested JSON."""

    def figures(self, step: int, values: Mapping[str, float | None]) -> None:
        """Take one point of each curve after ``step`` steps; None = there is no value."""


class NoTracker:
    """Ignores everything."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """Ignore the settings."""

    def figures(self, step: int, values: Mapping[str, float | None]) -> None:
        """Ignore the figures."""


@contextmanager
def open_tracker(kind: str | None, home: Home, run: str, *, step: int = 0) -> Iterator[Tracker]:
    """Where a run's curves go.

    Args:
        kind: Of :data:`TRACKERS`; None = nowhere.
        home: Under which files are written.
        run: Name of the run.
        step: Steps done before; TensorBoard drops points beyond, which a killed process wrote.

    Raises:
        LongtrailError: If the package is not installed, or ``kind`` is unknown.
    """
    match kind:
        case None:
            yield NoTracker()
        case "tensorboard":
            with _tensorboard(home, run, step) as tracker:
                yield tracker
        case "mlflow":
            with _mlflow(home, run) as tracker:
                yield tracker
        case _:
            raise LongtrailError(f"--track takes {' or '.join(TRACKERS)}, got {kind!r}")


def check_tracker(kind: str | None) -> None:
    """Fail before long work, not after it, where the package of a tracker is missing.

    Raises:
        LongtrailError: If the package is not installed.
    """
    try:
        if kind == "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        elif kind == "mlflow":
            import mlflow  # noqa: F401
    except ImportError as error:
        raise LongtrailError(
            f"--track {kind} needs a package that is not installed or does not fit ({error}): "
            "pip install 'longtrail[tracking]'"
        ) from error


@contextmanager
def _tensorboard(home: Home, run: str, step: int) -> Iterator[Tracker]:
    check_tracker("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(
        str(home.root / "tracking" / run), purge_step=step + 1 if step else None
    ) as writer:
        yield _TensorBoard(writer)


@dataclass(frozen=True)
class _TensorBoard:
    writer: "SummaryWriter"

    def settings(self, values: Mapping[str, Any]) -> None:
        # Indented by four spaces, Markdown shows it as it is.
        text = json.dumps(values, indent=2, default=str).replace("\n", "\n    ")
        self.writer.add_text("settings", f"    {text}")

    def figures(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)


@contextmanager
def _mlflow(home: Home, run: str) -> Iterator[Tracker]:
    check_tracker("mlflow")
    from mlflow import MlflowClient

    folder = home.root / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    uri = os.environ.get(MLFLOW_VARIABLE) or f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(EXPERIMENT)
    experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT)
    found = client.search_runs([experiment], f"attributes.run_name = '{run}'", max_results=1)
    run_id = (found[0] if found else client.create_run(experiment, run_name=run)).info.run_id
    client.update_run(run_id, status="RUNNING")
    try:
        yield _Mlflow(client, run_id)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


@dataclass(frozen=True)
class _Mlflow:
    client: "MlflowClient"
    run_id: str

    def settings(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [Param(name, str(value)) for name, value in flatten(values).items()]
        for start in range(0, len(parameters), _MAX_PARAMETERS):
            part = parameters[start : start + _MAX_PARAMETERS]
            self.client.log_batch(self.run_id, params=part)

    def figures(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self.client.log_metric(self.run_id, name, value, step=step)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def final_figures(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The last figures of each split as points of curves of their own, ``final/<split>_<name>``.

    Args:
        metrics: Split -> metric -> value; what is no number is left out.
    """
    return {
        f"final/{split}_{name}": float(value)
        for split, figures in metrics.items()
        for name, value in figures.items()
        if isinstance(value, int | float)
    }


@dataclass
class Meter:
    """Rows, seconds and loss of a process' steps: all of them, and since the last point."""

    rows: int = 0
    seconds: float = 0.0
    _rows_before: int = 0
    _seconds_before: float = 0.0
    _loss_sum: float = 0.0

    def add(self, rows: int, loss: float, seconds: float) -> None:
        """Count a step with its mean loss."""
        self.rows += rows
        self.seconds += seconds
        self._loss_sum += loss * rows

    @property
    def rows_per_s(self) -> float | None:
        """Of all steps; None where there were none."""
        return self.rows / self.seconds if self.rows else None

    def take(self) -> dict[str, float | None]:
        """Mean loss and rows per second since the last call, under the names of their curves."""
        rows, seconds = self.rows - self._rows_before, self.seconds - self._seconds_before
        figures = {"train/loss": self._loss_sum / rows, "train/rows_per_s": rows / seconds}
        self._rows_before, self._seconds_before, self._loss_sum = self.rows, self.seconds, 0.0
        return {**figures}
