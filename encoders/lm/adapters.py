"""Low-rank adapters: learn few weights beside the linear layers, then add them to the layers."""

from typing import Any

import torch

from feature_repo.errors import EncoderError


class Adapters:
    """Adapters of all linear layers but the head; everything else keeps its weights.

    Args:
        model: A causal model; changed in place.
        rank: Inner width of an adapter.
        seed: Of their random beginning; at first they change nothing.

    Raises:
        EncoderError: If the package peft is not installed.

    Source:
        Hu et al., "LoRA", ICLR 2022, arXiv:2106.09685, with its scale alpha / rank = 2.
    """

    def __init__(self, model: Any, rank: int, seed: int) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise EncoderError(
                "--lora-rank needs the package peft, which is not installed: run "
                "`pip install 'longtrail[lora]'`, or leave the option out to learn all weights"
            ) from error
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._whole = get_peft_model(model, config)
        self.model: Any = self._whole.base_model.model
        """The causal model with its adapters, of the same class as before."""

    def merged(self) -> Any:
        """The causal model without adapters, what they learned added to its weights."""
        return self._whole.merge_and_unload()
