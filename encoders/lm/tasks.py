"""Tasks made of a data set's own records: what a model is tuned to do, and is measured on.

========================  ==========================================================================
``title``                 an item's title, from its columns and what it is bought with
``attribute:<column>``    the value of a categorical column, or the band of a numeric one, from the
                          title
``query``                 what one searches for to find the item, from the title
``next_<scene>``          one text of the user's next basket, from the baskets before
========================  ==========================================================================

Nothing is learned from what is measured: items are held out by a hash of their title, all that were
first seen from the validation period on are held out too, and baskets are split by time. Titles,
columns, searches and baskets of learned examples are those of before the validation period.

Where the home's corpus was scrubbed, so are the texts here: what a model must not read in
pretraining it must not read in a task either.
"""

from collections.abc import Sequence

from encoders.lm.corpus import Split, load_corpus, manifest_path
from encoders.lm.examples import Clean, Example, TaskConfig, draw
from encoders.lm.item_tasks import (
    attribute_examples,
    query_examples,
    read_items,
    title_examples,
)
from encoders.lm.next_basket import foretold_scene, next_basket_examples
from encoders.lm.personal_data import scrub
from encoders.lm.queries import Queries
from encoders.lm.records import plain
from feature_repo.errors import DataSetError
from feature_repo.home import Home
from feature_repo.manifest import load_manifest


def build_examples(home: Home, config: TaskConfig = TaskConfig()) -> list[Example]:  # noqa: B008
    """All tasks that the home's tables give, by task and split; seconds for a million events.

    Args:
        home: The home folder; ingest has been run.
        config: How many.

    Raises:
        MissingStepError: If nothing has been ingested, or the home has a corpus of other tables.
    """
    manifest = load_manifest(home)
    clean = _cleaning(home)
    items = read_items(home, manifest, config, clean)
    found: list[Example] = []
    for column in manifest.item_columns:
        found += attribute_examples(column, items)
    titles = [item.title for item in items if item.split == "train"]
    found += query_examples(items, Queries.read(home, manifest, titles, config.query_words, clean))
    scene = foretold_scene(home, manifest)
    if scene is not None:
        found += title_examples(home, manifest, items, scene, config, clean)
        found += next_basket_examples(home, manifest, scene, config, clean)
    return draw(found, config)


def _cleaning(home: Home) -> Clean:
    """What happened to texts on their way into the home's corpus, if it has one."""
    if manifest_path(home).exists() and load_corpus(home).is_scrubbed:
        return lambda text: scrub(plain(text))[0]
    return plain


def choose(examples: Sequence[Example], split: Split) -> list[Example]:
    """The examples of one split.

    Raises:
        DataSetError: If there is none.
    """
    chosen = [example for example in examples if example.split == split]
    if not chosen:
        raise DataSetError(
            f"no task has an example in the split {split}: the data set needs items with titles, "
            "or users with two baskets, in that part of its time"
        )
    return chosen
