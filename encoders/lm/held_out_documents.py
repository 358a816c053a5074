"""Documents that no model has learned from, drawn the same for every model."""

from dataclasses import dataclass

from encoders.lm.corpus import CorpusManifest, SourceKind, Split, sample_texts
from feature_repo.errors import DataSetError
from feature_repo.home import Home


@dataclass(frozen=True)
class HeldOut:
    """Documents of one source."""

    kind: SourceKind
    texts: list[str]


def draw_documents(
    home: Home, corpus: CorpusManifest, split: Split, max_bytes: int
) -> dict[str, HeldOut]:
    """About ``max_bytes`` of every source, whole documents drawn by their ids.

    Args:
        home: Whose corpus.
        corpus: Its manifest.
        split: To draw from.
        max_bytes: UTF-8, per source.

    Returns:
        Source -> documents; sources of which none is drawn are left out.

    Raises:
        DataSetError: If no source has one.
    """
    found = {
        name: HeldOut(source.kind, list(sample_texts(home, split, name, max_bytes)))
        for name, source in corpus.sources.items()
    }
    found = {name: documents for name, documents in found.items() if documents.texts}
    if not found:
        raise no_documents(split)
    return found


def no_documents(split: Split) -> DataSetError:
    """What to say where a split is empty in every source."""
    return DataSetError(
        f"the corpus has no documents in its {split} split: the data set needs events or items "
        "in that part of its time, or add general text with `longtrail lm corpus --source`"
    )


def texts_to_write(held_out: dict[str, HeldOut], *, num: int, characters: int) -> list[str]:
    """Beginnings of domain documents to measure the speed of writing on; general ones if none."""
    kinds = {source.kind for source in held_out.values()}
    kind = "domain" if "domain" in kinds else "general"
    sources = [source.texts for source in held_out.values() if source.kind == kind]
    each = -(-num // len(sources))
    return [_beginning(text, characters) for texts in sources for text in texts[:each]]


def _beginning(text: str, characters: int) -> str:
    """The first characters, without a special token that they would cut."""
    if len(text) <= characters:
        return text
    kept = text[:characters]
    opened = kept.rfind("<|")
    return kept if opened <= kept.rfind("|>") or not opened else kept[:opened]
