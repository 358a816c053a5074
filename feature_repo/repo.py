"""The only file that Feast imports: ``.feastignore`` lists every other one in this folder."""

from feature_repo.definitions import define
from feature_repo.profiles import active_home, active_offline_type

_definitions = define(active_home(), active_offline_type())

user, item, behavior = _definitions.entities
behavior_embeddings, user_sequences, user_stats, *_others = _definitions.views
items, item_neighbors, *_exported = _others
ctr_v1, *_retrieval = _definitions.services
# Feast finds objects by looking at this module's names; these exist once a model was exported.
if len(_exported) == 2:
    user_embeddings, item_embeddings = _exported
if _retrieval:
    (retrieval_v1,) = _retrieval
