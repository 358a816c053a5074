"""What training reads from: the data set, the reader, the vectors, the deep half."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from torch import nn

from encoders.split import load_deep_half
from encoders.table import EmbeddingTable, table_encoder
from feature_repo.features import Reader
from feature_repo.home import Home
from feature_repo.manifest import DataManifest, EncoderManifest, load_manifest
from feature_repo.reader import FeatureReader


@dataclass(frozen=True)
class Sources:
    """Everything from outside that a run needs; tests pass small ones of their own."""

    home: Home
    manifest: DataManifest
    reader: Reader
    table: EmbeddingTable
    deep_half: Callable[[int | None], nn.Module]
    """Number of layers above the split (None = all) -> the deep half with pretrained weights."""

    @classmethod
    def open(cls, home: Home, profile: str, *, encoder: str | None = None) -> Self:
        """The sources of a home folder.

        Args:
            home: The home folder.
            profile: Of the feature store.
            encoder: Fingerprint of the encoder whose vectors are read; None = the current one.

        Raises:
            MissingStepError: If ingest or encode has not run.
            EncoderError: If there are no vectors of this encoder.
        """
        manifest = load_manifest(home)
        return cls(
            home=home,
            manifest=manifest,
            reader=FeatureReader(home, profile),
            table=EmbeddingTable.open(home, fingerprint=encoder),
            deep_half=_deep_half_of(table_encoder(home, encoder)),
        )

    def with_encoder(self, fingerprint: str) -> "Sources":
        """The same with the vectors and the deep half of another encoder of this home folder.

        Raises:
            EncoderError: If there are no vectors of this encoder.
        """
        if fingerprint == self.table.fingerprint:
            return self
        return replace(
            self,
            table=EmbeddingTable.open(self.home, fingerprint=fingerprint),
            deep_half=_deep_half_of(table_encoder(self.home, fingerprint)),
        )


def _deep_half_of(encoder: EncoderManifest) -> Callable[[int | None], nn.Module]:
    def deep_half(num_layers: int | None) -> nn.Module:
        return load_deep_half(encoder.model, encoder.split_layer, num_layers=num_layers)

    return deep_half
