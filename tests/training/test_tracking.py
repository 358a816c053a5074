import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from encoders.tracking import (
    EXPERIMENT,
    Meter,
    check_tracker,
    final_figures,
    flatten,
    open_tracker,
)
from feature_repo.errors import LongtrailError
from feature_repo.home import Home
from tests.training.world import make_world
from training.recipes import RECIPES
from training.train import train


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_holds_a_runs_curves(tmp_path):
    world = make_world(tmp_path / "home", num_users=60)
    result = train(
        world.sources, RECIPES["mean_pooling"](), run="seen", threads=1, track="tensorboard"
    )
    written = curves(world.sources.home.root / "tracking" / "seen")
    expected = [(e["step"], e["valid_logloss"]) for e in result.history]
    assert written["valid/logloss"] == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected]
    auc = result.metrics["test"]["auc"]
    assert written["final/test_auc"] == [(expected[-1][0], pytest.approx(auc, rel=1e-6))]


def test_tensorboard_drops_what_a_killed_process_wrote_after_its_checkpoint(tmp_path):
    home = Home(tmp_path)
    for step, values in ((0, (1.0, 2.0, 3.0)), (20, (20.0, 30.0))):
        with open_tracker("tensorboard", home, "run", step=step) as tracker:
            tracker.settings({"training": {"epochs": 3}})
            for place, value in enumerate(values, start=1):
                tracker.figures(step + 10 * place, {"train/loss": value, "valid/auc": None})
    assert curves(tmp_path / "tracking" / "run") == {
        "train/loss": [(10, 1.0), (20, 2.0), (30, 20.0), (40, 30.0)]
    }


# MLflow's tables use what SQLAlchemy deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_holds_parameters_and_curves_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home(tmp_path)

    def interrupted() -> None:
        with open_tracker("mlflow", home, "run") as tracker:
            tracker.settings({"name": "x", "training": {"epochs": 3}})
            tracker.figures(20, {"train/loss": 0.5, "valid/auc": None})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/tracking/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FAILED"]
    with open_tracker("mlflow", home, "run", step=20) as tracker:
        tracker.settings({"name": "x", "training": {"epochs": 3}})
        tracker.figures(40, {"train/loss": 0.25})
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"name": "x", "training.epochs": "3"}
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(20, 0.5), (40, 0.25)]


@pytest.mark.parametrize(
    ("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")]
)
def test_a_missing_package_is_one_sentence(monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LongtrailError, match=r"pip install 'longtrail\[tracking\]'"):
        check_tracker(kind)


def test_nothing_is_tracked_unless_asked(tmp_path):
    check_tracker(None)
    with open_tracker(None, Home(tmp_path), "run") as tracker:
        tracker.settings({"a": 1})
        tracker.figures(1, {"train/loss": 1.0})
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(LongtrailError, match="--track takes tensorboard or mlflow, got 'x'"),
        open_tracker("x", Home(tmp_path), "run"),
    ):
        pass


def test_meter_by_hand():
    meter = Meter()
    assert meter.rows_per_s is None
    meter.add(10, 1.0, 2.0)
    meter.add(30, 2.0, 2.0)
    assert meter.take() == {"train/loss": 70 / 40, "train/rows_per_s": 10.0}
    meter.add(10, 4.0, 1.0)
    assert meter.take() == {"train/loss": 4.0, "train/rows_per_s": 10.0}
    assert meter.rows_per_s == 10.0


def test_names_of_nested_values():
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": (3,)}}) == {"a": 1, "b.c.d": 2, "b.e": (3,)}
    metrics = {"test": {"auc": 0.5, "rows": 3, "interval": [0, 1], "gauc": None}}
    assert final_figures(metrics) == {"final/test_auc": 0.5, "final/test_rows": 3.0}
