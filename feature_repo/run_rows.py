"""The rows of a run's views, one layout for whoever writes them: export, and serving later.

Shapes: N = users or items, W = numbers of the deep outputs of one of them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from feature_repo.version_names import Entity


def run_rows(
    entity: Entity,
    ids: Sequence[str] | NDArray[np.object_],
    vectors: NDArray[np.float32],
    *,
    run: str,
    times: NDArray[np.int64],
    origin: Mapping[str, NDArray[np.int64]],
) -> pa.Table:
    """Rows of :func:`feature_repo.version_names.run_view`.

    Args:
        entity: Of whom.
        ids: N users or items.
        vectors: float32 [N, W].
        run: Name of the run.
        times: [N], when the rows became true, epoch microseconds.
        origin: What the vectors are of, by column, [N] each.
    """
    stamps = pa.array(times, type=pa.timestamp("us", tz="UTC"))
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    flat = pa.array(vectors.ravel(), type=pa.float32())
    return pa.table(
        {
            f"{entity}_id": pa.array(list(ids), type=pa.string()),
            "embedding": pa.ListArray.from_arrays(pa.array(offsets), flat),
            "model_version": pa.array([run] * len(ids), type=pa.string()),
            **{name: pa.array(values, type=pa.int64()) for name, values in origin.items()},
            "event_timestamp": stamps,
            "created_timestamp": stamps,
        }
    )
