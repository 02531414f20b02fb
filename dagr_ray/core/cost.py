"""What a stage cost, kept across resumes: tokens, seconds of workers, rows and dollars, by shard and in all.

Everything comes from what lies in the stage's folder: the receipts of shards that stand and of shards that were taken
back, and the event logs of the attempts. Every second that a worker was held is counted once, so the parts add up::

    seconds:  start + busy + idle + waste + rest = held
    dollars:  work + waste = total;  total + setup + waiting = held

A stage is billed for the time that its workers were busy, and for work that was lost. What went into getting them ready
(``setup``: models that were loaded, processes that were started) and what they waited (``waiting``: idle, and the rest)
stands on lines of its own, because on a shared machine somebody else works in that time.
``rest`` is what no receipt accounts for: Ray's start, the wait for the last shard, and work that died with its worker.
An attempt that was killed ends with its last sign of life. What tokens were lost with it is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from dagr_ray.core.artifact import Artifact, Json, add_up
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool, PricedEngine, Prices, TokenPrices

KINDS = ("prompt", "cached", "completion")
SECONDS = ("start", "busy", "idle")
# What the dollars of a worker's second are called, by what it was spent on.
LINES = {"start": "setup", "busy": "work", "idle": "waiting"}

AnyEngine = TypeVar("AnyEngine", bound=PricedEngine)


@dataclass(frozen=True)
class Rates:
    """What is charged: the hours that workers are held or, at somebody else's endpoint (``tokens``), only tokens."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0
    tokens: TokenPrices | None = None

    @classmethod
    def of(cls, prices: Prices, engine: PricedEngine | None = None) -> Rates:
        """Those of a placement's price table for a stage with this engine (or none)."""
        tokens = None if engine is None else engine.token_prices(prices)
        return cls(prices.cpu_hour, prices.gpu_hour, tokens)

    @classmethod
    def from_json(cls, value: Json) -> Rates:
        tokens = value.get("tokens")
        return cls(value["cpu_hour"], value["gpu_hour"], TokenPrices(**tokens) if tokens else None)

    def __str__(self) -> str:
        """
        >>> str(Rates(cpu_hour=0.05, gpu_hour=2)), str(Rates(tokens=TokenPrices(prompt=2, completion=8)))
        ('$0.05 a core-hour and $2 a GPU-hour', '$2 and $8 a million prompt and completion tokens')
        """
        if self.tokens is not None:
            return f"${self.tokens.prompt:g} and ${self.tokens.completion:g} a million prompt and completion tokens"
        hours = {"core": self.cpu_hour, "GPU": self.gpu_hour}
        return " and ".join(f"${usd:g} a {kind}-hour" for kind, usd in hours.items() if usd) or "no price an hour"

    def to_json(self) -> Json:
        return {
            "cpu_hour": self.cpu_hour,
            "gpu_hour": self.gpu_hour,
            "tokens": self.tokens and self.tokens.model_dump(),
        }


def resources_held(pool: Pool, together: bool = False, cpus: float | None = None) -> Json:
    """What an attempt occupies from its start to its end, for its log. ``together``: each shard takes all the workers.

    ``cpus`` are the cores that a worker really takes, as far as the driver knows; its receipts know it better.
    """
    workers = max(pool.workers, 1)
    return {
        "workers": workers,
        "cpus": cpus or max(pool.cpus, 1),
        "gpus": pool.gpus,
        "workers_of_a_shard": workers if together else 1,
    }


@dataclass
class Attempt:
    """One try at a stage, out of its event log."""

    name: str
    began: float
    ended: float
    holds: Json

    @property
    def wall_s(self) -> float:
        return max(self.ended - self.began, 0.0)

    @property
    def held_s(self) -> float:
        """Worker-seconds."""
        return self.wall_s * self.holds["workers"]

    def usd(self, worker_s: float, rates: Rates) -> float:
        return worker_s / 3600 * (self.holds["cpus"] * rates.cpu_hour + self.holds["gpus"] * rates.gpu_hour)


