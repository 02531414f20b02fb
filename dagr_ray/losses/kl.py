"""KL divergence to a teacher's distribution over the candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dagr_ray.losses import Loss, LossBatch, Temperature

if TYPE_CHECKING:
    from torch import Tensor


class KL(Loss):
    """Kullback-Leibler divergence of the student's softmax over positive and own negatives from the teacher's.

    Student: cosine / ``temperature``; teacher: score / ``teacher_temperature``. Sources: Lin et al. 2020, arXiv
    2010.11386; listwise over mined negatives: Ren et al. 2021 (RocketQAv2), arXiv 2110.07367. Unlike in Hinton et al., the
    loss is not multiplied by the squared temperature, which at 0.05 would make it 400 times as small as InfoNCE.
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "kl"
    needs_scores: ClassVar[bool] = True
    teacher_temperature: Temperature = 0.5
    temperature: Temperature = 0.05

    def value(self, batch: LossBatch) -> Tensor:
        import torch
        from torch.nn.functional import kl_div

        cosine, mask = batch.candidates()
        # finite, because 0 times infinity is NaN
        student = (cosine / self.temperature).masked_fill(~mask, -1e9).log_softmax(1)
        teacher = (batch.teacher / self.teacher_temperature).masked_fill(~mask, -torch.inf).softmax(1)
        return kl_div(student, teacher, reduction="batchmean")
