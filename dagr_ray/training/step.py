"""One training step on any number of workers: distribute the texts of a batch, embed them, gather, compute one loss.

Every worker computes the loss of the whole global batch from all embeddings, of which only its own carry gradients. The
workers' gradients then add up to the gradients of a single worker. DDP and FSDP average gradients, so each is first
multiplied by the number of workers. The number of workers therefore changes only the order of additions: negatives are
addressed by index instead of position (sentence-transformers #3453, #3862), and a batch need not be divisible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, _create_minibatch
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn

from dagr_ray.losses import Loss, LossBatch
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.retrieval.encoder import TASKS, Task
from dagr_ray.training.batches import rows_of
from dagr_ray.training.texts import Data, Texts

# The least and most texts of one forward pass, sorted by length. A pass ends when its padding would exceed a share of its
# tokens. Small passes cost nothing on a CPU; a GPU needs large ones.
LEAST, TEXTS = {"cpu": 4, "cuda": 32}, {"cpu": 16, "cuda": 128}
SLACK = 0.04


class Collator:
    """Turns a batch of example numbers into one worker's share: its texts as tokens, and the labels for the loss.

    The different passages of a batch are embedded once. They are sorted by length and distributed in turn, so that workers
    get similar numbers of tokens. A worker without any text takes the first one, whose embedding is not used.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        data: Data,
        prompts: tuple[str, str],
        rank: int = 0,
        workers: int = 1,
        texts: int | None = None,  # texts of one pass; None means by their lengths
        even: bool = False,  # the same number of passes on each worker, as sharded weights require
    ) -> None:
        self.model, self.data, self.prompts = model, data, prompts
        self.rank, self.workers, self.even = rank, workers, even
        self.texts = texts or (TEXTS.get(model.device.type, TEXTS["cuda"]) if even else None)
        self.tally: Counter[str] = Counter()

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        examples = self.data.examples
        rows = rows_of(examples, numbers)
        passages = np.unique(np.array([p for row in rows for p in (row.positive, *row.negatives)]))
        passages = passages[np.argsort(self.data.passages.bytes[passages], kind="stable")]
        queries = np.array([row.query for row in rows])
        by_length = np.argsort(self.data.queries.bytes[queries], kind="stable")
        rows, queries = [rows[i] for i in by_length], queries[by_length]
        column = {int(p): i for i, p in enumerate(passages)}
        widest = max(len(row.negatives) for row in rows)
        negative = torch.zeros(len(rows), widest, dtype=torch.long)
        has_negative = torch.zeros(len(rows), widest, dtype=torch.bool)
        teacher = torch.full((len(rows), 1 + widest), torch.nan)
        other_positives = []
        for i, (row, number) in enumerate(zip(rows, np.asarray(numbers)[by_length], strict=True)):
            negative[i, : len(row.negatives)] = torch.tensor([column[p] for p in row.negatives], dtype=torch.long)
            has_negative[i, : len(row.negatives)] = True
            first, last = examples.starts[number], examples.starts[number + 1]
            teacher[i, 0] = float(examples.positive_score[number])
            teacher[i, 1 : 1 + last - first] = torch.from_numpy(examples.negative_scores[first:last].copy())
            relevant = set(examples.relevant(row.query).tolist()) - {row.positive}
            other_positives += [(i, column[p]) for p in relevant if p in column]
        features: dict[str, Any] = {"return_loss": True}
        back, cuts = {}, []
        for name, texts, of, prompt, task in zip(
            ("query", "passage"), (self.data.queries, self.data.passages), (queries, passages), self.prompts, TASKS,
            strict=True,
        ):  # fmt: skip
            tokens, back[name], cut = self._tokens(texts, of, prompt, task)
            cuts.append(cut)
            features |= {f"{name}_{key}": value for key, value in tokens.items()}
        features["label"] = {
            "positive": torch.tensor([column[row.positive] for row in rows]),
            "negative": negative,
            "has_negative": has_negative,
            "other_positives": torch.tensor(other_positives, dtype=torch.long).reshape(-1, 2),
            "teacher": teacher,
            "back": [back["query"], back["passage"]],
            "total": [len(queries), len(passages)],
            "passes": cuts,
        }
        self.tally["samples"] += len(rows) if self.rank == 0 else 0
        return features

    def _tokens(
        self, texts: Texts, numbers: np.ndarray, prompt: str, task: Task
    ) -> tuple[dict[str, Any], Tensor, list[tuple[int, int]]]:
        """This worker's texts, short ones first, the position of each of its embeddings, and the passes over them."""
        share = numbers[self.rank :: self.workers]
        least = -(-len(numbers) // self.workers) if self.even else 1
        share = np.concatenate([share, np.repeat(numbers[:1], max(least - len(share), 0))])
        tokens = self.model.preprocess(texts.read(share), prompt=prompt or None, task=task)
        tokens["task"] = task  # a router that is not the first module reads it here
        if "attention_mask" not in tokens:  # static word embeddings: nothing is padded, and nothing can be split
            return tokens, torch.arange(len(share)), [(0, len(share))]
        lengths = tokens["attention_mask"].sum(1)
        order = lengths.argsort(stable=True)
        for key, value in tokens.items():
            if torch.is_tensor(value) and value.ndim and len(value) == len(share):
                tokens[key] = value[order]
        sizes, device = lengths[order].tolist(), self.model.device.type
        cut = passes(sizes, LEAST.get(device, LEAST["cuda"]), TEXTS.get(device, TEXTS["cuda"]))
        if self.texts is not None:
            cut = [(i, min(i + self.texts, len(sizes))) for i in range(0, len(sizes), self.texts)]
        # computed tokens: each pass is as wide as its longest text (padding is at the end, see `loop`)
        self.tally["padded"] += sum((stop - start) * sizes[stop - 1] for start, stop in cut)
        self.tally["tokens"] += sum(sizes)
        return tokens, order.argsort(), cut


def passes(lengths: Sequence[int], least: int, most: int) -> list[tuple[int, int]]:
    """Splits texts of ascending length into ranges of ``least`` to ``most`` texts with little padding.

    >>> passes([5, 5, 5, 9, 9, 10], 2, 4)
    [(0, 3), (3, 5), (5, 6)]
    """
    ranges, start, real = [], 0, 0
    for stop, length in enumerate(lengths):
        rows = stop - start
        if rows == most or (rows >= least and (rows + 1) * length > (1 + SLACK) * (real + length)):
            ranges.append((start, stop))
            start, real = stop, 0
        real += length
    return [*ranges, (start, len(lengths))]


class Objective(CachedLossMixin, nn.Module):
    """The weighted sum of ``losses`` over the global batch of all workers, as a loss of sentence-transformers.

    If a loss is ``cached``, gradients are cached (Gao et al. 2021, arXiv 2101.06983) by the library's implementation.
    ``tally`` counts the (query, negative) pairs of each loss.
    """

    def __init__(self, model: SentenceTransformer, losses: Sequence[Loss]) -> None:
        super().__init__()
        self.model, self.losses = model, tuple(losses)
        self.truncate_dim = model.truncate_dim  # training uses the same dimensions as search
        self.mini_batch_size = cached(losses) or 0
        self.uses_gradient_cache = cached(losses) is not None
        self.tally: Counter[str] = Counter()

    def forward(self, sentence_features: Any, labels: dict[str, Any]) -> Tensor:
        """The loss of the global batch, equal on every worker."""
        features = list(sentence_features)
        if self.uses_gradient_cache:
            return self.forward_cached(features, labels)
        parts = [
            [self.model(_part(texts, start, stop))["sentence_embedding"] for start, stop in ranges]
            for texts, ranges in zip(features, labels["passes"], strict=True)
        ]
        loss = self._value(parts, labels)
        workers = _workers()
        if loss.requires_grad and workers > 1:
            loss.register_hook(lambda gradient: gradient * workers)
        return loss

    def calculate_loss(self, reps: Any, labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """See ``CachedLossMixin``."""
        loss = self._value(reps, labels)
        if with_backward:
            (loss * _workers()).backward()
        return loss.detach()

    def _value(self, parts: list[list[Tensor]], labels: dict[str, Any]) -> Tensor:
        from torch.nn.functional import normalize

        own = [
            truncate_embeddings(torch.cat(passes)[back], self.truncate_dim)
            for passes, back in zip(parts, labels["back"], strict=True)
        ]
        queries, passages = (
            normalize(gather(share, total), dim=1) for share, total in zip(own, labels["total"], strict=True)
        )
        cosine = queries.float() @ passages.float().T
        batch = LossBatch(cosine, *(labels[name] for name in LossBatch._fields[1:]))
        for loss in self.losses:
            self.tally[loss.type] += loss.negatives(batch)
        return torch.stack([loss.weight * loss.value(batch) for loss in self.losses]).sum()


def _part(features: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return _create_minibatch(features, start, stop) if "attention_mask" in features else dict(features)


def cached(losses: Sequence[Loss]) -> int | None:
    """The smallest mini-batch for gradient caching among the losses; None if no loss uses it."""
    return min((loss.cached for loss in losses if isinstance(loss, InfoNCE) and loss.cached), default=None)


def _workers() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather(own: Tensor, total: int) -> Tensor:
    """The ``total`` embeddings of all workers in the order of distribution. Gradients flow to this worker's own only."""
    workers = _workers()
    if workers == 1:
        return own[:total]
    import torch.distributed as dist
    from torch.nn.functional import pad

    most = -(-total // workers)
    padded = pad(own, (0, 0, 0, most - len(own)))
    every = [torch.empty_like(padded) for _ in range(workers)]
    dist.all_gather(every, padded.detach().contiguous())
    every[dist.get_rank()] = padded
    return torch.stack(every, 1).flatten(0, 1)[:total]
