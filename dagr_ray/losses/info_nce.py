"""InfoNCE: the positive against all other passages of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from dagr_ray.losses import Loss, LossBatch, Temperature

if TYPE_CHECKING:
    from torch import Tensor


class InfoNCE(Loss):
    """Cross-entropy of each query's passage against all other passages of the global batch, at cosine / ``temperature``.

    Sources: van den Oord et al. 2018, arXiv 1807.03748; in-batch negatives: Henderson et al. 2017, arXiv 1705.00652.
    ``two_sided`` averages this with the loss of each passage's query against all other queries (Günther et al. 2023, arXiv
    2310.19923). ``cached`` is the number of texts computed at once, with the same gradients as for the whole batch, so that
    a batch need not fit into memory (gradient caching: Gao et al. 2021, arXiv 2101.06983); it applies to the whole sum of
    losses.

    >>> InfoNCE(temperature=0.02).cached is None
    True
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "info-nce"
    temperature: Temperature = 0.05
    two_sided: bool = False
    cached: Annotated[int, Field(ge=1)] | None = None

    def value(self, batch: LossBatch) -> Tensor:
        import torch
        from torch.nn.functional import cross_entropy

        scores = batch.cosine / self.temperature
        query, passage = batch.other_positives.unbind(1)
        masked = scores.index_put((query, passage), scores.new_tensor(-torch.inf))
        forward = cross_entropy(masked, batch.positive)
        if not self.two_sided:
            return forward
        # row j: the passage of query j against all queries, without the other queries that it is relevant to
        back = masked[:, batch.positive].T
        same_passage = (batch.positive[:, None] == batch.positive).fill_diagonal_(False)
        targets = torch.arange(len(back), device=back.device)
        return (forward + cross_entropy(back.masked_fill(same_passage, -torch.inf), targets)) / 2

    def negatives(self, batch: LossBatch) -> int:
        queries, passages = batch.cosine.shape
        return queries * (passages - 1) - len(batch.other_positives)
