"""Is what a study says true? Simulated studies whose answers are known, and each bar of the decision with its figure.

    python -m benchmarks.quality.decision [--studies 200] [--sizes 50 100 200 500 2000 5000]

A study has five rungs (62 to 15,872 queries, four times as many each), three training seeds, and a test set. A query changes
with a probability of 0.4, and then by a skewed share that all rungs have, one of the rung, and one of the seed; paired differences
have a standard deviation of 0.15 over queries and 0.004 between seeds. Curves rise, level off, dip, are flat, or climb by
exactly what is worth having at each rung, which is the hardest case for "enough". The rules that people use stand beside.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Benchmark
from dagr_ray.report.decision.crossfit import best_arm
from dagr_ray.report.decision.curves import fit_curve, forecast, resampled_gains
from dagr_ray.report.decision.estimates import paired, seed_variance
from dagr_ray.report.decision.outcomes import compare, smallest_enough
from dagr_ray.report.decision.purchase import buy, grid
from dagr_ray.report.decision.sequential import spent

Floats = NDArray[np.float64]
RUNGS = np.array([62, 248, 992, 3968, 15872])
WORTH, ALPHA, SEEDS, CHANGED, SEED_SD = 0.01, 0.05, 3, 0.4, 0.004
PASSAGES, GPL = 10_000, 250_000


def _hill(top: float, half: float, steep: float) -> Callable[[Floats], Floats]:
    return lambda n: top * n**steep / (half**steep + n**steep)


CURVES: dict[str, Callable[[Floats], Floats]] = {
    "rises": _hill(0.10, 4_000, 0.6),
    "levels off": _hill(0.05, 150, 1.2),
    "dips": lambda n: 0.05 * n / (100 + n) - 0.03 * n / (6_000 + n),
    "flat": lambda n: 0 * n,
    "edge": lambda n: WORTH * (1 + np.log(np.maximum(n, 1) / RUNGS[0]) / np.log(4)),
}


def measured(gains: Floats, queries: int, rng: np.random.Generator) -> Floats:
    """Gains over the base of one study: ``[queries, arms, seeds]``."""
    arms = len(gains)
    changed = (rng.random(queries) < CHANGED)[:, None, None]
    shared = np.where(rng.random(queries) < 1 / 6, 0.35, -0.07)[:, None, None]
    own = rng.uniform(-0.25, 0.25, (queries, arms, 1)) + rng.uniform(-0.2, 0.2, (queries, arms, SEEDS))
    return changed * ((gains[:, None] + rng.normal(0, SEED_SD, (arms, SEEDS))) / CHANGED + shared + own)


@dataclass
class Count:
    """How often something was so, of how many times it could be."""

    hits: int = 0
    of: int = 0
    values: list[float] = field(default_factory=list)

    def add(self, hit: bool) -> None:
        self.hits, self.of = self.hits + bool(hit), self.of + 1

    @property
    def share(self) -> float:
        return self.hits / self.of if self.of else float("nan")


Counts = defaultdict[str, Count]


def looks(gains: Floats, curve: str, counts: Counts) -> None:
    """A look after each rung: "better" and "enough", with alpha spent, and as people do it."""
    true = CURVES[curve](RUNGS.astype(float))
    zero = np.zeros((len(gains), 1))
    better = enough = peeked = False
    for k in range(1, len(RUNGS) + 1):
        seen = [gains[:, i] for i in range(k)]
        pooled, alpha = seed_variance(seen), spent(ALPHA, k, len(RUNGS))
        estimate = paired(seen[-1], pooled=pooled)
        better |= compare(estimate, len(gains), alpha=alpha).low > 0
        queries_only = paired(seen[-1].mean(axis=1))
        peeked |= queries_only.interval(ALPHA)[0] > 0
        at = smallest_enough([zero, *seen], worth=WORTH, alpha=alpha, pooled=pooled).at
        # a remaining gain of exactly what is worth having counts as one
        enough |= at is not None and max(0.0, *true[:k]) - (true[at - 1] if at else 0.0) >= WORTH - 1e-12
    if curve == "flat":
        counts["better"].add(better)
        counts["better, peeking"].add(peeked)
    counts["enough"].add(enough)
    values = np.concatenate([zero, gains.mean(axis=2)], axis=1)
    largest = int(values.mean(axis=0).argmax())
    not_worse = next(
        i
        for i in range(len(RUNGS) + 1)
        if i == largest or paired(values[:, largest], values[:, i]).interval(ALPHA)[0] <= 0
    )
    truth = np.concatenate([[0.0], true])
    counts["enough, not shown worse"].add(truth.max() - truth[not_worse] >= WORTH - 1e-12)
    done = smallest_enough(
        [zero, *(gains[:, i] for i in range(len(RUNGS)))],
        pooled=seed_variance([gains[:, i] for i in range(len(RUNGS))]),
    ).at
    counts["enough, said"].add(done is not None)


def bought(gains: Floats, curve: str, counts: Counts, resamples: int) -> None:
    """The band of the largest rung, and a purchase, from the four rungs before it."""
    before = [gains[:, i] for i in range(len(RUNGS) - 1)]
    samples = resampled_gains(np.zeros(len(gains)), before, resamples)
    found = fit_curve(RUNGS[:-1].tolist(), samples, [float(RUNGS[-1])])
    low, high = forecast(found)
    came = float(gains[:, -1].mean())
    counts["band"].add(low <= came <= high)
    counts["band"].values.append(high - low)
    ends = found.band(0.9)[:, -1]
    counts["band of the population"].add(ends[0] <= CURVES[curve](RUNGS[-1:])[0] <= ends[1])
    if curve not in ("rises", "levels off"):
        return
    at = grid(RUNGS[:-1].tolist())
    truth = CURVES[curve](np.array(at))
    found = fit_curve(RUNGS[:-1].tolist(), samples, at)
    target = 0.9 * float(CURVES[curve](np.array([8_000.0]))[0])
    oracle = float(np.interp(target, truth, at))
    made = buy(found, lambda n: n, generator="g", base="b", target=target)
    counts["bought"].add(made.n is not None)
    counts["bought and missed"].add(made.n is not None and float(CURVES[curve](np.array([float(made.n)]))[0]) < target)
    if made.n is not None:
        counts["missed"].add(float(CURVES[curve](np.array([float(made.n)]))[0]) < target)
        counts["missed"].values.append(made.n / oracle)
    median = np.median(found.drawn, axis=0)
    point = at[int((median >= target).argmax())] if (median >= target).any() else at[-1]
    for name, n in (
        ("point estimate", point),
        ("last1", at[int(np.searchsorted(at, RUNGS[-2]))]),
        ("passages", PASSAGES),
        ("GPL", GPL),
    ):
        counts[f"missed, {name}"].add(float(CURVES[curve](np.array([float(n)]))[0]) < target)
        counts[f"missed, {name}"].values.append(n / oracle)


def chosen(queries: int, rng: np.random.Generator, counts: Counts) -> None:
    """The best of eight arms that are alike, or that differ."""
    for spread in (0.0, 0.01):
        true = 0.02 + spread * np.linspace(-1, 1, 8)
        gains = measured(true, queries, rng)
        best = best_arm([gains[:, i] for i in range(8)])
        low, high = best.estimate.interval(ALPHA)
        counts["best"].add(low <= true[best.arm] <= high)
        counts["best"].values.append(best.estimate.mean - true[best.arm])
        naive = paired(gains[:, best.arm])
        low, high = naive.interval(ALPHA)
        counts["best, naive"].add(low <= true[best.arm] <= high)
        counts["best, naive"].values.append(best.naive - true[best.arm])


def together(cells: list[Counts], name: str) -> Count:
    """One count over several cells."""
    each = [cell[name] for cell in cells if name in cell]
    return Count(sum(c.hits for c in each), sum(c.of for c in each), [v for c in each for v in c.values])


def percent(count: Count) -> str:
    """A share with its standard error, both in percent."""
    if not count.of:
        return "–"
    share = count.share
    return f"{100 * share:.1f} ± {100 * (share * (1 - share) / count.of) ** 0.5:.1f}"


def times(count: Count) -> str:
    """The median of what was bought over what an oracle would have bought."""
    return f"{np.median(count.values):.1f}" if count.values else "–"


def main() -> int:
    """Simulates all cells, says the tables, and holds each bar to its bound."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--studies", type=int, default=200, help="studies of each size and curve (default: %(default)s)")
    bench.add("--sizes", type=int, nargs="+", default=[50, 100, 200, 500, 2000, 5000], help="test queries")
    bench.add("--resamples", type=int, default=200, help="bootstrap samples of a curve (default: %(default)s)")
    args = bench.parse()
    began = time.time()
    cells: dict[tuple[int, str], Counts] = {}
    for size in args.sizes:
        for number, (curve, gain) in enumerate(CURVES.items()):
            rng = np.random.default_rng([size, number])
            counts = cells[size, curve] = defaultdict(Count)
            for _ in range(args.studies):
                gains = measured(gain(RUNGS.astype(float)), size, rng)
                looks(gains, curve, counts)
                bought(gains, curve, counts, args.resamples)
                if curve == "flat":
                    chosen(size, rng, counts)
        print(f"{size} test queries: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    of_size = {size: [cells[size, curve] for curve in CURVES] for size in args.sizes}
    every = list(cells.values())
    bench.say(f"{args.studies:,} studies of each test set and curve; shares in percent with their standard errors.")
    bench.say(
        '\nA look after each of five rungs. "Better" of a flat curve, and "enough" with a gain of 0.01 or more to come:\n'
    )
    bench.table(
        [
            "test queries", "false better", "looking unspent", "false enough", "of the hardest curve", "not shown worse",
            "enough is said",
        ],
        (
            [
                f"{size:,}", percent(cells[size, "flat"]["better"]), percent(cells[size, "flat"]["better, peeking"]),
                percent(together(of_size[size], "enough")), percent(cells[size, "edge"]["enough"]),
                percent(together(of_size[size], "enough, not shown worse")), percent(together(of_size[size], "enough, said")),
            ]
            for size in args.sizes
        ),
    )  # fmt: skip
    bench.say("\nThe 90 % band of the fifth rung, made from four, holds what was measured:\n")
    bench.table(
        ["test queries", *CURVES, "width of the band"],
        (
            [
                f"{size:,}",
                *(percent(cells[size, c]["band"]) for c in CURVES),
                f"{np.median(together(of_size[size], 'band').values):.3f}",
            ]
            for size in args.sizes
        ),
    )
    bench.say(
        "\nQueries bought for a target between the fourth and the fifth rung: missed, and times what an oracle buys (median):\n"
    )
    rules = {
        "point estimate": "median curve",
        "last1": "the last rung",
        "passages": "one a passage (10,000)",
        "GPL": "GPL's 250,000",
    }
    buyers = [(size, [cells[size, c] for c in ("rises", "levels off")]) for size in args.sizes]
    bench.table(
        ["test queries", "advised", "missed", "times", *(f"{w}: {x}" for w in rules.values() for x in ("missed", "times"))],
        (
            [
                f"{size:,}", percent(together(group, "bought")), percent(together(group, "missed")),
                times(together(group, "missed")),
                *(f(together(group, f"missed, {rule}")) for rule in rules for f in (percent, times)),
            ]
            for size, group in buyers
        ),
    )  # fmt: skip
    bench.say(
        "\nThe best of eight arms, alike or up to 0.01 apart: its 95 % interval holds its true gain, and its bias:\n"
    )
    bench.table(
        ["test queries", "cross-fitted", "bias", "chosen and measured on the same", "bias of that"],
        (
            [
                f"{size:,}", percent(c["best"]), f"{np.mean(c['best'].values):+.4f}",
                percent(c["best, naive"]), f"{np.mean(c['best, naive'].values):+.4f}",
            ]
            for size, c in ((size, cells[size, "flat"]) for size in args.sizes)
        ),
    )  # fmt: skip
    bench.say()
    _bars(bench, cells, every, args.sizes)
    return bench.finish()


def _bars(bench: Benchmark, cells: dict[tuple[int, str], Counts], every: list[Counts], sizes: list[int]) -> None:
    band, missed = together(every, "band"), together(every, "missed")
    smallest = min(together([cells[size, c] for size in sizes], "band").share for c in CURVES)
    largest = max(together([cells[size, c] for size in sizes], "band").share for c in CURVES)
    best = together(every, "best")
    bars: list[tuple[str, float, dict[str, float]]] = [
        ("false better, a look after each of 5 rungs", together(every, "better").share, {"at_most": 0.05}),
        (
            "false enough, the worst size",
            max(together([cells[s, c] for c in CURVES], "enough").share for s in sizes),
            {"at_most": 0.05},
        ),
        (
            "false enough, the hardest curve at its worst size",
            max(cells[s, "edge"]["enough"].share for s in sizes),
            {"at_most": 0.05},
        ),
        ("band holds the held-out rung, all cells", band.share, {"at_least": 0.85, "at_most": 0.95}),
        ("band, the curve held least", smallest, {"at_least": 0.85}),
        ("band, the curve held most", largest, {"at_most": 0.95}),
        ("advised purchases that miss their target", missed.share, {"at_most": 0.10}),
        ("studies that advise a purchase that misses", together(every, "bought and missed").share, {"at_most": 0.10}),
        ("advised purchases, times an oracle's (median)", float(np.median(missed.values or [0])), {"at_most": 1.5}),
        ("interval of the best arm", best.share, {"at_least": 0.93}),
        ("bias of the best arm", abs(float(np.mean(best.values))), {"at_most": 0.002}),
    ]
    rows = []
    for what, value, limits in bars:
        holds = bench.bound(what, value, **limits)
        bound = " and ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in limits.items())
        rows.append([what, f"{value:.4f}", bound, "yes" if holds else "**no**"])
    bench.table(["bar", "figure", "bound", "holds"], rows, left=(0, 2, 3))


if __name__ == "__main__":
    sys.exit(main())
