"""Gradient-boosted trees on every number that the reader and the evidence give, as a click model.

The trees are grown by a library and then copied into tensors, so that they are exported, scored
and served like any other model here, and can stand beside a network (:class:`Ensemble`).

Shapes: R = flat candidates, F = features.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from feature_repo.errors import LongtrailError
from training.batches import iterate, plan_batches
from training.candidates import FlatCandidates
from training.config import TreesConfig
from training.dataset import ClickData
from training.program_inputs import ClickModel, ProgramInputs
from training.schema import InputSchema
from training.scoring import BATCH_CONTEXTS, MAX_CANDIDATES
from training.tree_ensemble import GrownTrees, TreeEnsemble


class Trees(ClickModel):
    """Trees on dense features, categories and evidence of all kinds.

    Args:
        config: How they are grown.
        schema: What they read.
    """

    def __init__(self, config: TreesConfig, schema: InputSchema) -> None:
        super().__init__()
        self.config = config
        chosen = schema.evidence_columns(config.evidence_kinds)
        self.register_buffer("evidence_columns", torch.tensor(chosen, dtype=torch.int64))
        self.ensemble = TreeEnsemble()

    def features(self, flat: FlatCandidates, inputs: ProgramInputs) -> Float[Tensor, "R F"]:
        """What the trees see; NaN = missing."""
        return torch.cat(
            [
                flat.spread(torch.cat([inputs.user_dense, inputs.history_totals], dim=-1)),
                flat.select(inputs.candidate_dense),
                flat.select(inputs.context),
                flat.select(inputs.evidence[..., self.get_buffer("evidence_columns")]),
                flat.select(inputs.candidate_categories).to(inputs.candidate_dense.dtype),
            ],
            dim=-1,
        )

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        flat = FlatCandidates(inputs.candidate_item_keys)
        return flat.restore(self.ensemble(self.features(flat, inputs)))

    def fit(self, train: ClickData, valid: ClickData, *, seed: int) -> None:
        """Grow the trees on ``train`` and keep as many as have the lowest loss on ``valid``."""
        grow = _GROWERS[self.config.package]
        rows = self._matrix(train)
        trees = grow(self.config, rows, train.clicked, self._matrix(valid), valid.clicked, seed)
        self.ensemble.set_trees(trees, num_features=rows.shape[1])

    def _matrix(self, data: ClickData) -> NDArray[np.float32]:
        """float32 [R, F] of all rows, in the data's order."""
        plan = plan_batches(
            data, batch_contexts=BATCH_CONTEXTS, max_candidates=MAX_CANDIDATES, seed=None
        )
        table = torch.zeros(1, 1)  # the features read no vectors
        matrix: NDArray[np.float32] | None = None
        for batch in iterate(data, plan, truncate=True):
            inputs = ProgramInputs(table, *batch.inputs)
            rows = self.features(FlatCandidates(inputs.candidate_item_keys), inputs).numpy()
            if matrix is None:
                matrix = np.empty((len(data), rows.shape[1]), dtype=np.float32)
            matrix[batch.rows] = rows
        assert matrix is not None
        return matrix


class Ensemble(ClickModel):
    """A network and trees: the mean of their logits. While it learns, the network alone.

    Args:
        network: Any click model.
        trees: Grown before the network learns.
    """

    def __init__(self, network: ClickModel, trees: Trees) -> None:
        super().__init__()
        self.network = network
        self.trees = trees

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        logits = self.network.logits(inputs)
        if self.training:
            return logits
        return (logits + self.trees.logits(inputs)) / 2

    def head(
        self, inputs: ProgramInputs, users: Float[Tensor, "B S Q"], items: Float[Tensor, "B C Q"]
    ) -> Float[Tensor, "B C"]:
        """The same from deep outputs of the network that were computed before."""
        logits: Tensor = self.network.head(inputs, users, items)  # type: ignore[operator]
        return (logits + self.trees.logits(inputs)) / 2

    def auxiliary_loss(self, clicked: Float[Tensor, " R"]) -> Tensor | None:
        """The network's."""
        return self.network.auxiliary_loss(clicked)


Matrix = NDArray[np.float32]
Labels = NDArray[np.int64]


