"""Changes to a transformer's weights after loading: fewer layers, or re-initialised layers."""

from __future__ import annotations

from typing import Any

from dagr_ray.core.config import ConfigError
from dagr_ray.core.tables import seed_of


def keep_layers(transformer: Any, layers: int) -> None:
    """Drops all but the first ``layers`` layers, in place. Raises ConfigError if the model has fewer."""
    import torch

    stack = next((m for m in transformer.modules() if isinstance(m, torch.nn.ModuleList)), None)
    if stack is None or len(stack) < layers:
        raise ConfigError(f"encoder: layers = {layers}, but the model has {len(stack or [])}; give at most that many")
    del stack[layers:]
    transformer.config.num_hidden_layers = layers


def reinitialise(transformer: Any, seed: int) -> None:
    """Re-initialises all weights outside the embeddings like BERT: matrices from N(0, initializer_range), norms 1, biases 0.

    Source: Devlin et al., arXiv 1810.04805, and the initialisation in its code. The seed of each matrix depends on its
    name, so that the library's order of the weights does not matter.
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
                parameter.copy_(torch.empty(parameter.shape).normal_(0, deviation, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
