"""One step is one step: on 1, 2 and 4 workers, with every loss; and the losses are what their papers and peers say."""

import multiprocessing
import pickle
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import pairwise_cos_sim
from transformers import TrainerCallback

from dagr_ray.core.build import materialize
from dagr_ray.losses import LossBatch
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.losses.kl import KL
from dagr_ray.losses.margin_mse import MarginMSE
from dagr_ray.retrieval import encoder
from dagr_ray.training import loop, texts
from dagr_ray.training.settings import Settings
from tests.support.gradients import steps
from tests.support.toys import Toy, tiny

pytestmark = pytest.mark.slow

LOSSES = {
    "in-batch": (InfoNCE(),),
    "two-sided": (InfoNCE(two_sided=True),),
    "cached": (InfoNCE(cached=3),),
    "margin-mse": (MarginMSE(),),
    "kl": (KL(),),
    "sum": (InfoNCE(weight=0.1), MarginMSE(weight=0.5, scale=2), KL()),
    "cached-sum": (InfoNCE(weight=0.1, cached=2, two_sided=True), KL()),
}
# Clipping would make large gradients equal; the largest difference is taken before it (see gradients.Seen).
EVERY = {name: Settings(losses=each, steps=1, batch_size=8, precision="float32") for name, each in LOSSES.items()}
# weights in shares, one for each worker
EVERY |= {f"{name}-fsdp": replace(EVERY[name], fsdp=True) for name in ("sum", "cached-sum")}
# 7 rows are no multiple of 2 or 4; of 3 rows, one of 4 workers has no query
EVERY |= {f"{name}-of-7": replace(EVERY[name], batch_size=7) for name in LOSSES}
EVERY |= {f"{name}-of-3": replace(EVERY[name], batch_size=3) for name in ("two-sided", "cached-sum")}
# also stopped at the fourth step, and begun again
SAVED = {"saved": replace(EVERY["sum-fsdp"], steps=4, checkpoint_every=2)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(workers, rank) -> what each worker saw of each case."""
    out = tmp_path_factory.mktemp("steps")
    folder = materialize(Toy(n=24, negatives=(2, 1, 3), scored=True), str(out))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.gradients"])
    made = {}
    for workers in (1, 2, 4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        of = [
            context.Process(target=steps, args=(rank, workers, port, tiny(), folder, EVERY | SAVED, str(out)))
            for rank in range(workers)
        ]
        for each in of:
            each.start()
        try:
            for each in of:
                each.join(60)
                assert each.exitcode == 0, (workers, each.exitcode)
        finally:
            for each in of:
                each.kill()
        made |= {(workers, rank): pickle.loads((out / f"{workers}-{rank}").read_bytes()) for rank in range(workers)}
    return made


@pytest.mark.parametrize("case", EVERY)
def test_loss_and_gradients_are_equal_for_any_workers(found, case):
    (((step, loss),), gradients, counts, weights) = found[1, 0][case]
    assert step == 1 and loss > 0
    assert max(np.abs(g).max() for g in gradients.values()) > 1e-3
    for (workers, rank), cases in found.items():
        (((_, other),), theirs, counted, ended) = cases[case]
        assert other == pytest.approx(loss, abs=1e-5), workers
        assert theirs.keys() == gradients.keys()
        assert max(np.abs(theirs[name] - gradients[name]).max() for name in gradients) < 1e-5, workers
        assert counted["effective_negatives"] == counts["effective_negatives"]
        if rank == 0:
            assert ended.keys() == weights.keys()
            np.testing.assert_allclose([ended[name] for name in weights], list(weights.values()), atol=1e-5)


def test_weights_in_shares_go_on_from_their_checkpoint(found):
    for (workers, _), cases in found.items():
        (((step, loss),), gradients, counts, weights) = cases["saved"]
        (((_, again),), theirs, counted, ended) = cases["saved-resumed"]
        assert step == 4 and again == pytest.approx(loss, abs=1e-6), workers
        assert counted == counts and ended.keys() == weights.keys()
        assert max(np.abs(theirs[name] - gradients[name]).max() for name in gradients) < 1e-6, workers
        np.testing.assert_allclose([ended[name] for name in weights], list(weights.values()), atol=1e-6)


def test_gradient_caching_changes_nothing(found):
    (((_, one),), gradients, *_), (((_, other),), again, *_) = found[1, 0]["in-batch"], found[1, 0]["cached"]
    assert one == pytest.approx(other, abs=1e-6)
    assert max(np.abs(again[name] - gradients[name]).max() for name in gradients) < 1e-5


def test_the_negatives_of_a_query_are_those_of_arithmetic(tmp_path):
    """b rows with a negative of their own, all different: 2 b - 1 for each query."""
    folder = materialize(Toy(n=48), str(tmp_path))
    settings = Settings(losses=(InfoNCE(),), steps=3, batch_size=4, precision="float32")
    fitted = loop.fit(encoder.load(tiny(), device="cpu"), tiny(), texts.fetch(folder, folder, folder), settings)
    assert fitted.counts["repeats"] == 0 and fitted.samples == 12
    assert fitted.counts["effective_negatives"] == {"info-nce": 4 * 2 - 1}


def test_a_teachers_losses_meet_the_negatives_of_the_rows_alone(tmp_path):
    """Rows with 2, 1 and 3 negatives in turn, each once: 2 on average."""
    folder = materialize(Toy(n=24, negatives=(2, 1, 3), scored=True), str(tmp_path))
    settings = Settings(losses=(MarginMSE(), KL()), epochs=1, batch_size=5, precision="float32")
    fitted = loop.fit(encoder.load(tiny(), device="cpu"), tiny(), texts.fetch(folder, folder, folder), settings)
    assert fitted.counts["steps"] == 5 and fitted.samples == 24
    assert fitted.counts["effective_negatives"] == {"margin-mse": 2.0, "kl": 2.0} and fitted.counts["negatives"] == 2


class Rates(TrainerCallback):
    """The learning rate of each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **more):
        self.seen.append(more["lr_scheduler"].get_last_lr()[0])


