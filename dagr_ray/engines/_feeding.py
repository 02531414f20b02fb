"""Continuous feeding of an in-process vLLM engine: one thread steps it, any number of threads send requests.

A call of ``LLM.generate`` returns when its last request ends, and the batch is nearly empty by then. Here the requests of
all callers share the batch, so that one caller's last requests run together with another's first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagr_ray.core.stage import EngineDied

# How long a step may take before a cancelled engine counts as hanging.
GIVE_UP_S = 30.0


@dataclass
class Request:
    """Tokens of a prompt and ``SamplingParams``; when done, ``answer`` is the ``RequestOutput``, or an error's text."""

    tokens: list[int]
    params: Any
    answer: Any = None


@dataclass(eq=False)
class _Call:
    """The requests of one caller, which waits for ``done``."""

    requests: Sequence[Request]
    remaining: int
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


@dataclass
class _ActiveRequest:
    """A request inside the engine, with the engine's name for it."""

    request: Request
    call: _Call
    name: str


def longest_first(requests: Iterable[tuple[str, Request]]) -> list[Request]:
    """Requests by descending length. Requests of one passage stay adjacent and in order, for the prefix cache.

    The requests of a batch then have similar lengths, and the last ones of a run are short. Each request has its own seed,
    so the order changes no sample.

    >>> a, b, c = Request([1] * 3, None), Request([1] * 5, None), Request([1] * 4, None)
    >>> [len(r.tokens) for r in longest_first([("one", c), ("two", a), ("two", b)])]
    [3, 5, 4]
    """
    requests = list(requests)
    longest: dict[str, int] = {}
    for passage, request in requests:
        longest[passage] = max(longest.get(passage, 0), len(request.tokens))
    return [request for _, request in sorted(requests, key=lambda pair: -longest[pair[0]])]


class Feeding:
    """Owns an engine: one thread starts it, adds every caller's requests, steps it and ends it.

    A single thread does all of that, because OpenMP keeps a team of threads for each computing thread: if the callers
    stepped the engine in turn, it would have several teams. ``busy_s`` is the time spent in steps.
    """

    def __init__(self, start: Callable[[], Any], stop: Callable[[Any], None], lora: str | None = None) -> None:
        """``start`` returns a ``vllm.LLM`` and ``stop`` ends it, both called in the thread; ``lora`` is an adapter's folder.

        Raises the exceptions of ``start``.
        """
        self.llm: Any = None
        self.busy_s = 0.0
        self._start, self._stop, self._lora = start, stop, lora
        self._changed = threading.Condition()
        self._new: list[_Call] = []
        self._cancelled: list[_Call] = []
        self._closing = False
        self._dead: BaseException | None = None
        # only used in the engine's thread
        self._calls: list[_Call] = []
        self._active: dict[str, _ActiveRequest] = {}
        self._count = 0
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="vllm-engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._dead is not None:
            raise self._dead

    def ask(self, requests: Sequence[Request]) -> None:
        """Fills in the answers and returns when all are complete. Raises EngineDied if the engine died or was closed."""
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
                self._cancelled.append(call)
                self._changed.notify()
            if not call.done.wait(GIVE_UP_S):
                self._dead = EngineDied(f"the engine hangs: a step takes more than {GIVE_UP_S:g} s")
            raise
        if call.error is not None:
            raise EngineDied(str(call.error)) from call.error

    def close(self) -> None:
        """Ends the engine and its thread; waiting callers get EngineDied. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        # a thread that hangs in a step cannot be ended; it ends with the process
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
            while self._accept_calls():
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
        with contextlib.suppress(Exception):  # of a dead engine; the relevant error has been raised
            self._stop(llm)

    def _accept_calls(self) -> bool:
        """Waits for work, adds new calls and drops cancelled ones. False if the engine must end."""
        with self._changed:
            while not (self._new or self._active or self._cancelled or self._closing):
                self._changed.wait()
            if self._closing:
                return False
            cancelled, self._cancelled = self._cancelled, []
            new, self._new = [call for call in self._new if call not in cancelled], []
        if cancelled:
            self._calls = [call for call in self._calls if call not in cancelled]
            self._drop([active for active in self._active.values() if active.call in cancelled])
            for call in cancelled:
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
            self._active[key] = _ActiveRequest(request, call, name)

    def _step(self) -> Exception | None:
        """One step of the engine. Delivers complete answers; returns the error if the step failed."""
        began = time.perf_counter()
        try:
            outputs = self.llm.llm_engine.step()
        except Exception as error:
            return error
        finally:
            self.busy_s += time.perf_counter() - began
        for output in outputs:
            active = self._active.pop(output.request_id, None) if output.finished else None
            if active is not None:
                self._answer(active.request, active.call, output)
        return None

    def _answer(self, request: Request, call: _Call, answer: Any) -> None:
        request.answer = answer
        call.remaining -= 1
        if not call.remaining:
            self._calls = [other for other in self._calls if other is not call]
            call.done.set()

    def _isolate(self, error: Exception) -> None:
        """Finds the requests that make a step fail by bisection. Raises if the engine itself is at fault.

        A repeated request has the same seeds, so this changes no answer.
        """
        groups = [(self._recover(error), error)]
        while groups and not self._closing:
            group, error = groups.pop()
            if len(group) == 1:
                self._answer(group[0].request, group[0].call, _text(error))
                continue
            middle = len(group) // 2
            for half in (group[:middle], group[middle:]):
                for active in half:
                    self._add(active.request, active.call)
                failed = None
                while self._active and failed is None:
                    failed = self._step()
                if failed is not None:
                    groups.append((self._recover(failed), failed))

    def _recover(self, error: Exception) -> list[_ActiveRequest]:
        """Empties the engine after a failed step and returns its requests. Raises EngineDied if the engine is dead."""
        from vllm import SamplingParams

        requests = list(self._active.values())
        probe = Request([0], SamplingParams(max_tokens=1))
        try:
            self._drop(requests)
            # the failed step has marked blocks as cached without computing them
            self.llm.llm_engine.reset_prefix_cache()
            self._add(probe, _Call([probe], 1))
            failure = None
            while self._active and failure is None:
                failure = self._step()
        except Exception as problem:
            failure = problem
        if failure is not None or isinstance(probe.answer, str):
            raise EngineDied(f"the engine died: {_text(error)}") from error
        return requests

    def _drop(self, dropped: list[_ActiveRequest]) -> None:
        names = {active.name for active in dropped}
        self._active = {key: active for key, active in self._active.items() if active.name not in names}
        self.llm.llm_engine.abort_request(list(names), internal=True)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
