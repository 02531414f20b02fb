"""Crops that take their time: an engine for tests that take nodes away while it works."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from dagr_ray.core.placement import Pool
from dagr_ray.engines import Completion, Sampling, Session
from dagr_ray.engines.crop import CropEngine
from dagr_ray.prompts import Prompt


class SlowCrop(CropEngine):
    """Waits ``pause_s`` seconds for each prompt. The pause does not change the text, so it is not part of the identity."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "crop-with-pauses"
    pause_s: float = 0.02

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in super().identity().items() if name != "pause_s"}

    def open(self, pool: Pool) -> Session:
        return _Session(self, pool)


class _Session:
    def __init__(self, config: SlowCrop, pool: Pool) -> None:
        self.pause_s, self.crop = config.pause_s, CropEngine(max_words=config.max_words).open(pool)

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        time.sleep(self.pause_s * len(prompts))
        return self.crop.generate(prompts, seeds, sampling, n)

    def close(self) -> None:
        self.crop.close()
