"""The words of the generated shop: what a title or a query says, and how it is put.

A hidden attribute is never named by one fixed word: a theme such as "seaside" shows as *nautical*,
*anchor* or *lighthouse*, a family of materials such as "wood" as *oak* or *bamboo*, and a kind of
thing is searched for under other names than the one in its title. A reader of meaning sees that two
such texts belong together; a reader of exact words or ids does not.

Shapes: I = items, Q = queries or texts of either sort.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

NONE = -1
"""Index that stands where a text does not mention an attribute."""


class Kind(NamedTuple):
    """A kind of thing on sale."""

    name: str
    """As titles call it."""
    query_words: tuple[str, ...]
    """As queries call it."""
    category: str
    price: float
    """Usual price, in pounds."""
    families: tuple[str, ...]
    """The families of materials it is made of."""


# fmt: off
THEMES: dict[str, tuple[str, ...]] = {
    "seaside": ("nautical", "coastal", "seaside", "anchor", "lighthouse", "sailboat", "seashell",
                "starfish", "ocean wave", "mariner", "beach hut", "seagull"),
    "woodland": ("woodland", "forest", "fox", "badger", "acorn", "toadstool", "fern", "pinecone",
                 "hedgehog", "squirrel", "owl", "mossy glade"),
    "space": ("galaxy", "cosmic", "astronaut", "planet", "rocket", "starry", "lunar", "comet",
              "constellation", "nebula", "solar system", "moon landing"),
    "tropical": ("tropical", "jungle", "palm leaf", "parrot", "toucan", "hibiscus", "pineapple",
                 "flamingo", "monstera", "coconut", "rainforest", "hawaiian"),
    "festive": ("festive", "christmas", "reindeer", "snowflake", "santa", "mistletoe", "holly",
                "gingerbread", "nutcracker", "sleigh", "snowman", "yuletide"),
    "industrial": ("industrial", "factory", "urban loft", "riveted", "pipework", "workshop",
                   "warehouse", "gearwheel", "steampunk", "mechanic", "foundry", "exposed bolt"),
    "farmhouse": ("farmhouse", "barnyard", "country cottage", "rooster", "hay bale", "tractor",
                  "homestead", "milk churn", "dairy cow", "harvest", "piglet", "shepherd"),
    "victorian": ("victorian", "antique", "heirloom", "edwardian", "baroque", "rococo", "damask",
                  "pocket watch", "cameo", "regency", "vintage", "aristocrat"),
    "japanese": ("japanese", "zen", "cherry blossom", "bonsai", "kimono", "origami", "koi carp",
                 "samurai", "pagoda", "tokyo", "kyoto", "sumi-e"),
    "gothic": ("gothic", "skull", "raven", "vampire", "bat wing", "witch", "cauldron", "haunted",
               "spider web", "coffin", "tombstone", "ghost"),
    "floral": ("floral", "rose", "peony", "tulip", "lavender", "daisy", "wildflower", "botanical",
               "bouquet", "poppy", "hydrangea", "petal"),
    "sport": ("football", "goalkeeper", "cricket", "tennis", "rugby", "stadium", "championship",
              "marathon", "cyclist", "golf", "basketball", "athlete"),
    "music": ("guitar", "jazz", "piano", "vinyl record", "saxophone", "rock band", "drummer",
              "melody", "orchestra", "violin", "trumpet", "disco"),
    "dinosaur": ("dinosaur", "jurassic", "tyrannosaurus", "fossil", "prehistoric", "triceratops",
                 "stegosaurus", "velociraptor", "mammoth", "caveman", "pterodactyl", "diplodocus"),
    "safari": ("safari", "lion", "zebra", "elephant", "giraffe", "leopard", "savannah", "cheetah",
               "rhinoceros", "hippo", "antelope", "serengeti"),
    "western": ("cowboy", "rodeo", "ranch", "lasso", "saloon", "cactus", "wild west", "horseshoe",
                "sheriff", "bandana", "stagecoach", "mustang"),
}
"""Hidden attribute 1: theme -> the words that express it."""

MATERIALS: dict[str, tuple[str, ...]] = {
    "wood": ("oak", "walnut", "bamboo", "pine", "teak", "beech"),
    "metal": ("brass", "copper", "steel", "iron", "pewter", "enamel"),
    "glass": ("glass", "crystal", "frosted glass", "recycled glass"),
    "ceramic": ("ceramic", "stoneware", "porcelain", "terracotta", "earthenware"),
    "textile": ("cotton", "linen", "wool", "velvet", "tweed", "corduroy"),
    "wicker": ("rattan", "wicker", "jute", "seagrass", "raffia"),
    "stone": ("marble", "slate", "granite", "terrazzo"),
    "leather": ("leather", "suede", "faux leather", "nubuck"),
}
"""Hidden attribute 2: family of materials -> the words that express it."""

KINDS = (
    Kind("mug", ("mug", "coffee cup"), "kitchen", 9, ("ceramic", "metal", "glass")),
    Kind("teapot", ("teapot", "tea pot"), "kitchen", 24, ("ceramic", "metal", "glass")),
    Kind("serving tray", ("serving tray", "tray"), "kitchen", 22, ("wood", "metal", "wicker")),
    Kind("chopping board", ("chopping board", "cutting board"), "kitchen", 19, ("wood", "stone")),
    Kind("storage jar", ("storage jar", "food container"), "kitchen", 14, ("glass", "ceramic")),
    Kind("apron", ("apron", "cooking apron"), "kitchen", 17, ("textile", "leather")),
    Kind("dinner plate", ("dinner plate", "dish"), "dining", 11, ("ceramic", "wood", "metal")),
    Kind("table runner", ("table runner", "tablecloth"), "dining", 18, ("textile", "wicker")),
    Kind("napkin ring set", ("napkin rings", "napkin holders"), "dining", 12, ("metal", "wood")),
    Kind("coaster set", ("coasters", "drinks mats"), "dining", 10, ("stone", "wood", "leather")),
    Kind("salad bowl", ("salad bowl", "serving bowl"), "dining", 26, ("wood", "glass", "ceramic")),
    Kind("tumbler", ("tumbler", "drinking glass"), "dining", 8, ("glass", "metal")),
    Kind("cushion", ("cushion", "throw pillow"), "living room", 20, ("textile", "leather")),
    Kind("throw blanket", ("throw", "blanket"), "living room", 38, ("textile",)),
    Kind("table lamp", ("table lamp", "lamp"), "living room", 55, ("metal", "ceramic", "wood")),
    Kind("picture frame", ("picture frame", "photo frame"), "living room", 16, ("wood", "metal")),
    Kind("wall clock", ("wall clock", "clock"), "living room", 35, ("wood", "metal", "stone")),
    Kind("vase", ("vase", "flower vase"), "living room", 23, ("glass", "ceramic", "stone")),
    Kind("footstool", ("footstool", "pouffe"), "living room", 70, ("leather", "wicker", "textile")),
    Kind("bookends", ("bookends", "book holders"), "study", 27, ("stone", "metal", "wood")),
    Kind("notebook cover", ("notebook", "journal"), "study", 13, ("leather", "textile")),
    Kind("pen pot", ("pen pot", "pencil holder"), "study", 9, ("wood", "leather", "metal")),
    Kind("desk organiser", ("desk organiser", "desk tidy"), "study", 25,
         ("wood", "metal", "leather")),
    Kind("duvet cover", ("duvet cover", "bedding"), "bedroom", 48, ("textile",)),
    Kind("bedside rug", ("rug", "small carpet"), "bedroom", 60, ("textile", "wicker")),
    Kind("jewellery box", ("jewellery box", "trinket box"), "bedroom", 29,
         ("wood", "leather", "glass")),
    Kind("mirror", ("mirror", "wall mirror"), "bedroom", 65, ("wood", "metal", "wicker")),
    Kind("soap dish", ("soap dish", "soap holder"), "bathroom", 8, ("ceramic", "stone", "wood")),
    Kind("bath towel", ("towel", "bath towel"), "bathroom", 15, ("textile",)),
    Kind("laundry basket", ("laundry basket", "hamper"), "bathroom", 34, ("wicker", "textile")),
    Kind("plant pot", ("plant pot", "planter"), "garden", 16, ("ceramic", "stone", "metal")),
    Kind("lantern", ("lantern", "candle lantern"), "garden", 21, ("metal", "glass", "wicker")),
    Kind("bird feeder", ("bird feeder", "bird table"), "garden", 18, ("wood", "metal", "glass")),
    Kind("doormat", ("doormat", "door mat"), "hallway", 17, ("wicker", "textile")),
    Kind("coat hook rail", ("coat hooks", "coat rack"), "hallway", 28, ("wood", "metal")),
    Kind("tote bag", ("tote bag", "shopping bag"), "hallway", 14, ("textile", "leather", "wicker")),
)

BRANDS = (
    "Alderbrook", "Bexley & Co", "Caldermoor", "Dunwick", "Elmstead", "Fernley", "Garrick",
    "Hollis", "Ivybridge", "Jessop", "Kettleby", "Larkhill", "Marlowe", "Northcote", "Ormsby",
    "Penrose", "Quillfeather", "Rosedene", "Stanmore", "Thornbury", "Underhill", "Verity",
    "Wexcombe", "Yarrow", "Zennor",
)
COLOURS = (
    "black", "white", "ivory", "grey", "navy", "teal", "sage green", "mustard", "brick red",
    "burgundy", "blush pink", "lilac", "charcoal", "cream",
)
CHEAP_WORDS = ("cheap", "budget", "affordable", "bargain")
DEAR_WORDS = ("luxury", "premium", "designer", "high end")
_MOTIFS = ("design", "motif", "print", "pattern", "theme")
_OCCASIONS = ("gift", "for my home", "set of two", "present for a friend", "sale")
# fmt: on

KIND_FAMILIES: NDArray[np.bool_] = np.array(
    [[family in kind.families for family in MATERIALS] for kind in KINDS]
)
"""Bool [kinds, families]; True where things of the kind are made of the family."""


@dataclass(frozen=True)
class Attributes:
    """What a batch of texts is about; :data:`NONE` where a text does not mention it.

    Args:
        kind: int [Q], index into :data:`KINDS`.
        theme: int [Q], index into :data:`THEMES`.
        second_theme: int [Q], a further theme; its word stands at the end of a title.
        family: int [Q], index into :data:`MATERIALS`.
    """

    kind: NDArray[np.int64]
    theme: NDArray[np.int64]
    second_theme: NDArray[np.int64]
    family: NDArray[np.int64]


def titles(rng: np.random.Generator, about: Attributes, brand: NDArray[np.int64]) -> pa.Array:
    """Word the titles of items, string [I], in two orders of words.

    *"lighthouse oak serving tray with anchor motif by Larkhill"*,
    *"navy serving tray - lighthouse and anchor"*.
    """
    size = len(brand)
    # Where there is no second theme, most titles name their only theme in another word again.
    named_again = np.where(rng.random(size) < 0.85, about.theme, NONE)
    tail_theme = np.where(about.second_theme == NONE, named_again, about.second_theme)
    theme_word, tail_word = _members(rng, THEMES, about.theme, tail_theme)
    has_tail = tail_theme != NONE
    motif = _where(has_tail & (rng.random(size) < 0.5), _any(rng, _MOTIFS, size))
    family = np.where(rng.random(size) < 0.7, about.family, NONE)
    (material,) = _members(rng, MATERIALS, family)
    colour = _any(rng, COLOURS, size, share=0.15)
    kind = pa.array([kind.name for kind in KINDS]).take(pa.array(about.kind))
    has_maker = rng.random(size) < 0.4
    maker = _where(has_maker, pa.array(BRANDS).take(pa.array(brand)))
    with_tail = [_where(has_tail, "with"), tail_word, motif]
    and_tail = [_where(has_tail, "and"), tail_word, motif]
    plain = _join(colour, theme_word, material, kind, *with_tail, _where(has_maker, "by"), maker)
    turned = _join(maker, colour, material, kind, "-", theme_word, *and_tail)
    return pc.if_else(pa.array(rng.random(size) < 0.6), plain, turned)


def queries(
    rng: np.random.Generator, about: Attributes, price_level: NDArray[np.float32]
) -> pa.Array:
    """Word search texts, string [Q], such as *"cheap nautical anchor tray"*.

    Args:
        rng: Source of the wording.
        about: What is searched for; a second theme is one more word beside the first.
        price_level: float [Q], in standard deviations; who likes it cheap or dear may say so.
    """
    size = len(price_level)
    says_price = (np.abs(price_level) > 0.5) & (rng.random(size) < 0.2)
    cheap = _any(rng, CHEAP_WORDS, size)
    price = pc.if_else(pa.array(price_level < 0), cheap, _any(rng, DEAR_WORDS, size))
    return _join(
        _where(says_price, price),
        _any(rng, COLOURS, size, share=0.08),
        *_members(rng, THEMES, about.theme, about.second_theme),
        *_members(rng, MATERIALS, about.family),
        *_members(rng, {kind.name: kind.query_words for kind in KINDS}, about.kind),
        _any(rng, _OCCASIONS, size, share=0.08),
    )


def _any(
    rng: np.random.Generator, words: Sequence[str], size: int, *, share: float = 1.0
) -> pa.Array:
    """Any of the words in a ``share`` of the rows, null in the others."""
    left_out = rng.random(size) >= share
    return pa.array(words).take(pa.array(rng.integers(len(words), size=size), mask=left_out))


def _members(
    rng: np.random.Generator,
    groups: Mapping[str, Sequence[str]],
    group: NDArray[np.int64],
    second_group: NDArray[np.int64] | None = None,
) -> list[pa.Array]:
    """Any word of each row's group, null where it is NONE; then a different one of the second."""
    sizes = np.array([len(words) for words in groups.values()])
    starts = np.cumsum(sizes) - sizes
    words = pa.array([word for words in groups.values() for word in words])
    index = np.floor(rng.random(len(group)) * sizes[group]).astype(np.int64)
    chosen = [words.take(pa.array(starts[group] + index, mask=group == NONE))]
    if second_group is not None:
        step = np.floor(rng.random(len(group)) * (sizes[second_group] - 1)).astype(np.int64)
        index = (index + 1 + step) % sizes[second_group]
        mask = second_group == NONE
        chosen.append(words.take(pa.array(starts[second_group] + index, mask=mask)))
    return chosen


def _where(condition: NDArray[np.bool_], word: pa.Array | str) -> pa.Array:
    """Put the word where the condition holds, null elsewhere."""
    return pc.if_else(pa.array(condition), word, pa.scalar(None, pa.string()))


def _join(*pieces: pa.Array | str) -> pa.Array:
    """Join the pieces of each row with single spaces; null pieces are left out."""
    return pc.binary_join_element_wise(*pieces, " ", null_handling="skip")