def test_rates_fall_in_half_a_cosine_and_bf16_is_near_float32(tmp_path):
    folder = materialize(Toy(n=40), str(tmp_path))
    losses = {}
    for precision in ("float32", "bf16"):
        rates = Rates()
        settings = Settings(steps=10, batch_size=4, schedule="cosine", warmup=0.2, lr=1e-3, precision=precision)
        data, model = texts.fetch(folder, folder, folder), encoder.load(tiny(), device="cpu")
        losses[precision] = loop.fit(model, tiny(), data, settings, callbacks=[rates]).losses[-1][1]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        falling = [(1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)]
        np.testing.assert_allclose(rates.seen, np.multiply([0, 0.5, *falling], 1e-3), atol=1e-9)
    assert 1e-6 < abs(losses["bf16"] - losses["float32"]) < 0.05


# -- the formulas -----------------------------------------------------------------------------------------------------


def columns(b=5, k=3, d=8):
    """Embeddings of queries, positives and negatives, as the library has them, and the batch that they make."""
    drawn = torch.Generator().manual_seed(0)
    parts = [torch.randn(b, d, generator=drawn).requires_grad_() for _ in range(2 + k)]
    teacher = torch.randn(b, 1 + k, generator=drawn)
    unit = [torch.nn.functional.normalize(part, dim=1) for part in parts]
    own = torch.arange(b * k).reshape(k, b).T + b
    batch = LossBatch(
        unit[0] @ torch.cat(unit[1:]).T, torch.arange(b), own, torch.ones_like(own, dtype=torch.bool),
        torch.zeros(0, 2, dtype=torch.long), teacher,
    )  # fmt: skip
    return parts, batch


PEERS = {
    "in-batch": (InfoNCE(temperature=0.02), lambda: theirs.MultipleNegativesRankingLoss(None, scale=50), 1),
    "two-sided": (
        InfoNCE(two_sided=True),
        lambda: theirs.MultipleNegativesRankingLoss(
            None, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        ),
        1,
    ),
    "margin-mse": (
        MarginMSE(scale=3),
        lambda: theirs.MarginMSELoss(None, similarity_fct=lambda a, b: 3 * pairwise_cos_sim(a, b)),
        1,
    ),
    "kl": (
        KL(teacher_temperature=0.7, temperature=0.1),
        lambda: theirs.DistillKLDivLoss(
            None, similarity_fct=pairwise_cos_sim, student_temperature=0.1, teacher_temperature=0.7
        ),
        0.1**2,
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_loss_is_that_of_sentence_transformers(name):
    ours, peer, factor = PEERS[name]
    parts, batch = columns()
    value = ours.value(batch)
    expected = peer().compute_loss_from_embeddings(parts, batch.teacher) / factor
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(value, parts), torch.autograd.grad(expected, parts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_queries_with_fewer_negatives_are_not_padded():
    _, batch = columns(b=2, k=3)
    given = torch.tensor([[True, True, True], [True, False, False]])
    short = batch._replace(has_negative=given)
    alone = LossBatch(
        batch.cosine[1:],
        batch.positive[1:],
        batch.negative[1:, :1],
        given[1:, :1],
        batch.other_positives,
        short.teacher[1:, :2],
    )
    first = LossBatch(
        batch.cosine[:1], batch.positive[:1], batch.negative[:1], given[:1], batch.other_positives, short.teacher[:1]
    )
    assert KL().value(short).item() == pytest.approx((KL().value(first) + KL().value(alone)).item() / 2, rel=1e-5)
    by_pair = (3 * MarginMSE().value(first) + MarginMSE().value(alone)) / 4
    assert MarginMSE().value(short).item() == pytest.approx(by_pair.item(), rel=1e-5)


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_passage_that_is_known_to_be_relevant_is_no_negative(two_sided):
    _, batch = columns(b=3, k=1)
    loss = InfoNCE(two_sided=two_sided, temperature=1.0)
    masked = batch._replace(other_positives=torch.tensor([[0, 1]]))
    scores = batch.cosine.detach()
    kept = torch.tensor([True, False, True, True, True, True])
    first = torch.logsumexp(scores[0][kept], 0) - scores[0, 0]
    rest = torch.logsumexp(scores[1:], 1) - scores[[1, 2], [1, 2]]
    expected = torch.cat([first[None], rest]).mean()
    if two_sided:
        back = scores[:, :3].T.clone()
        back[1, 0] = -torch.inf
        expected = (expected + (torch.logsumexp(back, 1) - back.diagonal()).mean()) / 2
    assert loss.value(masked).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.negatives(masked) == loss.negatives(batch) - 1 == 3 * 5 - 1
