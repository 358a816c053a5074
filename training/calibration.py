"""Probabilities that mean what they say: a map of logits, fitted on the validation split.

The map is strictly increasing and piecewise linear, so it never changes a ranking, it can be turned
round, and it is exported with the model: serving runs it without knowing of it.

Shapes: R = rows, K = knots.
"""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from torch import Tensor, nn

from feature_repo.artifact import Calibration
from training.bootstrap import Labels, Scores
from training.metrics import row_losses
from training.program_inputs import ClickModel, ProgramInputs
from training.scoring import probabilities

NUM_FOLDS = 5
MIN_SLOPE = 1e-3
"""Of Platt's line: above 0, so that a model that ranks the wrong way is not turned round."""
PLATT_SHARE = 0.05
"""Of Platt's line in the isotonic map: its steps keep a slope, and so the ranking inside them."""


def fit_platt(scores: Scores, labels: Labels) -> tuple[float, float]:
    """Slope and bias of ``logit = slope * score + bias`` by maximum likelihood.

    Args:
        scores: [R], any real number; with both classes.
        labels: [R], 0 or 1.

    Returns:
        Slope, at least :data:`MIN_SLOPE`, and bias.

    Source:
        Platt, "Probabilistic outputs for support vector machines", 1999, section 2.2: the targets
        are ``(N+ + 1) / (N+ + 2)`` and ``1 / (N- + 2)``, so that separable scores give a finite
        slope too.
    """
    num_rows, num_clicked = len(labels), int(labels.sum())
    high, low = (num_clicked + 1) / (num_clicked + 2), 1 / (num_rows - num_clicked + 2)
    target = np.where(labels == 1, high, low)
    column = np.tile(scores.astype(np.float64), 2)[:, None]
    fitted = LogisticRegression(C=np.inf).fit(
        column, np.repeat([1, 0], num_rows), sample_weight=np.r_[target, 1 - target]
    )
    slope, bias = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope < MIN_SLOPE:
        rate = float(target.mean())
        slope, bias = MIN_SLOPE, np.log(rate / (1 - rate)) - MIN_SLOPE * float(scores.mean())
    return slope, float(bias)


def _identity(_logits: Scores, _labels: Labels) -> Calibration:
    return Calibration(method="none", knots=(0.0,), values=(0.0,), slope_below=1.0, slope_above=1.0)


def _platt(logits: Scores, labels: Labels) -> Calibration:
    slope, bias = fit_platt(logits, labels)
    return Calibration(
        method="platt", knots=(0.0,), values=(bias,), slope_below=slope, slope_above=slope
    )


def _isotonic(logits: Scores, labels: Labels) -> Calibration:
    slope, bias = fit_platt(logits, labels)
    edge = 0.5 / len(labels)  # a rate below one click in all rows cannot be told from 0
    fitted = IsotonicRegression(y_min=edge, y_max=1 - edge).fit(
        logits.astype(np.float64), labels.astype(np.float64)
    )
    knots, rates = fitted.X_thresholds_, fitted.y_thresholds_
    steps = np.log(rates) - np.log1p(-rates)
    values = (1 - PLATT_SHARE) * steps + PLATT_SHARE * (slope * knots + bias)
    return Calibration(
        method="isotonic",
        knots=tuple(knots.tolist()),
        values=tuple(values.tolist()),
        slope_below=PLATT_SHARE * slope,
        slope_above=PLATT_SHARE * slope,
    )


_FITS = {"none": _identity, "platt": _platt, "isotonic": _isotonic}


def fit_calibration(
    logits: NDArray[np.float32], labels: Labels, users: NDArray[np.int64]
) -> Calibration:
    """Fit Platt's line or the isotonic map, where they help with users they have not seen.

    Both are fitted on four fifths of the users and measured by logloss on the rest, five times.
    From none over Platt's line (two parameters) to the isotonic map (hundreds), the next is taken
    if its mean gain over the one taken so far exceeds the gain's standard error.

    Args:
        logits: float32 [R], of rows that the model has not learned from.
        labels: [R], 0 or 1.
        users: [R], any integer code of the user.

    Returns:
        The map, fitted on all rows; the identity (``none``) where nothing helps, or where fewer
        than five users or one class only are present.
    """
    losses: dict[str, list[float]] = {"none": [], "platt": [], "isotonic": []}
    if np.unique(users).size >= NUM_FOLDS:
        for learned, held_out in GroupKFold(NUM_FOLDS).split(logits, groups=users):
            if not 0 < labels[learned].sum() < len(learned):
                continue
            for name, of_method in losses.items():
                fitted = _FITS[name](logits[learned], labels[learned])
                chances = probabilities(calibrate(fitted, logits[held_out]))
                of_method.append(float(row_losses(labels[held_out], chances).mean()))
    chosen = "none"
    for name in ("platt", "isotonic"):
        gains = np.subtract(losses[chosen], losses[name])
        if len(gains) > 1 and gains.mean() > gains.std(ddof=1) / len(gains) ** 0.5:
            chosen = name
    means = {name: float(np.mean(values)) for name, values in losses.items() if values}
    return _FITS[chosen](logits, labels).model_copy(update={"cross_validated_logloss": means})


def calibrate(calibration: Calibration, logits: Scores) -> NDArray[np.float64]:
    """Apply the map, [R]; in float64."""
    x = logits.astype(np.float64)
    below = np.minimum(x - calibration.knots[0], 0)
    above = np.maximum(x - calibration.knots[-1], 0)
    inside: NDArray[np.float64] = np.interp(x, calibration.knots, calibration.values)
    return inside + calibration.slope_below * below + calibration.slope_above * above


def inverse(calibration: Calibration) -> Calibration:
    """The map from calibrated logits back to the model's own."""
    return calibration.model_copy(
        update={
            "knots": calibration.values,
            "values": calibration.knots,
            "slope_below": 1 / calibration.slope_below,
            "slope_above": 1 / calibration.slope_above,
        }
    )


class Calibrator(nn.Module):
    """:func:`calibrate` as a module that ``torch.export`` takes; float32.

    Args:
        calibration: The map.
    """

    knots: Tensor
    origins: Tensor
    values: Tensor
    slopes: Tensor

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        knots = np.array(calibration.knots)
        values = np.array(calibration.values)
        slopes = np.diff(values) / np.diff(knots)
        # Piece i lies between knots i - 1 and i and starts at the lower one; the first piece, which
        # has none, is drawn from the upper one.
        for name, buffer in {
            "knots": knots,
            "origins": np.r_[knots[0], knots],
            "values": np.r_[values[0], values],
            "slopes": np.r_[calibration.slope_below, slopes, calibration.slope_above],
        }.items():
            self.register_buffer(name, torch.tensor(buffer, dtype=torch.float32))

    def forward(self, logits: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        """Calibrated logits."""
        piece = torch.bucketize(logits, self.knots)
        return self.values[piece] + self.slopes[piece] * (logits - self.origins[piece])


class CalibratedModel(ClickModel):
    """A model with its calibration, as it is exported.

    Args:
        model: Takes the program's inputs, returns logits.
        calibration: Of these logits.
    """

    def __init__(self, model: nn.Module, calibration: Calibration) -> None:
        super().__init__()
        self.model = model
        self.calibrator = Calibrator(calibration)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Calibrated logits of every candidate."""
        logits: Tensor = self.calibrator(self.model(*inputs))
        return logits
