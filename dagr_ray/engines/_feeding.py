"""Continuous feeding of an in-process vLLM engine: one thread steps it, any number of threads ask at once.

A call of ``LLM.generate`` returns when the last of its requests has ended, with the batch nearly empty by then. Here the
requests of all callers share the batch, so that one caller's last requests run beside another's first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagr_ray.core.stage import EngineDied

# How long a step may take before an engine that is called off counts as hanging.
GIVE_UP_S = 30.0


@dataclass
class Request:
    """Tokens of a prompt, how to sample (``SamplingParams``), and in the end the ``RequestOutput``, or an error's text."""

    tokens: list[int]
    params: Any
    answer: Any = None


@dataclass(eq=False)
class _Call:
    """What one caller waits for."""

    requests: Sequence[Request]
    left: int
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


@dataclass
class _Asked:
    """A request inside the engine, by the name that the engine gave it."""

    request: Request
    call: _Call
    name: str


def longest_first(asked: Iterable[tuple[str, Request]]) -> list[Request]:
    """Requests by falling length, those of one passage side by side as they came, for the prefix cache.

    What a batch holds is then alike in length, and what is left at a run's end is short. A request's seed is its own, so
    the order changes no draw.

    >>> a, b, c = Request([1] * 3, None), Request([1] * 5, None), Request([1] * 4, None)
    >>> [len(r.tokens) for r in longest_first([("one", c), ("two", a), ("two", b)])]
    [3, 5, 4]
    """
    asked = list(asked)
    longest: dict[str, int] = {}
    for passage, request in asked:
        longest[passage] = max(longest.get(passage, 0), len(request.tokens))
    return [request for _, request in sorted(asked, key=lambda each: -longest[each[0]])]


