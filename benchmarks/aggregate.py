"""How fast many coarse ratings become one fine ranking: simulated raters with unknown thresholds, beside the bound.

    python benchmarks/aggregate.py [--items 60] [--seeds 20] [--json FILE]

Scores and thresholds are drawn as in arXiv 2510.01871: alike (uniform), and unlike (Beta(2, 2) and uniform), where the
bound grows by the integral of f_X^2 / f_Y = 1.2. The distance is the largest Spearman footrule that the bins leave open,
and the bound is n^2 / m: it falls with the number of raters m, and near-perfect rankings take about n^2 of them. Questions are what
threshold binary search asked, of m x n that all ratings would be. A third part fits raters who slip. Exits 1 where a
distance is further than four standard errors from its exact expectation, or does not fall at the bound's rate.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dagr_ray.stages.aggregate import expected_footrule, footrule, next_questions, rank, split

RAISED = 1.2  # the integral of f_X^2 / f_Y for Beta(2, 2) scores and uniform thresholds


def searched(score: np.ndarray, thresholds: np.ndarray, at: list[int]) -> tuple[list[int], list[int]]:
    """The distance and the questions so far after each number of raters in ``at``."""
    truth, bins = np.argsort(-score).tolist(), [list(range(len(score)))]
    distances, asked, questions = [], [], 0
    for number, threshold in enumerate(thresholds, 1):
        answers: dict[int, int] = {}
        while items := next_questions(bins, answers):
            answers |= {item: int(score[item] > threshold) for item in items}
        questions += len(answers)
        bins = split(bins, answers)
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


def main() -> int:
    """Runs the simulations, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    n = args.items
    at = [n // 4, n, 4 * n, 16 * n, n * n]
    lines: list[str] = []
    report: dict[str, Any] = {}
    failed = False
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
        lines += [
            f"{name}:\n",
            "| raters | distance | standard error | exact expectation | bound's n^2 / m | questions of a rater |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        for column, m in enumerate(at):
            mean, error = distances[:, column].mean(), distances[:, column].std() / np.sqrt(args.seeds)
            exact = expected_footrule(n, m) if raised == 1.0 else None
            lines.append(
                f"| {m:,} | {mean:.1f} | {error:.1f} | {'' if exact is None else f'{exact:.1f}'} | {raised * n * n / m:.1f} | "
                f"{asked[:, column].mean() / m:.1f} |"
            )
            # where only pairs are left together, their number is Poisson: a few draws without any say too little
            if exact is not None:
                failed |= abs(mean - exact) > 4 * max(error, np.sqrt(2 * exact / args.seeds))
        falls = slope(at[1:4], distances.mean(axis=0)[1:4].tolist())
        wanted = slope(at[1:4], [expected_footrule(n, m) for m in at[1:4]])
        lines.append(
            f"\nslope of the logarithms from {at[1]:,} to {at[3]:,} raters: {falls:.2f} (expected {wanted:.2f})\n"
        )
        failed |= abs(falls - wanted) > 0.15
        report[name] = {"raters": at, "distance": distances.mean(axis=0).tolist(), "slope": falls}
    counts, shares = [n // 4, n, 4 * n], (0.0, 0.05, 0.2)
    lines += [
        "fitted, all items asked, raters who slip (Spearman's footrule to the true order):\n",
        "| raters | " + " | ".join(f"{share:.0%} slips" for share in shares) + " |",
        "|---:|" + "---:|" * len(shares),
    ]
    for m in counts:
        means = [np.mean([slipping(n, m, seed, share) for seed in range(5)]) for share in shares]
        lines.append(f"| {m:,} | " + " | ".join(f"{mean:.0f}" for mean in means) + " |")
        report[f"slips, {m} raters"] = [float(mean) for mean in means]
    text = f"{n} items, mean of {args.seeds} draws.\n\n" + "\n".join(lines)
    print(text)
    Path(__file__).with_suffix(".md").write_text(text + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
