"""Low-rank adapters: train a large base through a few new weights, and merge them into the base at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from dagr_ray.core.config import Config, ConfigError
from dagr_ray.retrieval.encoder import transformers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class LoRA(Config):
    """Adapters of ``rank`` on the linear layers whose names end in one of ``targets`` (all layers if it is empty).

    Source: Hu et al. 2021, arXiv 2106.09685, implemented by peft. The trained model is saved with merged adapters, so it
    can be loaded without peft.
    """

    type: ClassVar[str] = "lora"
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ConfigError if peft is not installed."""
        try:
            import peft  # noqa: F401
        except ImportError:
            raise ConfigError("lora: peft is not installed; pip install peft") from None


def adapt(model: SentenceTransformer, lora: LoRA, seed: int) -> None:
    """Adds adapters to the transformer and freezes all other weights, in place."""
    import torch

    torch.manual_seed(seed)  # the same adapters on every worker and after a restart
    for transformer in transformers(model):
        transformer.model = with_adapters(transformer.auto_model, lora, "FEATURE_EXTRACTION")


def with_adapters(model: Any, lora: LoRA, task: str) -> Any:
    """A model of transformers with adapters for a task of peft. Raises ConfigError if no layer has a name of ``targets``."""
    import peft

    options = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it scales by a number
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
        task_type=peft.TaskType[task],
    )
    try:
        return peft.get_peft_model(model, options)
    except ValueError as error:
        raise ConfigError(f"lora: targets = {lora.targets}: {' '.join(str(error).split())[:200]}") from error


def merge(model: SentenceTransformer) -> None:
    """Merges the adapters into the weights of their layers and removes them, in place."""
    for transformer in transformers(model):
        transformer.model = transformer.model.merge_and_unload()