def attempts(folder: Artifact, receipts: Iterable[Json]) -> dict[str, Attempt]:
    """Every attempt by name. One without an end (killed, or still at work) lasts to the last receipt that it wrote.

    Where receipts tell how many cores their workers took, on machines that may differ, the largest number counts.
    """
    found: dict[str, Attempt] = {}
    for file in sorted(folder.listing("attempts")):
        name = file.removesuffix(".jsonl")
        events = folder.lines(f"attempts/{file}")
        if events:
            held = next((event["holds"] for event in events if "holds" in event), resources_held(Pool()))
            found[name] = Attempt(name, events[0]["at"], events[-1]["at"], held)
    told: dict[str, float] = {}
    for receipt in receipts:
        attempt = attempt_of(receipt, found)
        if attempt is not None:
            attempt.ended = max(attempt.ended, receipt.get("at", 0.0))
            told[attempt.name] = max(told.get(attempt.name, 0.0), receipt.get("cpus", 0.0))
    for name, cpus in told.items():
        if cpus:
            found[name].holds = found[name].holds | {"cpus": cpus}
    return found


def attempt_of(receipt: Json, tries: dict[str, Attempt]) -> Attempt | None:
    """The attempt that wrote a receipt. Two drivers of an object store may share a number: the later one then."""
    mine = [a for name, a in tries.items() if int(name.split("-")[0]) == receipt.get("attempt")]
    return max((a for a in mine if a.began <= receipt.get("at", 0.0)), key=lambda a: a.began, default=None)


def shard_bill(receipt: Json, attempt: Attempt | None, rates: Rates) -> Json:
    """One shard's share of its stage's bill."""
    cost, counts = receipt["cost"], receipt["counts"]
    together = attempt.holds["workers_of_a_shard"] if attempt else 1
    tokens = {kind: cost.get(f"{kind}_tokens", 0) for kind in KINDS}
    seconds = {kind: cost.get(f"{kind}_s", 0.0) * together for kind in SECONDS}
    # a training starts its workers inside its only shard
    setup_s = min(cost.get("setup_s", 0.0) * together, seconds["busy"])
    seconds = seconds | {"start": seconds["start"] + setup_s, "busy": seconds["busy"] - setup_s}
    lost, both = cost.get("lost_tokens", 0), tokens["prompt"] + tokens["completion"]
    failed = [cost.get(f"failed_{kind}_tokens", 0) for kind in ("prompt", "completion")]
    if rates.tokens is not None:
        work = rates.tokens.usd(**tokens)
        waste = (work * lost / both if both else 0.0) + rates.tokens.usd(prompt=failed[0], completion=failed[1])
        usd = {"setup": 0.0, "work": work, "waiting": 0.0, "waste": waste}
    else:
        usd = {line: attempt.usd(seconds[kind], rates) if attempt else 0.0 for kind, line in LINES.items()} | {
            "waste": 0.0
        }
    rejected = {reason: n for reason, n in counts.get("rejected", {}).items() if n}
    return {
        "rows": {key: counts.get(key, 0) for key in ("in", "out", "errors")} | {"rejected": rejected},
        "tokens": tokens,
        "seconds": seconds | {"cpu": cost.get("cpu_s", 0.0)},
        "waste": {
            "tokens": lost + sum(failed),
            "tries": cost.get("lost_tries", 0),
            "retries": cost.get("retries", 0),
        },
        "usd": usd,
    }


