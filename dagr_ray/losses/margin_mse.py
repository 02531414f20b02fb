"""MarginMSE: a teacher's differences of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from dagr_ray.losses import Loss, Scored

if TYPE_CHECKING:
    from torch import Tensor


class MarginMSE(Loss):
    """Squared error of ``scale`` x (cosine of the positive - of a negative) to the teacher's margin, over own negatives.

    Source: Hofstätter et al. 2020, arXiv 2010.02666. Cosines differ by 2 at most: set ``scale`` to what makes the
    teacher's margins reachable.
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "margin-mse"
    needs_scores: ClassVar[bool] = True
    scale: Annotated[float, Field(gt=0)] = 1.0

    def value(self, batch: Scored) -> Tensor:
        cosine, _ = batch.candidates()
        margin = self.scale * (cosine[:, :1] - cosine[:, 1:])
        wanted = batch.teacher[:, :1] - batch.teacher[:, 1:]
        return (margin - wanted)[batch.given].square().mean()
