"""The only file that Feast imports: ``.feastignore`` lists every other one in this folder."""

from feature_repo.definitions import define
from feature_repo.profiles import active_home, active_offline_type

_definitions = define(active_home(), active_offline_type())

# Feast finds objects by looking at this module's names; the versions in the home tell which.
globals().update(
    (f"{kind}_{thing.name}", thing)
    for kind in ("entities", "views", "services")
    for thing in getattr(_definitions, kind)
)
