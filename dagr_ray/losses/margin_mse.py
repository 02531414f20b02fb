"""MarginMSE: the squared error to a teacher's score margins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from dagr_ray.losses import Loss, LossBatch

if TYPE_CHECKING:
    from torch import Tensor


class MarginMSE(Loss):
    """Squared error of ``scale`` x (cosine of the positive - of a negative) to the teacher's margin, over own negatives.

    Source: Hofstätter et al. 2020, arXiv 2010.02666. Two cosines differ by at most 2: choose ``scale`` so that the
    teacher's margins are reachable.
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "margin-mse"
    needs_scores: ClassVar[bool] = True
    scale: Annotated[float, Field(gt=0)] = 1.0

    def value(self, batch: LossBatch) -> Tensor:
        cosine, _ = batch.candidates()
        margin = self.scale * (cosine[:, :1] - cosine[:, 1:])
        target = batch.teacher[:, :1] - batch.teacher[:, 1:]
        return (margin - target)[batch.has_negative].square().mean()
