"""Is a live store as it must be? Every trap of Feast that loses or falsifies features, looked for.

A check is a function that yields a sentence for each problem it finds; :data:`CHECKS` lists all.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from feature_repo import doctor_rows, doctor_settings
from feature_repo.database_errors import database_trouble
from feature_repo.errors import LongtrailError, StoreError
from feature_repo.home import Home
from feature_repo.live_store import LiveStore
from feature_repo.progress import Progress, silent

_MATERIALIZE = "run `longtrail materialize`"
_REBUILD = "run `longtrail ingest` and the steps after it again, on data without such rows"


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Args:
        name: Lower case with underscores.
        holds: What holds where nothing is wrong.
        problems: Yields a sentence for each problem.
        fix: What to do about them.
    """

    name: str
    holds: str
    problems: Callable[[LiveStore], Iterable[str]]
    fix: str


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    name: str
    ok: bool
    detail: str
    fix: str | None
    """None where all is well."""


CHECKS = (
    Check(
        "settings",
        "the profile's yaml keeps memory flat, reads open and keys readable",
        doctor_settings.settings,
        "set them in the profile's yaml in feature_repo/ as written here",
    ),
    Check(
        "registry",
        "the registry is what the definitions say",
        doctor_settings.registry,
        "run `longtrail apply`",
    ),
    Check(
        "materializing",
        "no view is stuck in the state MATERIALIZING",
        doctor_settings.materializing,
        f"{_MATERIALIZE}, which frees it; or wait, where one is running",
    ),
    Check(
        "join_keys",
        "every view has one join key, string or int64",
        doctor_settings.join_keys,
        "give the view an entity with one key; PostgreSQL mixes up the rows of composite ones",
    ),
    Check(
        "created_column",
        "every source has a created_timestamp_column",
        doctor_settings.created_column,
        "name the column in the view's source, then run `longtrail apply`",
    ),
    Check(
        "encryption",
        "connections that leave this machine are encrypted",
        doctor_settings.encryption,
        "add ?sslmode=verify-full to DATABASE_URL, write rediss:// in REDIS_URL",
    ),
    Check(
        "redis_memory",
        "Redis evicts nothing and has memory left",
        doctor_settings.redis_memory,
        "set maxmemory-policy to noeviction and maxmemory above what the features need",
    ),
    Check(
        "disk",
        "the home's disk has room to build every view anew",
        doctor_settings.disk,
        "free space, or move the home to a larger disk",
    ),
    Check(
        "versions",
        "vectors are of the encoder and the run that their views are named after",
        doctor_settings.versions,
        "run `longtrail encode`, `longtrail export` and `longtrail apply` again",
    ),
    Check(
        "built",
        "every view has rows offline",
        doctor_rows.built,
        "run the step that builds it: `longtrail sequences`, `longtrail encode` or "
        "`longtrail export`",
    ),
    Check(
        "loaded",
        "the offline store holds what the home's files hold",
        doctor_rows.loaded,
        "run `longtrail apply`, which loads what is missing",
    ),
    Check(
        "equal_rows",
        "no two rows of a view have equal key, event and created time",
        doctor_rows.equal_rows,
        f"{_REBUILD}; Feast's joins return both, and multiply training rows",
    ),
    Check(
        "times",
        "times have a zone and none is in the future",
        doctor_rows.times,
        f"check the clocks that wrote the logs, then {_REBUILD}",
    ),
    Check(
        "nulls",
        "no list holds a null and no int64 feature is null",
        doctor_rows.nulls,
        f"{_REBUILD}; online a null element becomes 0, and a null turns ids into floats",
    ),
    Check(
        "copied",
        "everything offline was copied online, and is still there",
        doctor_rows.copied,
        _MATERIALIZE,
    ),
    Check(
        "counts",
        "as many keys are online as offline",
        doctor_rows.counts,
        f"{_MATERIALIZE} --full",
    ),
    Check(
        "expired_online",
        "no row online is older than its view's time to live",
        doctor_rows.expired_online,
        f"{_MATERIALIZE}, which removes them; until then only this project's reader ignores them",
    ),
)


def examine(home: Home, profile: str, *, progress: Progress = silent) -> list[Finding]:
    """Run every check on the live stores of a profile; nothing is changed.

    Args:
        home: The data set.
        profile: Which stores.
        progress: Receives checks.

    Raises:
        MissingStepError: If nothing was ingested.
    """
    try:
        live = LiveStore.open(home, profile)
    except StoreError as error:
        fix = "nothing else can be checked before this is mended"
        return [Finding("registry", ok=False, detail=str(error), fix=fix)]
    return diagnose(live, progress=progress)


def diagnose(live: LiveStore, *, progress: Progress = silent) -> list[Finding]:
    """Run every check; a store that fails is a problem of the checks that need it."""
    findings = []
    for check in CHECKS:
        try:
            problems = list(check.problems(live))
        except LongtrailError as error:
            problems = [str(error)]
        except Exception as error:
            trouble = database_trouble(error)
            if trouble is None:
                raise
            problems = [trouble]
        findings.append(
            Finding(
                check.name,
                ok=not problems,
                detail="; ".join(problems) or check.holds,
                fix=check.fix if problems else None,
            )
        )
        progress(1, len(CHECKS))
    return findings
