"""How often each source of the corpus is drawn from: its share of the training bytes.

Models learn from sources in other proportions than they have text: a company's own records are
few beside the general text of the world, and a small source seen for the tenth time teaches little.
"""

from collections.abc import Iterable

from encoders.lm.corpus import CorpusManifest, MixtureConfig
from feature_repo.errors import DataSetError

CONTINUED_GENERAL_SHARE = 0.5
"""General : e-commerce = 1 : 1, for continued pretraining: e-Llama, arXiv:2501.09706."""


def check_weights(config: MixtureConfig, sources: Iterable[str]) -> None:
    """Make sure that a mixture weighs what there is.

    Raises:
        DataSetError: If a weight is negative or of an unknown source.
    """
    names = list(sources)
    for name, weight in config.weights.items():
        if name not in names:
            raise DataSetError(
                f"the mixture weighs {name!r}, but the corpus has the sources {', '.join(names)}: "
                "name one of these"
            )
        if not weight >= 0:
            raise DataSetError(f"the weight of {name} must be at least 0, got {weight}")


def mixture(manifest: CorpusManifest, config: MixtureConfig | None = None) -> dict[str, float]:
    """Share of the training bytes that each source shall give.

    Within the general and within the domain sources, a source of b training bytes has the weight
    ``factor * b ** (1 / temperature)``; then the two kinds are scaled to ``general_share`` and
    the rest, where it is given and both kinds have text.

    Args:
        manifest: Of the corpus.
        config: None: the one that the corpus was built with.

    Returns:
        Source -> share above 0, summing to 1; sources without weight or training text are left out.

    Raises:
        DataSetError: If a weight is negative or of an unknown source, or nothing is left.
    """
    config = manifest.mixture if config is None else config
    check_weights(config, manifest.sources)
    raw = {
        name: config.weights.get(name, 1.0) * source.train_bytes ** (1 / config.temperature)
        for name, source in manifest.sources.items()
        if source.train_bytes
    }
    sums = {
        kind: sum(w for name, w in raw.items() if manifest.sources[name].kind == kind)
        for kind in ("general", "domain")
    }
    scales = dict.fromkeys(sums, 1.0)
    if config.general_share is not None and all(sums.values()):
        scales["general"] = config.general_share / sums["general"]
        scales["domain"] = (1 - config.general_share) / sums["domain"]
    weighed = {n: w * scales[manifest.sources[n].kind] for n, w in raw.items()}
    total = sum(weighed.values())
    if not total:
        raise DataSetError(
            "no source of the corpus has training text and a weight above 0: give other weights, "
            "or build the corpus from more text with `longtrail lm corpus`"
        )
    return {name: weight / total for name, weight in weighed.items() if weight}