def stage_bill(folder: Artifact, receipts: Iterable[Json], rates: Rates) -> Json:
    """The bill of a stage whose shards that stand have these receipts; see ``shard_bill`` for one of them.

    ``waste`` holds, besides what shards report, all that was spent on shards that were taken back: ``tokens`` that are
    in no table, worker-``seconds``, ``shards``. Its dollars are in ``usd``.
    """
    standing, back = list(receipts), folder.revoked()
    tries = attempts(folder, [*standing, *back])
    total: Json = {}
    for receipt in standing:
        add_up(total, shard_bill(receipt, attempt_of(receipt, tries), rates))
    if not standing:
        add_up(total, shard_bill({"cost": {}, "counts": {}}, None, rates))
    waste: Json = {"shards": len(back), "seconds": 0.0}
    for receipt in back:
        line = shard_bill(receipt, attempt_of(receipt, tries), rates)
        both = line["tokens"]["prompt"] + line["tokens"]["completion"]
        line["waste"]["tokens"] += both
        add_up(waste, line["waste"])
        waste["seconds"] += sum(line["seconds"][kind] for kind in SECONDS)
        total["seconds"]["cpu"] += line["seconds"]["cpu"]
        total["usd"]["waste"] += sum(line["usd"].values())
    total["waste"] = add_up(waste, total["waste"])
    seconds, usd = total["seconds"], total["usd"]
    seconds["wall"] = sum(attempt.wall_s for attempt in tries.values())
    seconds["held"] = sum(attempt.held_s for attempt in tries.values())
    seconds["rest"] = seconds["held"] - sum(seconds[kind] for kind in SECONDS) - waste["seconds"]
    for kind in ("cpu", "gpu"):
        seconds[f"held_{kind}"] = sum(attempt.held_s * attempt.holds[f"{kind}s"] for attempt in tries.values())
    usd["total"] = usd["work"] + usd["waste"]
    usd["held"] = usd["total"]
    if rates.tokens is None:
        usd["held"] = sum(attempt.usd(attempt.held_s, rates) for attempt in tries.values())
        usd["waiting"] = usd["held"] - usd["total"] - usd["setup"]
    return total | {"attempts": len(tries), "rates": rates.to_json()}


def lost(folder: Artifact, receipts: Iterable[Json]) -> list[Json]:
    """Ranges of rows that were begun and have no receipt: under way, or lost with their worker. Each with its attempt,
    and at the mean of the rows that have receipts: ``tokens`` (0 where there is none yet).
    """
    rows = spent = 0
    settled: dict[int, float] = {}  # a worker that died right after its commit leaves marks of what its receipt bills
    for receipt in receipts:
        settled[receipt["shard"]] = max(receipt.get("at", 0.0), settled.get(receipt["shard"], 0.0))
        rows += receipt["counts"].get("in", 0)
        spent += receipt["cost"].get("prompt_tokens", 0) + receipt["cost"].get("completion_tokens", 0)
    marks = [folder.read_json(f"tries/{name}") for name in sorted(folder.listing("tries"))]
    return [
        {
            "attempt": int(mark["attempt"].split("-")[0]),
            "rows": mark["stop"] - mark["start"],
            "tokens": round(spent / max(rows, 1) * (mark["stop"] - mark["start"])),
        }
        for mark in marks
        if mark and mark["began"] > settled.get(mark["shard"], 0.0)
    ]


def within_budget(engine: AnyEngine, folder: Artifact, workers: int, at_work: bool = True) -> AnyEngine:
    """The engine with what earlier runs left of its ``budget_usd``; as it is where it has none.

    For each worker to call (``at_work``), and before a run, to see whether it may begin. A worker that takes the place
    of a dead one cannot know what that one had spent of its share: all that this run has spent so far is taken off its
    own. Raises ConfigError where less is left than a row has cost.
    """
    budget: float | None = getattr(engine, "budget_usd", None)
    if not budget:
        return engine
    receipts = [*folder.receipts().values(), *folder.revoked()]
    now = max((int(name.split("-")[0]) for name in folder.listing("attempts")), default=0) if at_work else None
    rates, workers = Rates.of(Prices(), engine), max(workers, 1)
    usd, tokens, rows, before, during = 0.0, 0, 0, 0.0, 0.0
    for receipt in receipts:
        line = shard_bill(receipt, None, rates)
        spent = sum(line["usd"].values())
        usd, rows = usd + line["usd"]["work"], rows + line["rows"]["in"]
        tokens += line["tokens"]["prompt"] + line["tokens"]["completion"]
        before, during = (before, during + spent) if receipt.get("attempt") == now else (before + spent, during)
    for mark in lost(folder, receipts):
        spent = mark["tokens"] * usd / max(tokens, 1)
        before, during = (before, during + spent) if mark["attempt"] == now else (before + spent, during)
    left = budget - before - during * workers
    if left <= usd / max(rows, 1):
        raise ConfigError(
            f"{engine.type}: ${before + during:.6f} of budget_usd = {budget:g} are spent on {folder.name}; "
            "raise budget_usd and run again: finished shards are kept"
        )
    return engine.model_copy(update={"budget_usd": left})
