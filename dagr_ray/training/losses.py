"""What a training minimises: configs with their formula. Each sees the similarities of a whole global batch.

The formulas are those of sentence-transformers (the tests hold them equal to its losses, value and gradient). They stand
here because the library's are functions of columns: one text a row in each. Three things do not fit into columns:
queries with fewer negatives than others (a repeated one would count twice), a passage that is several queries'
negative, and passages that are known to be relevant to a query and are therefore no negatives of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from pydantic import Field

from dagr_ray.config import Config

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


class InfoNCE(Loss):
    """Cross-entropy of each query's passage against all other passages of the global batch, at cosine / ``temperature``.

    Sources: van den Oord et al. 2018, arXiv 1807.03748; in-batch negatives: Henderson et al. 2017, arXiv 1705.00652.
    ``two_sided`` takes the mean with each passage's query against all other queries (Günther et al. 2023, arXiv
    2310.19923). ``cached`` computes so many texts at once and gives the gradients of the whole batch all the same, so
    that a batch need not fit into memory (gradient caching: Gao et al. 2021, arXiv 2101.06983); it holds for the whole
    sum of losses.

    >>> InfoNCE(temperature=0.02).cached is None
    True
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "info-nce"
    temperature: Temperature = 0.05
    two_sided: bool = False
    cached: Annotated[int, Field(ge=1)] | None = None

    def value(self, batch: Scored) -> Tensor:
        import torch
        from torch.nn.functional import cross_entropy

        scores = batch.cosine / self.temperature
        query, passage = batch.known.unbind(1)
        masked = scores.index_put((query, passage), scores.new_tensor(-torch.inf))
        forward = cross_entropy(masked, batch.positive)
        if not self.two_sided:
            return forward
        # row j: the passage of query j against all queries, without those that it is relevant to besides
        back = masked[:, batch.positive].T
        also = (batch.positive[:, None] == batch.positive).fill_diagonal_(False)
        targets = torch.arange(len(back), device=back.device)
        return (forward + cross_entropy(back.masked_fill(also, -torch.inf), targets)) / 2

    def negatives(self, batch: Scored) -> int:
        queries, passages = batch.cosine.shape
        return queries * (passages - 1) - len(batch.known)


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
