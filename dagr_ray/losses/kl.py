"""KL divergence to a teacher's distribution over the candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dagr_ray.losses import Loss, Scored, Temperature

if TYPE_CHECKING:
    from torch import Tensor


class KL(Loss):
    """Kullback-Leibler divergence of the student's softmax over positive and own negatives from the teacher's.

    Student: cosine / ``temperature``; teacher: score / ``teacher_temperature``. Sources: Lin et al. 2020, arXiv
    2010.11386; listwise over mined negatives: Ren et al. 2021 (RocketQAv2), arXiv 2110.07367. Not multiplied by the squared
    temperature as in Hinton et al.: at 0.05 that would make it 400 times as small as InfoNCE beside it.
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "kl"
    needs_scores: ClassVar[bool] = True
    teacher_temperature: Temperature = 0.5
    temperature: Temperature = 0.05

    def value(self, batch: Scored) -> Tensor:
        import torch
        from torch.nn.functional import kl_div

        cosine, there = batch.candidates()
        # not infinite: nothing times infinity is no number
        student = (cosine / self.temperature).masked_fill(~there, -1e9).log_softmax(1)
        teacher = (batch.teacher / self.teacher_temperature).masked_fill(~there, -torch.inf).softmax(1)
        return kl_div(student, teacher, reduction="batchmean")
