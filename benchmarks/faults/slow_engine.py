"""An engine for tests of faults: crops, with a child process of its own that takes its time, and a log of all it is asked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import EngineDied, Stage
from dagr_ray.engines import Completion, Sampling, Session
from dagr_ray.engines.crop import CropEngine
from dagr_ray.prompts import Prompt
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop

CHILD = "import sys, time\nfor line in sys.stdin:\n    time.sleep(float(line))\n    print('done', flush=True)\n"


class SlowCrop(CropEngine):
    """``CropEngine`` that takes ``pause_s`` a passage and appends its words, as tokens, to ``log``."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "slow-crop"
    pause_s: float = 0.02
    log: str = ""

    def identity(self) -> dict[str, Any]:
        """Neither the pause nor the log changes the text."""
        return {name: value for name, value in super().identity().items() if name not in ("pause_s", "log")}

    def open(self, pool: Pool) -> Session:
        return _Session(self, pool)


class _Session:
    def __init__(self, config: SlowCrop, pool: Pool) -> None:
        self.config, self.crop = config, CropEngine(max_words=config.max_words).open(pool)
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.child.stdout is not None
        self.answers, self.turn = self.child.stdout, threading.Lock()
        self.log = os.open(config.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        for prompt in prompts:
            with self.turn:
                os.write(self.log, b"%d\n" % len(prompt.passage.split()))
                try:
                    print(self.config.pause_s, file=self.child.stdin, flush=True)
                    answer = self.answers.readline()
                except (BrokenPipeError, ValueError):
                    answer = ""
                if not answer:
                    raise EngineDied("its child process ended")
        return self.crop.generate(prompts, seeds, sampling, n)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()


def selected(data: str, log: str, seed: int = 0, samples: int = 2, pause_s: float = 0.02) -> Stage:
    """Generate, parse and filter ``data``, a BEIR folder."""
    from dagr_ray.filters.duplicate import Duplicate
    from dagr_ray.filters.length import Length

    corpus = Beir(path=data)
    made = Generate(
        corpus=corpus, strategy=Crop(), engine=SlowCrop(pause_s=pause_s, log=log), samples=samples, seed=seed
    )
    parsed = Parse(generations=made, corpus=corpus)
    # half of the crops are too short for this: filtering is part of what has to survive
    filters = (Length(min_words=9), Duplicate())
    return Select(parsed=parsed, scores=tuple(Score(parsed=parsed, corpus=corpus, filter=each) for each in filters))
