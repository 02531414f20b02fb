"""Training losses as configs. Each loss sees the similarities of a whole global batch; one file each.

The formulas equal those of sentence-transformers (tests compare value and gradient). They are implemented here because the
library's losses take columns with one text per row. Columns cannot express queries with fewer negatives than others (a
repeated negative would count twice), a passage that is a negative of several queries, and passages known to be relevant
to a query, which must not be its negatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from pydantic import Field

from dagr_ray.core.config import Config

if TYPE_CHECKING:
    from torch import Tensor


Temperature = Annotated[float, Field(gt=0)]


class LossBatch(NamedTuple):
    """A global batch of ``b`` queries and ``p`` different passages, the same on every worker."""

    cosine: Tensor  # [b, p]
    positive: Tensor  # [b]: the column of each query's positive
    negative: Tensor  # [b, k]: the columns of its own negatives, padded to k with any column
    has_negative: Tensor  # [b, k]: false for padding
    other_positives: Tensor  # [m, 2]: further relevant (query, passage) pairs, which are never negatives
    teacher: Tensor  # [b, 1 + k]: the teacher's scores of the positive and the own negatives; NaN if missing

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Cosines of the positive and the own negatives [b, 1 + k], and a mask without the padding."""
        import torch

        columns = torch.cat([self.positive[:, None], self.negative], 1)
        mask = torch.cat([torch.ones_like(self.positive, dtype=torch.bool)[:, None], self.has_negative], 1)
        return self.cosine.gather(1, columns), mask


class Loss(Config):
    """One term of a training's weighted sum."""

    abstract: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False  # needs a teacher's scores of the positive and every negative
    weight: Annotated[float, Field(gt=0)] = 1.0

    def value(self, batch: LossBatch) -> Tensor:
        """The mean over the queries of a batch, without ``weight``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement value")

    def negatives(self, batch: LossBatch) -> int:
        """The number of (query, negative) pairs that enter the value."""
        return int(batch.has_negative.sum())
