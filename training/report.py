"""An evaluation as one HTML file: what its sections say.

The form of the page is :mod:`encoders.page`, the plots are :mod:`training.plots`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encoders.page import Plot, Section, Table, write_page
from feature_repo.artifact import ArtifactManifest, Calibration
from training import plots
from training.ablations import FULL, AblationStudy
from training.bootstrap import NUM_BOOTSTRAP_REPLICATES
from training.calibration import calibrate, inverse
from training.evaluate import Evaluation, ScoredRows
from training.explain import Explanation
from training.scoring import probabilities
from training.slices import LENGTH_CURVE

_FIGURES = {
    "auc": "AUC",
    "gauc": "GAUC (per user)",
    "logloss": "logloss",
    "ne": "normalised entropy",
    "calibration_error": "calibration error",
}
_COMPARED = ("auc", "gauc", "logloss")


def write_report(
    path: Path,
    evaluation: Evaluation,
    scored: ScoredRows,
    *,
    study: AblationStudy | None = None,
    examples: Sequence[Explanation] = (),
) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        evaluation: Figures of one or several runs.
        scored: The rows that they were measured on.
        study: Ablations of the same model, where there are any.
        examples: Explained rows, most telling first.
    """
    manifest = scored.manifests[evaluation.runs[0]]
    sections = [
        _summary(evaluation),
        _curves(evaluation, scored),
        _slices(evaluation),
        *([_ablations(study)] if study else []),
        *_examples(examples),
        *_training(evaluation, scored),
        _model_card(manifest),
    ]
    metrics = evaluation.metrics
    write_page(
        path,
        title=f"Evaluation of {', '.join(evaluation.runs)}",
        subtitle=f"{manifest.dataset}, {evaluation.rows}: {metrics['num_rows']:,} rows of "
        f"{metrics['num_users']:,} users, {metrics['num_clicked']:,} clicked. Intervals hold 95 % "
        f"of {NUM_BOOTSTRAP_REPLICATES} bootstrap replicates in which whole users are drawn.",
        notes=[*evaluation.notes, *(study.notes if study else [])],
        sections=sections,
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.4f}"


def _bounds(low: float | None, high: float | None, *, signed: bool = False) -> str:
    show = _signed if signed else _number
    return "" if low is None or high is None else f" [{show(low)}, {show(high)}]"


def _with_interval(metrics: dict[str, Any], figure: str) -> str:
    bounds = _bounds(metrics.get(f"{figure}_low"), metrics.get(f"{figure}_high"))
    return _number(metrics[figure]) + bounds


def _difference(found: dict[str, float | None]) -> str:
    return _signed(found["difference"]) + _bounds(found["low"], found["high"], signed=True)


def _summary(evaluation: Evaluation) -> Section:
    compared = evaluation.comparison.get("all", {})
    header = ["figure", "value [95 % interval]"]
    if compared:
        header += ["of the others", "difference [95 % interval]"]
    rows = []
    for figure, label in _FIGURES.items():
        row = [label, _with_interval(evaluation.metrics, figure)]
        if compared:
            found = compared.get(figure)
            row += [_number(found["second"]), _difference(found)] if found else ["", ""]
        rows.append(row)
    text = ""
    if len(evaluation.runs) > 1:
        text = f"Means over {len(evaluation.runs)} runs. "
    if compared:
        text += f"Compared on the same rows with {', '.join(evaluation.against)}."
    return Section("Summary", text=text, tables=[Table("All rows", header, rows)])


def _curves(evaluation: Evaluation, scored: ScoredRows) -> Section:
    """Of the first run: curves of several would hide each other."""
    run, labels = evaluation.runs[0], scored.labels
    logits = scored.logits[run]
    served = probabilities(logits)
    chances = {"as served": served}
    calibration = scored.manifests[run].calibration
    if calibration is not None and calibration.method != "none":
        raw = calibrate(inverse(calibration), logits)
        chances = {
            "before calibration": probabilities(raw.astype(np.float32)),
            "after calibration": served,
        }
    contents = [
        Plot(
            plots.reliability(labels, chances),
            "Reliability: ten bins of equal size; on the dotted line a probability means what it "
            "says.",
            "Reliability diagram. Calibration error "
            f"{_number(evaluation.metrics['calibration_error'])}.",
        )
    ]
    if 0 < labels.sum() < len(labels):
        lift = plots.lift_by_decile(labels, served)
        others = {other: probabilities(scored.logits[other]) for other in evaluation.against[:1]}
        contents += [
            Plot(
                plots.roc(labels, {run: served} | others),
                "ROC: the area under the curve is the AUC.",
                f"ROC curve with an area of {_number(evaluation.metrics['auc'])}.",
            ),
            Plot(
                plots.lift(labels, served),
                "Lift: how much more often than average each tenth of the rows is clicked.",
                f"Lift by decile, from {lift[0]:.2f} in the highest tenth to {lift[-1]:.2f} in the "
                "lowest.",
            ),
        ]
    text = f"Of {run}, the first run." if len(evaluation.runs) > 1 else ""
    return Section("Probabilities and ranking", text=text, plots=contents)


