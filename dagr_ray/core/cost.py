"""What a stage cost, over all its attempts: tokens, worker seconds, rows and dollars, by shard and in total.

All figures come from the stage's folder: receipts of current and of revoked shards, and the event logs of the attempts.
Every second for which a worker was held is counted once, so the parts add up::

    seconds:  start + busy + idle + waste + rest = held
    dollars:  work + waste = total;  total + setup + waiting = held

A stage is billed for the time that its workers were busy, and for work that was lost. Getting them ready (``setup``:
loading models, starting processes) and their waiting (``waiting``: idle and rest) are reported separately, because on a
shared machine others work in that time. ``rest`` is the time without a receipt: Ray's start, waiting for the last shard,
and work that died with its worker. A killed attempt ends with its last sign of life. Its lost tokens are an upper bound.
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
# Kind of worker second -> line of the bill.
LINES = {"start": "setup", "busy": "work", "idle": "waiting"}

AnyEngine = TypeVar("AnyEngine", bound=PricedEngine)


@dataclass(frozen=True)
class Rates:
    """What is charged: the hours for which workers are held or, for a hosted endpoint (``tokens``), only tokens."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0
    tokens: TokenPrices | None = None

    @classmethod
    def from_prices(cls, prices: Prices, engine: PricedEngine | None = None) -> Rates:
        """The rates of a placement's price table for a stage with this engine (or none)."""
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
    """The resources that an attempt holds from start to end, for its log. ``together``: each shard takes all workers.

    ``cpus`` is the number of cores of a worker, as far as the driver knows; receipts are more accurate.
    """
    workers = max(pool.workers, 1)
    return {
        "workers": workers,
        "cpus": cpus or max(pool.cpus, 1),
        "gpus": pool.gpus,
        "workers_of_a_shard": workers if together else 1,
    }


@dataclass
class AttemptCost:
    """One attempt at a stage, from its event log."""

    name: str
    started: float
    ended: float
    holds: Json

    @property
    def wall_s(self) -> float:
        return max(self.ended - self.started, 0.0)

    @property
    def held_s(self) -> float:
        """Worker-seconds."""
        return self.wall_s * self.holds["workers"]

    def usd(self, worker_s: float, rates: Rates) -> float:
        return worker_s / 3600 * (self.holds["cpus"] * rates.cpu_hour + self.holds["gpus"] * rates.gpu_hour)


def attempts(folder: Artifact, receipts: Iterable[Json]) -> dict[str, AttemptCost]:
    """Every attempt by name. An attempt without an end (killed, or still running) lasts to its last receipt.

    If receipts report the cores of their workers, on machines that may differ, the largest number is used.
    """
    by_name: dict[str, AttemptCost] = {}
    for file in sorted(folder.listing("attempts")):
        name = file.removesuffix(".jsonl")
        events = folder.lines(f"attempts/{file}")
        if events:
            held = next((event["holds"] for event in events if "holds" in event), resources_held(Pool()))
            by_name[name] = AttemptCost(name, events[0]["at"], events[-1]["at"], held)
    cores: dict[str, float] = {}
    for receipt in receipts:
        attempt = find_attempt(receipt, by_name)
        if attempt is not None:
            attempt.ended = max(attempt.ended, receipt.get("at", 0.0))
            cores[attempt.name] = max(cores.get(attempt.name, 0.0), receipt.get("cpus", 0.0))
    for name, cpus in cores.items():
        if cpus:
            by_name[name].holds = by_name[name].holds | {"cpus": cpus}
    return by_name


def find_attempt(receipt: Json, attempts_by_name: dict[str, AttemptCost]) -> AttemptCost | None:
    """The attempt that wrote a receipt. Drivers of an object store may share a number: then the one that started later."""
    same_number = [a for name, a in attempts_by_name.items() if int(name.split("-")[0]) == receipt.get("attempt")]
    return max((a for a in same_number if a.started <= receipt.get("at", 0.0)), key=lambda a: a.started, default=None)


def shard_bill(receipt: Json, attempt: AttemptCost | None, rates: Rates) -> Json:
    """One shard's share of the stage's bill."""
    cost, counts = receipt["cost"], receipt["counts"]
    workers = attempt.holds["workers_of_a_shard"] if attempt else 1
    tokens = {kind: cost.get(f"{kind}_tokens", 0) for kind in KINDS}
    seconds = {kind: cost.get(f"{kind}_s", 0.0) * workers for kind in SECONDS}
    # a training starts its workers within its only shard
    setup_s = min(cost.get("setup_s", 0.0) * workers, seconds["busy"])
    seconds = seconds | {"start": seconds["start"] + setup_s, "busy": seconds["busy"] - setup_s}
    lost_tokens, total_tokens = cost.get("lost_tokens", 0), tokens["prompt"] + tokens["completion"]
    failed_tokens = [cost.get(f"failed_{kind}_tokens", 0) for kind in ("prompt", "completion")]
    if rates.tokens is not None:
        work = rates.tokens.usd(**tokens)
        waste = work * lost_tokens / total_tokens if total_tokens else 0.0
        waste += rates.tokens.usd(prompt=failed_tokens[0], completion=failed_tokens[1])
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
            "tokens": lost_tokens + sum(failed_tokens),
            "tries": cost.get("lost_tries", 0),
            "retries": cost.get("retries", 0),
        },
        "usd": usd,
    }


