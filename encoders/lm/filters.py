"""What stands between a source and the corpus: cleaning, scrubbing, and what is left out."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from encoders.lm.duplicates import DuplicateFilter
from encoders.lm.language import LanguageLabels
from encoders.lm.personal_data import scrub
from encoders.lm.quality import QualityConfig, quality_problem
from encoders.lm.records import plain
from encoders.lm.sources import RawDocument, Source
from encoders.lm.text_files import pieces
from feature_repo.errors import DataSetError


@dataclass(frozen=True)
class FilterConfig:
    """What is left out of a corpus.

    Raises:
        DataSetError: If a value cannot be used.
    """

    quality: QualityConfig = field(default_factory=QualityConfig)
    """Of free text."""
    near_duplicates: float | None = 0.8
    """Likeness from which two listings, or two free texts of whatever sources, count as one: the
    earlier is kept. None: only exact copies do. Orders and histories are kept as often as they were
    made."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes; free text of others is left out. Empty: all are kept, and labelled."""
    scrub: bool = False
    """Replace personal data (:mod:`encoders.lm.personal_data`) in all sources."""

    def __post_init__(self) -> None:
        if self.near_duplicates is not None and not 0 < self.near_duplicates < 1:
            raise DataSetError(
                "near duplicates must be alike by a number in (0, 1), got "
                f"{self.near_duplicates}; None keeps all but exact copies"
            )


class DocumentFilter:
    """The documents of one source that go into the corpus; counts the others.

    Args:
        source: What is filtered; a record is not judged by its language and quality.
        config: How.
        duplicates: Knows the texts that were there before, and is told these; None = none is left
            out for having been there.
    """

    def __init__(
        self, source: Source, config: FilterConfig, duplicates: DuplicateFilter | None
    ) -> None:
        self.dropped: Counter[str] = Counter()
        """Reason -> documents left out."""
        self.languages: Counter[str] = Counter()
        """Code -> documents kept."""
        self.scrubbed: Counter[str] = Counter()
        """Kind -> places replaced in documents kept."""
        self._source = source
        self._config = config
        self._language_of = None if source.is_record else LanguageLabels()
        self._duplicates = duplicates

    def __call__(self, document: RawDocument) -> Iterator[RawDocument]:
        """What is kept of a document: nothing, itself, or the parts of a long one."""
        text, time = document
        if self._source.is_record:
            parts = iter([text])
        else:
            lines = text.replace("\r\n", "\n").replace("\r", "\n").strip()
            parts = pieces(io.StringIO(plain(lines)))
        for part in parts:
            part = part.strip()
            counts: Counter[str] = Counter()
            if self._config.scrub:
                part, counts = scrub(part)
            problem = self._problem(part)
            if problem is None:
                self.scrubbed += counts
                yield part, time
            else:
                self.dropped[problem] += 1

    def _problem(self, text: str) -> str | None:
        try:
            text.encode()
        except UnicodeEncodeError:  # half a pair of surrogates, which JSON can hold
            return "broken_encoding"
        language = None
        if self._language_of is not None:
            problem = quality_problem(text, self._config.quality)
            if problem is not None:
                return problem
            language = self._language_of(text)
            if self._config.languages and language not in self._config.languages:
                return "language"
        if self._duplicates is not None:
            problem = self._duplicates.problem(text)
            if problem is not None:
                return problem
        if language is not None:
            self.languages[language] += 1
        return None
