"""A server with OpenAI's completions API as an engine: a hosted model, or one served elsewhere (``vllm serve``)."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dagr_ray import tables
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError
from dagr_ray.engines import Completion, Engine, Sampling
from dagr_ray.strategies import Prompt

if TYPE_CHECKING:
    import aiohttp

Positive = Annotated[float, Field(gt=0)]
Result = TypeVar("Result")

BACKOFF_S = 0.5  # before the second attempt; doubled for each one after it
BACKOFF_MAX_S = 30.0
RETRY_AFTER_MAX_S = 600.0  # a server that asks for more (a daily quota) is not waited for
AGAIN = frozenset({408, 409, 429})  # and 5xx
HIDDEN = "(hidden)"
LOCAL = ("localhost", "127.0.0.1", "::1")
# What says where, how fast and for how much; none of it changes a completion.
NOT_HASHED = frozenset(
    "base_url api_key_env allow_plain_http requests_per_minute tokens_per_minute in_flight timeout_s max_attempts "
    "budget_usd usd_per_million_prompt_tokens usd_per_million_completion_tokens".split()
)


class OpenAIServer(Engine):
    """A model behind ``base_url``/completions (OpenAI's API reference, "Completions"): raw prompts, one request a sample.

    ``base_url`` mostly ends in /v1. What is computed is named by ``model`` and ``revision``, a label of the user's: no
    server proves which weights it has, and not every server heeds seeds. ``api_key_env`` names the environment variable
    with the key (of every worker; None sends none); the key itself is no field. A passage is cut at its end to
    ``passage_characters``; what is still too long for the server is an error of its row.

    The limits hold for a whole stage: each of the pool's workers gets an equal share. ``tokens_per_minute`` counts
    prompt and completion. ``budget_usd`` holds for one run; each request is first counted at the most that it can cost,
    and one whose answer was lost stays so counted. No request is begun that could go over it.

    >>> OpenAIServer(model="org/name", revision="2025-01", base_url="https://llm.example/v1").model_name()
    'org/name@2025-01'
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "openai"
    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    base_url: str
    api_key_env: str | None = None
    allow_plain_http: bool = False
    passage_characters: Annotated[int, Field(ge=1)] | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    in_flight: Annotated[int, Field(ge=1)] = 16
    timeout_s: Positive = 120.0
    max_attempts: Annotated[int, Field(ge=1)] = 8
    budget_usd: Positive | None = None
    usd_per_million_prompt_tokens: Annotated[float, Field(ge=0)] = 0.0
    usd_per_million_completion_tokens: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _hide_keys(cls, value: Any) -> Any:
        # pydantic's errors quote what was given: a key in a wrong place is to be refused without being shown
        if not isinstance(value, dict):
            return value
        hidden = {k: v if k in cls.model_fields or k == "type" else HIDDEN for k, v in value.items()}
        if isinstance(name := value.get("api_key_env"), str) and not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
            hidden["api_key_env"] = HIDDEN
        if isinstance(url := value.get("base_url"), str):
            url = re.sub(r"//.*@", f"//{HIDDEN}@", url.strip(), flags=re.DOTALL)
            hidden["base_url"] = re.sub(r"[?#].*", f"?{HIDDEN}", url, flags=re.DOTALL).rstrip("/")
        return hidden

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value == HIDDEN:
            raise ConfigError(
                "it must be the name of an environment variable in capital letters, never the key; "
                "put the key into a variable and give its name, such as 'OPENAI_API_KEY'"
            )
        return value

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            plain = False
        if not plain or HIDDEN in value or re.search(r"\s", value):
            raise ConfigError(
                "it must be an address without user, password and query; give one such as 'https://host/v1'"
            )
        return value

    @model_validator(mode="after")
    def _is_safe(self) -> OpenAIServer:
        parts = urlsplit(self.base_url)
        if parts.scheme == "http" and parts.hostname not in LOCAL and not self.allow_plain_http:
            raise ConfigError(
                f"openai: base_url = {self.base_url!r} would send prompts and key in the clear; allowed: https://, and "
                "http:// to localhost; in a network that you trust set allow_plain_http=True"
            )
        if self.budget_usd and not (self.usd_per_million_prompt_tokens or self.usd_per_million_completion_tokens):
            raise ConfigError(
                f"openai: budget_usd = {self.budget_usd} means nothing without prices; "
                "set usd_per_million_prompt_tokens and usd_per_million_completion_tokens"
            )
        return self

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in super().identity().items() if name not in NOT_HASHED}

    def model_name(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model

    def check(self) -> None:
        if find_spec("aiohttp") is None:
            raise ConfigError("engine openai: aiohttp is not installed; run `make setup`, or: pip install aiohttp")
        _key(self.api_key_env)

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost, in dollars. Cached tokens count in full."""
        prompt = prompt_tokens * self.usd_per_million_prompt_tokens
        return (prompt + completion_tokens * self.usd_per_million_completion_tokens) / 1e6

    def open(self, pool: Pool) -> _Session:
        self.check()
        return _Session(self, pool)


def _key(name: str | None) -> str | None:
    """The key in the environment variable ``name``. Raises ConfigError, which never shows it."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"openai: the environment variable {name} (api_key_env) is not set; export it before the run, on every node"
        )
    if not re.fullmatch("[!-~]+", key):
        raise ConfigError(f"openai: the key in {name} has spaces or letters that no header can hold; set it again")
    return key