def _grow_sklearn(
    config: TreesConfig, x: Matrix, y: Labels, valid_x: Matrix, valid_y: Labels, seed: int
) -> GrownTrees:
    # scikit-learn cannot bin a column without any value; a constant one is never split.
    x = np.where(np.isnan(x).all(axis=0), np.float32(0), x)
    model = HistGradientBoostingClassifier(
        learning_rate=config.learning_rate,
        max_iter=config.num_trees,
        max_leaf_nodes=config.num_leaves,
        max_depth=config.max_depth,
        min_samples_leaf=config.min_rows_per_leaf,
        l2_regularization=config.l2,
        max_features=config.feature_share,
        early_stopping=True,
        n_iter_no_change=config.patience,
        tol=0.0,
        random_state=seed,
    ).fit(x, y, X_val=valid_x, y_val=valid_y)
    kept = int(np.argmax(model.validation_score_[1:])) + 1  # the first is of no tree; the loss < 0
    # scikit-learn has no public form of its trees; the version is pinned and a test compares.
    nodes = [of_class[0].nodes for of_class in model._predictors[:kept]]
    sizes = np.array([len(tree) for tree in nodes])
    roots = np.cumsum(sizes) - sizes
    start = np.repeat(roots, sizes)
    flat = np.concatenate(nodes)
    is_leaf = flat["is_leaf"].astype(bool)
    itself = np.arange(len(flat))
    return GrownTrees(
        feature=np.where(is_leaf, 0, flat["feature_idx"]),
        threshold=np.where(is_leaf, 0.0, flat["num_threshold"]),
        missing_left=flat["missing_go_to_left"].astype(bool),
        left=np.where(is_leaf, itself, start + flat["left"]),
        right=np.where(is_leaf, itself, start + flat["right"]),
        value=np.where(is_leaf, flat["value"], 0.0),
        roots=roots,
        depth=int(flat["depth"].max()),
        base=float(np.ravel(model._baseline_prediction)[0]),
    )


def _grow_lightgbm(
    config: TreesConfig, x: Matrix, y: Labels, valid_x: Matrix, valid_y: Labels, seed: int
) -> GrownTrees:
    try:
        import lightgbm
    except (ImportError, OSError) as error:
        raise LongtrailError(
            f"LightGBM cannot be loaded ({error}): install the extra with `pip install "
            "'longtrail[lightgbm]'` and the system's libgomp, or train the recipe `trees`, which "
            "needs neither"
        ) from error
    train = lightgbm.Dataset(x, y)
    booster = lightgbm.train(
        {
            "objective": "binary",
            "metric": "binary_logloss",
            "learning_rate": config.learning_rate,
            "num_leaves": config.num_leaves,
            "max_depth": config.max_depth,
            "min_data_in_leaf": config.min_rows_per_leaf,
            "lambda_l2": config.l2,
            "feature_fraction_bynode": config.feature_share,
            "num_threads": torch.get_num_threads(),
            "deterministic": True,
            "force_row_wise": True,
            "verbose": -1,
            "seed": seed,
        },
        train,
        config.num_trees,
        valid_sets=[lightgbm.Dataset(valid_x, valid_y, reference=train)],
        callbacks=[lightgbm.early_stopping(config.patience, verbose=False)],
    )
    frame = booster.trees_to_dataframe()
    frame = frame[frame["tree_index"] < (booster.best_iteration or config.num_trees)]
    place = {name: i for i, name in enumerate(frame["node_index"])}
    is_leaf = frame["left_child"].isna().to_numpy()
    names = {name: i for i, name in enumerate(booster.feature_name())}
    itself = np.arange(len(frame))
    left = np.array([place.get(name, -1) for name in frame["left_child"]])
    right = np.array([place.get(name, -1) for name in frame["right_child"]])
    roots = np.flatnonzero(frame["node_depth"].to_numpy() == 1)
    threshold = np.where(is_leaf, 0.0, frame["threshold"].astype(np.float64))
    return GrownTrees(
        feature=np.array([names.get(name, 0) for name in frame["split_feature"]]),
        threshold=threshold,
        # Where no training row lacked the feature, LightGBM takes a missing value for 0.
        missing_left=np.where(
            frame["missing_type"] == "NaN", frame["missing_direction"] == "left", threshold >= 0
        ),
        left=np.where(is_leaf, itself, left),
        right=np.where(is_leaf, itself, right),
        value=np.where(is_leaf, frame["value"], 0.0).astype(np.float64),
        roots=roots,
        depth=int(frame["node_depth"].max()) - 1,
        base=0.0,  # LightGBM keeps it in the first tree's leaves
    )


Grower = Callable[[TreesConfig, Matrix, Labels, Matrix, Labels, int], GrownTrees]
_GROWERS: dict[str, Grower] = {"sklearn": _grow_sklearn, "lightgbm": _grow_lightgbm}
