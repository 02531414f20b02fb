"""Pools of workers and prices: how fast a stage runs and what it costs. Nothing in a placement changes a result."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from dagr_ray.core.config import Config, ConfigError, JsonObject, from_json
from dagr_ray.core.paths import absolute


class Pool(Config):
    """A fixed-size pool of workers. ``workers=0`` runs the work in the calling process, without Ray.

    A worker runs ``in_flight`` shards at once if its stage can. A range of rows that takes longer than ``deadline_s`` has
    hung: its worker is ended, and the faulty row is searched for. ``engine_args`` are options of the engine under its own
    names that only change its speed. For training: a checkpoint is written every ``checkpoint_every`` steps, and with
    ``fsdp`` each worker holds a share of the model's weights and of the optimizer's state.
    """

    workers: Annotated[int, Field(ge=0)] = 0
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    shard_rows: Annotated[int, Field(ge=1)] = 256
    in_flight: Annotated[int, Field(ge=1)] = 2
    deadline_s: Annotated[float, Field(gt=0)] = 1800.0
    engine_args: JsonObject = {}
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    fsdp: bool = False


class TokenPrices(Config):
    """Dollars per million tokens of a hosted model. ``cached`` defaults to the price of ``prompt``."""

    prompt: Annotated[float, Field(ge=0)] = 0.0
    cached: Annotated[float, Field(ge=0)] | None = None
    completion: Annotated[float, Field(ge=0)] = 0.0

    def usd(self, prompt: int = 0, cached: int = 0, completion: int = 0) -> float:
        """Dollars for these numbers of tokens; ``cached`` counts the prompt tokens that were not computed again.

        >>> TokenPrices(prompt=1, cached=0.5, completion=4).usd(prompt=3_000_000, cached=2_000_000, completion=500_000)
        4.0
        """
        hit = self.prompt if self.cached is None else self.cached
        return ((prompt - cached) * self.prompt + cached * hit + completion * self.completion) / 1e6


class Prices(Config):
    """The price of an hour of a machine, and ``tokens``: an endpoint's prices by model name (``default`` for any other).

    Zero means unknown. A stage whose tokens have a price is billed by tokens, any other by its pool's time.
    """

    cpu_hour: Annotated[float, Field(ge=0)] = 0.0
    gpu_hour: Annotated[float, Field(ge=0)] = 0.0
    tokens: dict[str, TokenPrices] = {}


class Placement(Config):
    """Where and how fast stages run, and prices. Nothing here enters a fingerprint."""

    name: str = "local"
    generate: Pool = Pool(workers=1, cpus=1, shard_rows=128)
    retrieve: Pool = Pool()
    light: Pool = Pool(shard_rows=16384)
    train: Pool = Pool(workers=1, cpus=0.9)
    trials: Annotated[int, Field(ge=1)] = 2
    prices: Prices = Prices(cpu_hour=0.05)


class PricedEngine(Config):
    """What the bill needs from an engine: the cores that it takes and its token prices."""

    abstract: ClassVar[bool] = True

    def cores(self, pool: Pool) -> float:
        """How many cores of this machine an open engine takes; the pool's cores by default."""
        return max(pool.cpus, 1)

    def token_prices(self, prices: Prices) -> TokenPrices | None:
        """Its token prices if tokens are all that is paid for; None if machines are paid by the hour."""
        return None


def load_placement(name: str) -> Placement:
    """A placement from a TOML file, or a built-in one by name (``local``). Raises ConfigError."""
    if name == "local":
        return Placement()
    path = Path(absolute(name)) if name else Path()
    if not path.is_file():
        raise ConfigError(
            f"placement {name!r} is not a file; allowed: local, or a TOML file such as cluster/one_gpu.toml"
        )
    try:
        return from_json(tomllib.loads(path.read_text()), Placement)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"placement {name!r} is not TOML: {error}; correct the file") from None