def retry_after_s(value: str | None, now: float) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110, section 10.2.3), 0 where it asks for nothing.

    >>> retry_after_s("2.5", 0), retry_after_s("Thu, 01 Jan 1970 00:00:30 GMT", 10), retry_after_s("soon", 0)
    (2.5, 20.0, 0.0)
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)


class _Bucket:
    """A token bucket: ``per_minute`` units flow in evenly, at most ``burst`` are kept. None is no limit."""

    def __init__(self, per_minute: float | None, burst: float) -> None:
        self.rate, self.burst, self.level, self.at = (per_minute or math.inf) / 60, burst, burst, time.monotonic()

    async def take(self, amount: float) -> None:
        """Waits until ``amount`` has flowed in."""
        if self.rate == math.inf:
            return
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.at) * self.rate) - amount
        self.at = now
        if self.level < 0:
            await asyncio.sleep(-self.level / self.rate)

    def give_back(self, amount: float) -> None:
        """Returns what was taken and not used; where more was used than taken, ``amount`` is negative."""
        self.level += amount


class _Budget:
    """Dollars spent, and held for requests under way."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.spent, self.held, self.under_way = limit or math.inf, 0.0, 0.0, 0
        self.changed = asyncio.Event()

    async def hold(self, most: float) -> None:
        """Sets ``most`` dollars aside; waits for requests under way, which mostly cost less. Raises ConfigError."""
        while self.spent + self.held + most > self.limit:
            if not self.under_way:
                raise ConfigError(
                    f"openai: budget_usd: ${self.spent:.6f} of this worker's ${self.limit:.6f} are spent, and the next "
                    f"request could cost ${most:.6f}; raise budget_usd and run again: finished shards are kept"
                )
            self.changed.clear()
            await self.changed.wait()
        self.held += most
        self.under_way += 1

    def settle(self, most: float, cost: float) -> None:
        self.held, self.spent, self.under_way = self.held - most, self.spent + cost, self.under_way - 1
        self.changed.set()


@dataclass
class _Failure:
    """Why an attempt gave no completion; ``billed`` where it may have cost something all the same."""

    cause: str
    again: bool = True
    billed: bool = False
    wait_s: float = 0.0


class _Session:
    """An event loop in a thread of its own (the caller's may run one already, as in a notebook), and its connections."""

    def __init__(self, config: OpenAIServer, pool: Pool) -> None:
        self.config, self._key, share = config, _key(config.api_key_env), max(pool.workers, 1)
        self.in_flight = max(config.in_flight // share, 1)
        requests, tokens = ((x and x / share) for x in (config.requests_per_minute, config.tokens_per_minute))
        # bursts of one request and of a second's tokens: servers count by the minute, and by the second too
        self.requests, self.tokens = _Bucket(requests, 1), _Bucket(tokens, (tokens or 0) / 60)
        self.budget = _Budget(config.budget_usd and config.budget_usd / share)
        self.gate, self.closed_until = asyncio.Lock(), 0.0
        self.seen_bytes, self.seen_tokens = 3000, 1000  # of prompts, for guessing; a guess to begin with
        parts = urlsplit(config.base_url)
        direct = parts.hostname in LOCAL or urllib.request.proxy_bypass(str(parts.hostname))
        self.proxy = None if direct else urllib.request.getproxies().get(parts.scheme)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="dagr-openai", daemon=True)
        self.thread.start()
        self.http = self._wait(self._connect())

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()  # where Ctrl-C ended the waiting

    async def _connect(self) -> aiohttp.ClientSession:
        import aiohttp

        headers = {"Content-Type": "application/json", "User-Agent": "dagr-ray"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_s),
            connector=aiohttp.TCPConnector(limit=self.in_flight),
        )

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """One request for each sample. Raises ConfigError for a wrong key, model or address, and at the budget's end."""
        asked = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            passage = prompt.passage[: self.config.passage_characters]
            request: dict[str, Any] = {
                "model": self.config.model,
                "prompt": tables.clean(prompt.before + passage + prompt.after),
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
            if prompt.stop:
                request["stop"] = list(prompt.stop)
            asked += [(request | {"seed": seed + i}, len(passage) < len(prompt.passage)) for i in range(n)]
        made = self._wait(self._all(asked))
        return [made[i : i + n] for i in range(0, len(made), n)]

    async def _all(self, asked: list[tuple[dict[str, Any], bool]]) -> list[Completion]:
        made: dict[int, Completion] = {}
        rest = iter(enumerate(asked))

        async def work() -> None:
            for i, (request, truncated) in rest:
                made[i] = await self._complete(request)
                made[i].truncated = truncated

        workers = [asyncio.ensure_future(work()) for _ in range(min(self.in_flight, len(asked)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [made[i] for i in range(len(asked))]

    async def _complete(self, request: dict[str, Any]) -> Completion:
        for attempt in range(1, self.config.max_attempts + 1):
            answer = await self._attempt(request)
            if isinstance(answer, Completion):
                return answer
            if not answer.again or answer.wait_s > RETRY_AFTER_MAX_S or attempt == self.config.max_attempts:
                break
            self.closed_until = max(self.closed_until, time.monotonic() + answer.wait_s)
            # half of it at random, so that what failed together does not come back together
            await asyncio.sleep(min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1))
        return Completion(None, None, 0, 0, 0, error=f"{answer.cause} (attempt {attempt})")

    async def _attempt(self, request: dict[str, Any]) -> Completion | _Failure:
        """One request, within the budget and the limits."""
        size = len(request["prompt"].encode())
        # no token is less than a byte; a start token and the like come on top
        most = self.config.usd(size + 16, request["max_tokens"])
        guess = math.ceil(size * self.seen_tokens / self.seen_bytes) + request["max_tokens"]
        cost, used = 0.0, guess
        await self.budget.hold(most)
        try:
            async with self.gate:  # one after the other, so that a wait which the server asks for holds all of them
                await self.requests.take(1)
                await self.tokens.take(guess)
                while (left := self.closed_until - time.monotonic()) > 0:
                    await asyncio.sleep(left)
            cost = most
            answer = await self._post(request)
            if isinstance(answer, Completion):
                if answer.prompt_tokens:
                    cost = self.config.usd(answer.prompt_tokens, answer.completion_tokens)
                    used = answer.prompt_tokens + answer.completion_tokens
                    self.seen_bytes, self.seen_tokens = self.seen_bytes + size, self.seen_tokens + answer.prompt_tokens
            elif not answer.billed:
                cost = 0.0
            return answer
        finally:
            self.budget.settle(most, cost)
            self.tokens.give_back(guess - used)

    async def _post(self, request: dict[str, Any]) -> Completion | _Failure:
        import aiohttp

        # Nothing of aiohttp's gets out: its exceptions hold the request's headers, and with them the key.
        try:
            url, body = f"{self.config.base_url}/completions", json.dumps(request, ensure_ascii=False).encode()
            async with self.http.post(url, data=body, proxy=self.proxy, allow_redirects=False) as response:
                status, after, text = response.status, response.headers.get("Retry-After"), await response.read()
        except aiohttp.ClientConnectorCertificateError:
            status = 0
        except aiohttp.ClientConnectorError as error:
            return _Failure(self._line(f"no connection: {error}"))
        except TimeoutError:
            return _Failure(f"no answer within timeout_s = {self.config.timeout_s:g}", billed=True)
        except (aiohttp.ClientError, OSError) as error:
            return _Failure(f"the connection broke: {type(error).__name__}", billed=True)
        if status == 0:
            raise ConfigError(
                f"openai: the certificate of {self.config.base_url!r} is not trusted; mend base_url or it"
            )
        value = _json(text)
        if 200 <= status < 300:
            return _completion(value) or _Failure("the answer is no completion in JSON", billed=True)
        cause = self._line(f"HTTP {status}: {_message(value) or text[:2000].decode(errors='replace')}")
        if remedy := self._remedy(status, value):
            raise ConfigError(f"openai: {self.config.base_url!r} answers {cause}; {remedy}")
        return _Failure(cause, status in AGAIN or status >= 500, wait_s=retry_after_s(after, time.time()))

    def _remedy(self, status: int, value: Any) -> str | None:
        """What to do about an answer that every request would get."""
        config = self.config
        if status in (401, 403):
            held = f"the key in {config.api_key_env}" if config.api_key_env else "no key is sent: set api_key_env"
            return f"{held} must be one that may use model = {config.model!r}"
        if status == 404:
            return (
                f"set model = {config.model!r} to one that it serves, and base_url to what stands before /completions"
            )
        if 300 <= status < 400:
            return "it sends elsewhere; set base_url to the address that it sends to"
        if status == 429 and "insufficient_quota" in (_error(value).get("code"), _error(value).get("type")):
            return "add credit to the account and run again: finished shards are kept"
        return None

    def _line(self, text: str) -> str:
        """One line of at most 300 characters without the key, which some servers quote."""
        return " ".join(text.replace(self._key or HIDDEN, HIDDEN).split())[:300]

    def close(self) -> None:
        """Closes the connections and ends the thread. A second call does nothing."""
        if self.loop.is_closed():
            return
        self._wait(self.http.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _error(value: Any) -> dict[str, Any]:
    found = value.get("error") if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _message(value: Any) -> str | None:
    """What a server's error says, in the forms of OpenAI, FastAPI and older vLLM."""
    if not isinstance(value, dict):
        return None
    found = _error(value).get("message") or value.get("message") or value.get("detail") or value.get("error")
    return str(found) if found else None


def _completion(value: Any) -> Completion | None:
    try:
        choice, usage = value["choices"][0], value.get("usage") or {}
        text, reason, details = choice["text"], choice.get("finish_reason"), usage.get("prompt_tokens_details") or {}
        if not isinstance(text, str):
            return None
        counts = usage.get("prompt_tokens"), details.get("cached_tokens"), usage.get("completion_tokens")
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
    # a count that is missing, or no number, is 0
    prompt, cached, written = (c if isinstance(c, int) and 0 <= c < 2**31 else 0 for c in counts)
    return Completion(tables.clean(text), str(reason) if reason else None, prompt, cached, written)