def stage_bill(folder: Artifact, receipts: Iterable[Json], rates: Rates) -> Json:
    """The bill of a stage whose current shards have these receipts; see ``shard_bill`` for one shard.

    ``waste`` holds, besides the shards' own waste, all that was spent on revoked shards: ``tokens`` that are in no table,
    worker ``seconds``, ``shards``. Its dollars are in ``usd``.
    """
    current, revoked = list(receipts), folder.revoked()
    attempts_by_name = attempts(folder, [*current, *revoked])
    total: Json = {}
    for receipt in current:
        add_up(total, shard_bill(receipt, find_attempt(receipt, attempts_by_name), rates))
    if not current:
        add_up(total, shard_bill({"cost": {}, "counts": {}}, None, rates))
    waste: Json = {"shards": len(revoked), "seconds": 0.0}
    for receipt in revoked:
        line = shard_bill(receipt, find_attempt(receipt, attempts_by_name), rates)
        revoked_tokens = line["tokens"]["prompt"] + line["tokens"]["completion"]
        line["waste"]["tokens"] += revoked_tokens
        add_up(waste, line["waste"])
        waste["seconds"] += sum(line["seconds"][kind] for kind in SECONDS)
        total["seconds"]["cpu"] += line["seconds"]["cpu"]
        total["usd"]["waste"] += sum(line["usd"].values())
    total["waste"] = add_up(waste, total["waste"])
    seconds, usd = total["seconds"], total["usd"]
    seconds["wall"] = sum(attempt.wall_s for attempt in attempts_by_name.values())
    seconds["held"] = sum(attempt.held_s for attempt in attempts_by_name.values())
    seconds["rest"] = seconds["held"] - sum(seconds[kind] for kind in SECONDS) - waste["seconds"]
    for kind in ("cpu", "gpu"):
        seconds[f"held_{kind}"] = sum(
            attempt.held_s * attempt.holds[f"{kind}s"] for attempt in attempts_by_name.values()
        )
    usd["total"] = usd["work"] + usd["waste"]
    usd["held"] = usd["total"]
    if rates.tokens is None:
        usd["held"] = sum(attempt.usd(attempt.held_s, rates) for attempt in attempts_by_name.values())
        usd["waiting"] = usd["held"] - usd["total"] - usd["setup"]
    return total | {"attempts": len(attempts_by_name), "rates": rates.to_json()}


def unfinished_ranges(folder: Artifact, receipts: Iterable[Json]) -> list[Json]:
    """Ranges of rows that have a mark and no receipt: running, or lost with their worker. Each has its attempt, its rows
    and, at the mean of rows with receipts, its ``tokens`` (0 if there are none yet).
    """
    rows = spent = 0
    committed_at: dict[int, float] = {}  # a worker that dies right after its commit leaves marks that its receipt bills
    for receipt in receipts:
        committed_at[receipt["shard"]] = max(receipt.get("at", 0.0), committed_at.get(receipt["shard"], 0.0))
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
        if mark and mark["began"] > committed_at.get(mark["shard"], 0.0)
    ]


def with_remaining_budget(engine: AnyEngine, folder: Artifact, workers: int, at_work: bool = True) -> AnyEngine:
    """The engine with the part of ``budget_usd`` that earlier runs left; unchanged if it has no budget.

    Each worker calls this (``at_work``), and the driver before a run, to see whether it may start. A worker that replaces
    a dead one cannot know what that one spent of its share, so everything that this run has spent so far is subtracted
    from its own. Raises ConfigError if less remains than one row has cost.
    """
    budget: float | None = getattr(engine, "budget_usd", None)
    if not budget:
        return engine
    receipts = [*folder.receipts().values(), *folder.revoked()]
    current_attempt = (
        max((int(name.split("-")[0]) for name in folder.listing("attempts")), default=0) if at_work else None
    )
    rates, workers = Rates.from_prices(Prices(), engine), max(workers, 1)
    usd, tokens, rows, before, during = 0.0, 0, 0, 0.0, 0.0
    for receipt in receipts:
        line = shard_bill(receipt, None, rates)
        spent = sum(line["usd"].values())
        usd, rows = usd + line["usd"]["work"], rows + line["rows"]["in"]
        tokens += line["tokens"]["prompt"] + line["tokens"]["completion"]
        before, during = (
            (before, during + spent) if receipt.get("attempt") == current_attempt else (before + spent, during)
        )
    for mark in unfinished_ranges(folder, receipts):
        spent = mark["tokens"] * usd / max(tokens, 1)
        before, during = (before, during + spent) if mark["attempt"] == current_attempt else (before + spent, during)
    remaining = budget - before - during * workers
    if remaining <= usd / max(rows, 1):
        raise ConfigError(
            f"{engine.type}: ${before + during:.6f} of budget_usd = {budget:g} is spent on {folder.name}; "
            "raise budget_usd and run again: finished shards are kept"
        )
    return engine.model_copy(update={"budget_usd": remaining})
