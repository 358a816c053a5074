"""Click rates of users and items, where real impressions were logged.

With sampled negatives they would only mirror the sampler; then no view has them.
"""

from typing import Any

from feature_repo.fields import FeatureField

CLICK_WINDOW_DAYS = 30
PRIOR_CLICKS = 1
PRIOR_IMPRESSIONS = 10
"""Click rates are (clicks + 1) / (impressions + 10): a tenth where nothing was seen."""


def click_features(
    impressions: Any, clicks: Any, recent: Any, recent_clicks: Any
) -> dict[str, Any]:
    """Compute the columns of :func:`click_fields` from counts of all time and of the window."""
    rate = (clicks + PRIOR_CLICKS) / (impressions + PRIOR_IMPRESSIONS)
    return {
        "impression_count": impressions.cast("float32"),
        "click_count": clicks.cast("float32"),
        "click_rate": rate.cast("float32"),
        f"impression_count_{CLICK_WINDOW_DAYS}d": recent.cast("float32"),
        f"click_count_{CLICK_WINDOW_DAYS}d": recent_clicks.cast("float32"),
    }


def click_fields() -> tuple[FeatureField, ...]:
    """Fields that users and items have where real impressions were logged."""
    days = CLICK_WINDOW_DAYS
    known = "whose click is known"
    return (
        FeatureField("impression_count", "float32", f"impressions of all time {known}; a count"),
        FeatureField("click_count", "float32", "clicks of all time that are known; a count"),
        FeatureField(
            "click_rate",
            "float32",
            f"(clicks + {PRIOR_CLICKS}) / (impressions + {PRIOR_IMPRESSIONS}) of all time {known}; "
            "a share of 1",
        ),
        FeatureField(
            f"impression_count_{days}d",
            "float32",
            f"impressions that became known in {days} days; a count",
        ),
        FeatureField(
            f"click_count_{days}d", "float32", f"clicks that became known in {days} days; a count"
        ),
    )
