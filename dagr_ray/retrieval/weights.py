"""What is changed of a transformer's weights before it is used: fewer layers, layers that were never trained."""

from __future__ import annotations

from typing import Any

from dagr_ray.core.config import ConfigError
from dagr_ray.core.tables import seed_of


def keep_layers(transformer: Any, layers: int) -> None:
    """Drops all but the first layers, in place. Raises ConfigError where there are not so many."""
    import torch

    stack = next((m for m in transformer.modules() if isinstance(m, torch.nn.ModuleList)), None)
    if stack is None or len(stack) < layers:
        raise ConfigError(f"encoder: layers = {layers}: the model has {len(stack or [])}; give no more than that")
    del stack[layers:]
    transformer.config.num_hidden_layers = layers


def reinitialise(transformer: Any, seed: int) -> None:
    """Draws all weights outside the embeddings as BERT does: matrices from N(0, initializer_range), norms 1, biases 0.

    Source: Devlin et al., arXiv 1810.04805, and the initialisation in its code. Each matrix has a seed of its own, made
    from its name, so that the order in which a library lists them does not matter.
    """
    import torch

    embeddings = getattr(transformer, "embeddings", None) or transformer.get_input_embeddings()
    kept = {id(parameter) for parameter in embeddings.parameters()}
    deviation = getattr(transformer.config, "initializer_range", 0.02)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if id(parameter) in kept:
                continue
            if parameter.ndim > 1:
                generator = torch.Generator().manual_seed(seed_of(seed, name))
                drawn = torch.empty(parameter.shape).normal_(0, deviation, generator=generator)
                parameter.copy_(drawn)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
