"""Names of what exists once per version: vectors of an encoder, deep outputs of a run.

A version is a feature view of its own, so versions lie beside each other in every store and no
reader can mix them: ``behavior_embeddings_<fingerprint>``, ``user_embeddings_<version>`` and
``item_embeddings_<version>``. A run's version is a hash of its name, which may hold what tables
cannot be called.
"""

import hashlib
from typing import Literal

Entity = Literal["user", "item"]

ENTITIES: tuple[Entity, ...] = ("user", "item")
"""Of which a run has vectors."""
BEHAVIOR_VIEW = "behavior_embeddings"
RUN_VIEWS = ("user_embeddings", "item_embeddings")
VERSIONED = (BEHAVIOR_VIEW, *RUN_VIEWS)
"""What the names of versioned views begin with, and their folders in the home."""
ENCODER_FILE = "encoder.json"
"""In the folder of an encoder's vectors: whose they are."""
_HASH_BYTES = 8


def encoder_view(fingerprint: str) -> str:
    """The view of an encoder's vectors; also its table in PostgreSQL."""
    return f"{BEHAVIOR_VIEW}_{fingerprint}"


def run_version(run: str) -> str:
    """16 hexadecimal digits that stand for a run in the names of its views."""
    return hashlib.blake2b(run.encode(), digest_size=_HASH_BYTES).hexdigest()


def run_view(entity: Entity, run: str) -> str:
    """The view of a run's vectors of users or items; also its table in PostgreSQL."""
    return f"{entity}_embeddings_{run_version(run)}"


def unversioned(view: str) -> str:
    """The name of a view without its version."""
    return next((base for base in VERSIONED if view.startswith(f"{base}_")), view)
