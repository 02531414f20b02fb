"""What a training minimises: configs with their formula. Each sees the similarities of a whole global batch; one file each.

The formulas are those of sentence-transformers (the tests hold them equal to its losses, value and gradient). They stand
here because the library's are functions of columns: one text a row in each. Three things do not fit into columns:
queries with fewer negatives than others (a repeated one would count twice), a passage that is several queries'
negative, and passages that are known to be relevant to a query and are therefore no negatives of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from pydantic import Field

from dagr_ray.core.config import Config

if TYPE_CHECKING:
    from torch import Tensor


Temperature = Annotated[float, Field(gt=0)]


class Scored(NamedTuple):
    """A global batch of ``b`` queries and ``p`` different passages, the same on every worker."""

    cosine: Tensor  # [b, p]
    positive: Tensor  # [b]: the column of each query's own passage
    own: Tensor  # [b, k]: the columns of its own negatives; any column where it has fewer than k
    given: Tensor  # [b, k]: whether there is such a negative
    known: Tensor  # [m, 2]: (query, passage) that are relevant besides the positive: never negatives in the batch
    teacher: Tensor  # [b, 1 + k]: the scores of the positive and the own negatives; NaN where there is none

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Cosines of the positive and the own negatives [b, 1 + k], and which of these there are."""
        import torch

        columns = torch.cat([self.positive[:, None], self.own], 1)
        there = torch.cat([torch.ones_like(self.positive, dtype=torch.bool)[:, None], self.given], 1)
        return self.cosine.gather(1, columns), there


class Loss(Config):
    """One term of a training's weighted sum."""

    abstract: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False  # a teacher's, for the positive and every negative
    weight: Annotated[float, Field(gt=0)] = 1.0

    def value(self, batch: Scored) -> Tensor:
        """The mean over the queries of a batch, without ``weight``."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it minimises")

    def negatives(self, batch: Scored) -> int:
        """(query, negative) pairs that enter the value."""
        return int(batch.given.sum())
