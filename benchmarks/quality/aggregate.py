"""How fast many coarse ratings become one fine ranking: simulated raters with unknown thresholds, beside the bound.

    python -m benchmarks.quality.aggregate [--items 60] [--seeds 20] [--json FILE]

Scores and thresholds are drawn as in arXiv 2510.01871: alike (uniform), and unlike (Beta(2, 2) and uniform), where the
bound grows by the integral of f_X^2 / f_Y = 1.2. The distance is the largest Spearman footrule that the bins leave open,
and the bound is n^2 / m: it falls with the number of raters m, and near-perfect rankings take about n^2 of them. Questions are what
threshold binary search asked, of m x n that all ratings would be. A third part fits raters who slip. Exits 1 where a
distance is further than four standard errors from its exact expectation, or does not fall at the bound's rate, and stops
where the search's bins are not those of all ratings.
"""

import doctest
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Benchmark
from dagr_ray.stages.aggregate import rank

RAISED = 1.2  # the integral of f_X^2 / f_Y for Beta(2, 2) scores and uniform thresholds


def next_questions(bins: Sequence[Sequence[int]], answers: Mapping[int, int]) -> list[int]:
    """The items to ask a rater about next, given ``bins`` from best to worst and what the rater has answered.

    Threshold binary search (arXiv 2510.01871): an item of the middle bin, again and again, until one bin is left that
    the rater's threshold can be in; then all of that bin, which the rater may cut in two. None where all is known.

    >>> next_questions([[0], [1, 2], [3], [4]], {})
    [3]
    >>> next_questions([[0], [1, 2], [3], [4]], {3: 0}), next_questions([[0], [1, 2], [3], [4]], {3: 0, 1: 1})
    ([1], [2])
    """
    low, high = 0, len(bins)  # the bins that may hold the threshold: those before are liked, those after are not
    for at, items in enumerate(bins):
        said = {answers[item] for item in items if item in answers}
        if len(said) > 1:
            return [item for item in items if item not in answers]
        low, high = (max(low, at), high) if 1 in said else (low, min(high, at + 1)) if 0 in said else (low, high)
    if all(len(items) == 1 for items in bins[low:high]):
        return []
    unknown = [items for items in bins[low:high] if not any(item in answers for item in items)]
    if unknown:
        return [unknown[len(unknown) // 2][0]]
    return [item for items in bins[low:high] for item in items if item not in answers]


def split(bins: Sequence[Sequence[int]], answers: Mapping[int, int]) -> list[list[int]]:
    """The bins after a rater's answers: a bin of which some are liked and some are not becomes two.

    >>> split([[0], [1, 2]], {1: 0, 2: 1})
    [[0], [2], [1]]
    """
    found: list[list[int]] = []
    for items in bins:
        liked = [item for item in items if answers.get(item) == 1]
        rest = [item for item in items if answers.get(item) == 0]
        whole = len(liked) + len(rest) == len(items)
        found += [part for part in (liked, rest) if part] if whole else [list(items)]
    return found


def footrule(order: Sequence[Sequence[int]], truth: Sequence[int]) -> int:
    """The largest Spearman footrule between the items' true order ``truth`` (best first) and any order inside ``order``'s
    bins that are right: the sum of |rank - true rank|, floor(b^2 / 2) for a bin of b.

    >>> footrule([[2, 1], [0]], [1, 2, 0]), footrule([[0, 1, 2]], [0, 1, 2])
    (2, 4)
    """
    at = 0
    for items in order:
        assert set(items) == set(truth[at : at + len(items)]), "the bins are not those of the true order"
        at += len(items)
    return sum(len(items) ** 2 // 2 for items in order)


def expected_footrule(items: int, raters: int) -> float:
    """The mean of ``footrule`` where scores and thresholds have one distribution and all is asked: exact.

    Then all orders of items and thresholds are equally likely, so that a bin's size b has probability
    C(n - b + m - 1, m - 1) / C(n + m, m). For large n it goes as n^2 / m: Theta(n^2) raters for a near-perfect ranking,
    the paper's rate, times the integral of f_X^2 / f_Y where the densities of scores and thresholds differ.

    >>> expected_footrule(10, 0), round(expected_footrule(100, 1000) / (2 * 100**2 / 1000), 2)
    (50.0, 0.91)
    """
    n, m = items, raters
    if m == 0:
        return float(n**2 // 2)
    log = [math.lgamma(i + 1) for i in range(n + m + 1)]

    def choose(a: int, b: int) -> float:
        return log[a] - log[b] - log[a - b]

    chances = (math.exp(choose(n - b + m - 1, m - 1) - choose(n + m, m)) for b in range(n + 1))
    return (m + 1) * sum(chance * (b**2 // 2) for b, chance in enumerate(chances))


def searched(score: np.ndarray, thresholds: np.ndarray, at: list[int]) -> tuple[list[int], list[int]]:
    """The distance and the questions so far after each number of raters in ``at``."""
    truth, bins = np.argsort(-score).tolist(), [list(range(len(score)))]
    distances, asked, questions = [], [], 0
    for number, threshold in enumerate(thresholds, 1):
        answers: dict[int, int] = {}
        while items := next_questions(bins, answers):
            answers |= {item: int(score[item] > threshold) for item in items}
        questions += len(answers)
        liked = [[[i for i in items if (score[i] > threshold) == likes] for likes in (True, False)] for items in bins]
        bins = split(bins, answers)
        assert bins == [part for parts in liked for part in parts if part], "not as if every item had been asked"
        if number in at:
            distances.append(footrule(bins, truth))
            asked.append(questions)
    return distances, asked


def slope(at: list[int], values: list[float]) -> float:
    """Of the logarithms: -1 where the distance falls as 1 / m."""
    return float(np.polyfit(np.log(at), np.log(values), 1)[0])


def slipping(items: int, raters: int, seed: int, slips: float) -> float:
    """Spearman's footrule between the fitted order and the true one."""
    rng = np.random.default_rng(seed)
    score, thresholds = rng.uniform(size=items), rng.uniform(size=raters)
    ratings = (score[None, :] > thresholds[:, None]).astype(float)
    ratings = np.where(rng.uniform(size=ratings.shape) < slips, 1 - ratings, ratings)
    place = {item: at for at, item in enumerate(np.argsort(-rank(ratings).score, kind="stable").tolist())}
    return sum(abs(place[item] - at) for at, item in enumerate(np.argsort(-score).tolist()))


HEAD = ["raters", "distance", "standard error", "exact expectation", "bound's n^2 / m", "questions of a rater"]


def main() -> int:
    """Runs the simulations, prints and writes the tables."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--items", type=int, default=60)
    bench.add("--seeds", type=int, default=20)
    args = bench.parse()
    bench.bound("examples of this file that fail", doctest.testmod(sys.modules[__name__]).failed, at_most=0)
    n = args.items
    at = [n // 4, n, 4 * n, 16 * n, n * n]
    report: dict[str, Any] = {}
    bench.say(f"{n} items, mean of {args.seeds} draws.\n")
    for name, draw in (
        ("thresholds like the scores", lambda rng: rng.uniform(size=n)),
        ("scores in the middle", lambda rng: rng.beta(2, 2, size=n)),
    ):
        found = []
        for seed in range(args.seeds):
            rng = np.random.default_rng(seed)
            score = draw(rng)
            found.append(searched(score, rng.uniform(size=at[-1]), at))
        distances = np.array([d for d, _ in found], float)
        asked = np.array([q for _, q in found], float)
        raised = 1.0 if name.startswith("thresholds") else RAISED
        rows = []
        for column, m in enumerate(at):
            mean, error = distances[:, column].mean(), distances[:, column].std() / np.sqrt(args.seeds)
            exact = expected_footrule(n, m) if raised == 1.0 else None
            figures = [mean, error, exact, raised * n * n / m, asked[:, column].mean() / m]
            rows.append([f"{m:,}", *("" if figure is None else f"{figure:.1f}" for figure in figures)])
            # where only pairs are left together, their number is Poisson: a few draws without any say too little
            if exact is not None:
                limit = 4 * max(error, np.sqrt(2 * exact / args.seeds))
                bench.bound(f"{m:,} raters, from the exact expectation", abs(mean - exact), at_most=limit)
        falls = slope(at[1:4], distances.mean(axis=0)[1:4].tolist())
        wanted = slope(at[1:4], [expected_footrule(n, m) for m in at[1:4]])
        bench.say(f"{name}:\n")
        bench.table(HEAD, rows, left=())
        bench.say(
            f"\nslope of the logarithms from {at[1]:,} to {at[3]:,} raters: {falls:.2f} (expected {wanted:.2f})\n"
        )
        bench.bound(f"{name}: slope, from what is expected", abs(falls - wanted), at_most=0.15)
        report[name] = {"raters": at, "distance": distances.mean(axis=0).tolist(), "slope": falls}
    counts, shares = [n // 4, n, 4 * n], (0.0, 0.05, 0.2)
    bench.say("fitted, all items asked, raters who slip (Spearman's footrule to the true order):\n")
    rows = []
    for m in counts:
        means = [np.mean([slipping(n, m, seed, share) for seed in range(5)]) for share in shares]
        rows.append([f"{m:,}", *(f"{mean:.0f}" for mean in means)])
        report[f"slips, {m} raters"] = [float(mean) for mean in means]
    bench.table(["raters", *(f"{share:.0%} slips" for share in shares)], rows, left=())
    return bench.finish(report)


if __name__ == "__main__":
    sys.exit(main())
