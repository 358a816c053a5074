"""Every error that a user can cause, in one tree.

The command line prints the sentence of a :class:`LongtrailError` and exits with code 1; any other
exception is a defect and keeps its traceback. A sentence says what was expected, what came, and
what to do.
"""


class LongtrailError(ValueError):
    """Something a user can mend."""


class DataSetError(LongtrailError):
    """The data set file, one of its queries or the rows they return are not usable."""


class MissingStepError(LongtrailError):
    """A step was asked for before the step that it needs."""


class NothingToCompareError(LongtrailError):
    """A comparison found no rows of its time; no step is missing: nightly runs go on."""


class EncoderError(LongtrailError):
    """The language model cannot be found, loaded or split, or does not fit its table."""


class StoreError(LongtrailError):
    """The feature store's configuration or contents break a promise."""


class StoreAwayError(StoreError):
    """A server of the feature store does not answer; it may again, without anyone's doing here."""


class ArtifactError(LongtrailError):
    """A trained model's folder is missing, incomplete or does not fit the feature store."""