class Feeding:
    """Owns an engine: one thread starts it, adds every caller's requests, steps it and ends it.

    All of that is one thread because OpenMP keeps a team of threads for each thread that computes: stepped by its callers
    in turn, an engine would have several teams, each with a number of threads of its own. ``busy_s`` is the time spent in
    steps.
    """

    def __init__(self, start: Callable[[], Any], stop: Callable[[Any], None], lora: str | None = None) -> None:
        """``start`` returns a ``vllm.LLM`` and ``stop`` ends it, both called in the thread; ``lora`` is an adapter's folder.

        Raises what ``start`` raises.
        """
        self.llm: Any = None
        self.busy_s = 0.0
        self._start, self._stop, self._lora = start, stop, lora
        self._changed = threading.Condition()
        self._new: list[_Call] = []
        self._given_up: list[_Call] = []
        self._closing = False
        self._dead: BaseException | None = None
        # only read and written in the engine's thread
        self._calls: list[_Call] = []
        self._asked: dict[str, _Asked] = {}
        self._count = 0
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="vllm-engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._dead is not None:
            raise self._dead

    def ask(self, requests: Sequence[Request]) -> None:
        """Fills in the answers and returns when all are there. Raises EngineDied where the engine died or was closed."""
        if not requests:
            return
        call = _Call(requests, len(requests))
        with self._changed:
            if self._dead is not None:
                raise EngineDied(str(self._dead)) from self._dead
            self._new.append(call)
            self._changed.notify()
        try:
            call.done.wait()
        except BaseException:  # Ctrl-C or a watchdog in the caller's thread: nobody will read these answers
            with self._changed:
                self._given_up.append(call)
                self._changed.notify()
            if not call.done.wait(GIVE_UP_S):
                self._dead = EngineDied(f"the engine hangs: a step takes more than {GIVE_UP_S:g} s")
            raise
        if call.error is not None:
            raise EngineDied(str(call.error)) from call.error

    def close(self) -> None:
        """Ends the engine and its thread; who still waits gets EngineDied. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        # a thread that hangs in a step cannot be ended: it goes with the process
        self._thread.join(None if self._dead is None else GIVE_UP_S)

    # -- in the engine's thread ---------------------------------------------------------------------------------------

    def _run(self, ready: threading.Event) -> None:
        try:
            self.llm = self._start()
        except BaseException as error:
            self._dead = error
            return
        finally:
            ready.set()
        ended: BaseException = EngineDied("the engine was closed")
        try:
            while self._take():
                failed = self._step()
                if failed is not None:
                    self._isolate(failed)
        except BaseException as error:
            ended = error
        with self._changed:
            self._dead = ended
            waiting = [*self._calls, *self._new]
        for call in waiting:
            call.error = ended
            call.done.set()
        llm, self.llm = self.llm, None
        with contextlib.suppress(Exception):  # a dead engine's: the error that counts has been raised
            self._stop(llm)

    def _take(self) -> bool:
        """Waits for work, adds new calls and drops those that nobody waits for. False where the engine is to end."""
        with self._changed:
            while not (self._new or self._asked or self._given_up or self._closing):
                self._changed.wait()
            if self._closing:
                return False
            given_up, self._given_up = self._given_up, []
            new, self._new = [call for call in self._new if call not in given_up], []
        if given_up:
            self._calls = [call for call in self._calls if call not in given_up]
            self._drop([asked for asked in self._asked.values() if asked.call in given_up])
            for call in given_up:
                call.done.set()
        self._calls += new
        for call in new:
            for request in call.requests:
                self._add(request, call)
        return True

    def _add(self, request: Request, call: _Call) -> None:
        from vllm.inputs import tokens_input
        from vllm.lora.request import LoRARequest

        self._count += 1
        key = str(self._count)
        try:
            name = self.llm.llm_engine.add_request(
                key,
                tokens_input(request.tokens),
                request.params,
                lora_request=LoRARequest("lora", 1, self._lora) if self._lora else None,
            )
        except Exception as error:
            self._answer(request, call, _text(error))
        else:
            self._asked[key] = _Asked(request, call, name)

    def _step(self) -> Exception | None:
        """One step of the engine. Hands out the answers that are complete; returns the error where it failed."""
        began = time.perf_counter()
        try:
            outputs = self.llm.llm_engine.step()
        except Exception as error:
            return error
        finally:
            self.busy_s += time.perf_counter() - began
        for output in outputs:
            asked = self._asked.pop(output.request_id, None) if output.finished else None
            if asked is not None:
                self._answer(asked.request, asked.call, output)
        return None

    def _answer(self, request: Request, call: _Call, answer: Any) -> None:
        request.answer = answer
        call.left -= 1
        if not call.left:
            self._calls = [each for each in self._calls if each is not call]
            call.done.set()

    def _isolate(self, error: Exception) -> None:
        """Finds the requests that make a step fail, by halves asked again alone. Raises where the engine is at fault.

        A request that is asked again is drawn with the same seeds, so this changes no answer.
        """
        groups = [(self._recover(error), error)]
        while groups and not self._closing:
            group, error = groups.pop()
            if len(group) == 1:
                self._answer(group[0].request, group[0].call, _text(error))
                continue
            middle = len(group) // 2
            for half in (group[:middle], group[middle:]):
                for asked in half:
                    self._add(asked.request, asked.call)
                failed = None
                while self._asked and failed is None:
                    failed = self._step()
                if failed is not None:
                    groups.append((self._recover(failed), failed))

    def _recover(self, error: Exception) -> list[_Asked]:
        """Empties the engine after a step that failed and returns what was in it. Raises EngineDied where it is no more."""
        from vllm import SamplingParams

        left = list(self._asked.values())
        probe = Request([0], SamplingParams(max_tokens=1))
        try:
            self._drop(left)
            # the failed step has marked blocks as cached that it never computed
            self.llm.llm_engine.reset_prefix_cache()
            self._add(probe, _Call([probe], 1))
            again = None
            while self._asked and again is None:
                again = self._step()
        except Exception as problem:
            again = problem
        if again is not None or isinstance(probe.answer, str):
            raise EngineDied(f"the engine died: {_text(error)}") from error
        return left

    def _drop(self, dropped: list[_Asked]) -> None:
        names = {asked.name for asked in dropped}
        self._asked = {key: asked for key, asked in self._asked.items() if asked.name not in names}
        self.llm.llm_engine.abort_request(list(names), internal=True)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