def _slices(evaluation: Evaluation) -> Section:
    header = ["slice", "rows", "users", "AUC", "GAUC", "logloss"]
    if evaluation.comparison:
        header.append("difference of AUC")
    rows = []
    for name, found in evaluation.slices.items():
        row = [name, f"{found['num_rows']:,}", f"{found['num_users']:,}"]
        row += [_with_interval(found, figure) for figure in _COMPARED]
        if evaluation.comparison:
            row.append(_difference(evaluation.comparison[name]["auc"]))
        rows.append(row)
    drawn = [
        (name.removeprefix("history_").replace("_plus", "+").replace("_", " to "), found)
        for name, found in evaluation.slices.items()
        if name in LENGTH_CURVE and found["auc_low"] is not None
    ]
    contents = []
    if drawn:
        values = [found["auc"] for _, found in drawn]
        contents.append(
            Plot(
                plots.points(
                    "length",
                    [name for name, _ in drawn],
                    values,
                    [(found["auc_low"], found["auc_high"]) for _, found in drawn],
                    ylabel="AUC",
                ),
                "AUC by the number of behaviours in the longest scene, with 95 % intervals.",
                "AUC by history length: "
                + ", ".join(f"{name}: {found['auc']:.3f}" for name, found in drawn),
                broad=True,
            )
        )
    return Section("Slices", tables=[Table("Parts of the rows", header, rows)], plots=contents)


def _ablations(study: AblationStudy) -> Section:
    header = ["variant", "AUC"]
    header += [f"difference of {figure}" for figure in ("AUC", "GAUC", "logloss")]
    header += ["of AUC, novel", "of AUC, cold items"]
    rows, names, values, bounds = [], [], [], []
    for name, found in study.evaluations.items():
        row = [name, _with_interval(found.metrics, "auc")]
        if name == FULL:
            rows.append([*row, *[""] * 5])
            continue
        whole = found.comparison["all"]
        row += [_difference(whole[figure]) for figure in _COMPARED]
        row += [_difference(found.comparison[part]["auc"]) for part in ("novel", "cold_items")]
        rows.append(row)
        change = whole["auc"]
        if change["difference"] is not None and change["low"] is not None:
            assert change["high"] is not None
            names.append(name)
            values.append(change["difference"])
            bounds.append((change["low"], change["high"]))
    contents = []
    if names:
        contents.append(
            Plot(
                plots.points(
                    "ablations", names, values, bounds, ylabel="difference of AUC", zero=True
                ),
                "AUC of each variant minus that of the full model, with 95 % intervals.",
                "Differences of AUC: "
                + ", ".join(f"{n}: {v:+.4f}" for n, v in zip(names, values, strict=True)),
                broad=True,
            )
        )
    return Section(
        "Ablations",
        text=f"{study.recipe} with parts taken out, equal budget and seeds; each variant minus the "
        "full model on the same rows.",
        tables=[Table("Variants", header, rows)],
        plots=contents,
    )


def _examples(examples: Sequence[Explanation]) -> list[Section]:
    tables = [
        Table(
            f"user {found.user_id}, item {found.item_id}: {found.title} (logit "
            f"{found.logit:.3f}; without any history {found.logit_without_history:.3f})",
            ["behaviour", "adds to the logit"],
            [[text, _signed(value)] for text, value in found.behaviors],
        )
        for found in examples
    ]
    text = (
        "A behaviour's contribution is the logit minus the logit without it (leaving one out; "
        "behaviours of one scene with the same text together)."
    )
    return [Section("Explained examples", text=text, tables=tables)] if tables else []


def _training(evaluation: Evaluation, scored: ScoredRows) -> list[Section]:
    validations = {
        run: entries
        for run in evaluation.runs
        if (entries := scored.manifests[run].config.get("validations"))
    }
    if not validations:
        return []
    best = {
        run: max((e["valid_auc"] for e in entries if e["valid_auc"] is not None), default=None)
        for run, entries in validations.items()
    }
    contents = Plot(
        plots.training_curves(validations),
        "Left: training loss and validation logloss; right: validation AUC.",
        "Training curves. Best validation AUC: "
        + ", ".join(f"{run} {_number(value)}" for run, value in best.items()),
        broad=True,
    )
    return [Section("Training", plots=[contents])]


def _calibration_fact(calibration: Calibration | None) -> str:
    if calibration is None or calibration.method == "none":
        return "none"
    losses = ", ".join(f"{n} {v:.4f}" for n, v in calibration.cross_validated_logloss.items())
    return f"{calibration.method}, fitted on validation" + (f" ({losses})" if losses else "")


def _model_card(manifest: ArtifactManifest) -> Section:
    settings = {
        f"{group}.{name}": value
        for group in ("model", "training")
        for name, value in manifest.config.get(group, {}).items()
    }
    facts = [
        ("run", manifest.run),
        ("recipe", manifest.recipe),
        ("created", f"{manifest.created:%Y-%m-%d %H:%M} UTC"),
        ("data set", manifest.dataset),
        ("trained on", f"{manifest.train_start:%Y-%m-%d} to {manifest.train_end:%Y-%m-%d}"),
        ("feature service", manifest.feature_service),
        ("scenes", ", ".join(manifest.scenes)),
        ("behaviours per scene", str(manifest.sequence_length)),
        ("user features", str(len(manifest.user_dense_names))),
        ("item features", str(len(manifest.item_dense_names))),
        ("request features", str(len(manifest.context_names))),
        ("categories", ", ".join(manifest.category_vocabularies) or "none"),
        ("encoder", f"{manifest.encoder_fingerprint}, {manifest.encoder_width} wide"),
        ("calibration", _calibration_fact(manifest.calibration)),
        ("seed", str(manifest.seed)),
        ("git revision", manifest.git_revision or "unknown"),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest.versions.items())),
        ("settings", ", ".join(f"{name} = {value}" for name, value in settings.items())),
    ]
    return Section("Model card", facts=facts)
