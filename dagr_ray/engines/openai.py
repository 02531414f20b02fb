"""A server with OpenAI's completions API as an engine: a hosted model, or your own server (``vllm serve``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import threading
import time
import urllib.request
from collections.abc import Coroutine, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dagr_ray.core import environment, special_tokens, tables
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool, Prices, TokenPrices
from dagr_ray.core.storage import local_folder
from dagr_ray.engines import Completion, Engine, Sampling, _answers
from dagr_ray.prompts import Prompt

if TYPE_CHECKING:
    import aiohttp

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Price = Annotated[float, Field(ge=0)]
Result = TypeVar("Result")

BACKOFF_S = 0.5  # before the second attempt; doubled for each one after it
BACKOFF_MAX_S = 30.0
RETRY_AFTER_MAX_S = 600.0  # if a server asks for a longer wait (a daily quota), the request fails
BAD_ANSWERS = 3  # invalid answers to one request before it fails, because each may be billed
RETRY_STATUS = frozenset({408, 409, 429})  # and 5xx
HIDDEN = "(hidden)"
LOCAL = ("localhost", "127.0.0.1", "::1")
# All other fields except `one_request` set address, speed and price; none of them changes a completion.
IDENTITY_FIELDS = ("type", "version", "model", "revision", "passage_characters")


class OpenAIServer(Engine):
    """A model behind ``base_url``/completions (OpenAI API reference, "Completions"), with raw prompts.

    The fingerprint has ``model`` and ``revision``, a label chosen by the user, because no server proves which weights it
    has, and some ignore seeds. ``api_key_env`` is the environment variable with the key in every worker (None sends no
    key); the key itself is not a field. A passage is cut at its end to ``passage_characters``; a prompt that is still too
    long is an error of its row. The limits apply to a stage: each of the pool's workers has an equal share.

    A special token that is spelled out in data (``</s>`` in a passage) is broken by a space, but not in the strategy's own
    words. Special tokens of known model families are recognised (``core.special_tokens``). ``tokenizer`` is a folder (or
    its URI) with the model's own tokenizer, whose special tokens are broken as well. It is read as data, on the machine that
    sends the requests.

    Log-probabilities are requested until the server refuses a request because of them.

    Every sample is a request with its own seed. ``one_request`` requests all samples of a prompt at once, with the seed of
    the first: the prompt is billed once, and the server decides how the samples differ.

    ``budget_usd`` limits a stage over all its runs. A request counts with its highest possible cost until its answer reports
    the actual cost, and no request starts that could exceed the budget. Requests in progress when a run was killed are
    assumed to cost as much as the same number of other rows. Cached tokens cost as much as others unless they have a price.

    >>> OpenAIServer(model="org/name", revision="2025-01", base_url="https://llm.example/v1").model_name()
    'org/name@2025-01'
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "openai"
    version: ClassVar[int] = (
        3  # breaks special tokens of more families, and words of templates, that are spelled out in data
    )
    reads_markers: ClassVar[bool] = True
    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    allow_plain_http: bool = False
    base_url: str
    api_key_env: str | None = None
    passage_characters: Count | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    in_flight: Count = 16
    timeout_s: Positive = 120.0
    max_attempts: Count = 8
    budget_usd: Positive | None = None
    usd_per_million_prompt_tokens: Price = 0.0
    usd_per_million_cached_tokens: Price | None = None
    usd_per_million_completion_tokens: Price = 0.0
    one_request: bool = False
    tokenizer: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _hide_keys(cls, value: Any) -> Any:
        # pydantic's errors quote the input, but a key in a wrong field must not be shown
        if not isinstance(value, dict):
            return value
        hidden = {k: v if k in cls.model_fields or k == "type" else HIDDEN for k, v in value.items()}
        if (name := value.get("api_key_env")) is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", str(name)):
            hidden["api_key_env"] = HIDDEN
        if isinstance(url := value.get("base_url"), str):
            hidden["base_url"] = re.sub(r"(?s)(?<=//).*@|[?#].*", HIDDEN, url).rstrip("/")
        return hidden

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value == HIDDEN:
            raise ConfigError(
                "allowed is the name of an environment variable in capital letters, not the key itself; "
                "put the key into a variable and give its name, such as 'OPENAI_API_KEY'"
            )
        return value

    @field_validator("base_url")
    @classmethod
    def _is_safe(cls, value: str, info: ValidationInfo) -> str:
        url = urlsplit(value)  # raises ValueError for an invalid host or port
        plain_http = url.hostname in LOCAL or info.data.get("allow_plain_http")
        safe = url.scheme == "https" or (url.scheme == "http" and plain_http)
        if not (safe and url.hostname and url.port != 0) or HIDDEN in value or re.search(r"\s", value):
            raise ConfigError(
                "allowed are https://host/v1 without user, password and query, and http:// to localhost or 127.0.0.1; "
                "give one of these, or set allow_plain_http=True for http:// in a network that you trust"
            )
        return value

    @model_validator(mode="after")
    def _has_prices(self) -> OpenAIServer:
        if self.budget_usd and not (self.usd_per_million_prompt_tokens or self.usd_per_million_completion_tokens):
            raise ConfigError(
                f"openai: budget_usd = {self.budget_usd} has no effect without prices; "
                "set usd_per_million_prompt_tokens and usd_per_million_completion_tokens"
            )
        return self

    def identity(self) -> dict[str, Any]:
        fields = {name: value for name, value in super().identity().items() if name in IDENTITY_FIELDS}
        own = self.special_tokens()
        return fields | ({"one_request": True} if self.one_request else {}) | ({"tokens": sorted(own)} if own else {})

    def special_tokens(self) -> frozenset[str]:
        return _special_tokens(self.tokenizer) if self.tokenizer else frozenset()

    def model_name(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model

    def check(self, pool: Pool | None = None) -> None:
        if find_spec("aiohttp") is None:
            raise ConfigError("engine openai: aiohttp is not installed; run `make setup`, or: pip install aiohttp")
        _key(self.api_key_env)
        self.special_tokens()

    def token_prices(self, prices: Prices) -> TokenPrices | None:
        """The engine's own prices, or the placement's prices for the model's name."""
        own = self._own_prices()
        table = prices.tokens
        return own or table.get(self.model_name()) or table.get(self.model) or table.get("default")

    def _own_prices(self) -> TokenPrices | None:
        per_million = self.usd_per_million_prompt_tokens, self.usd_per_million_completion_tokens
        if not any(per_million):
            return None
        return TokenPrices(prompt=per_million[0], cached=self.usd_per_million_cached_tokens, completion=per_million[1])

    def usd(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
        """The cost of tokens at the engine's own prices, in dollars."""
        own = self._own_prices()
        return own.usd(prompt_tokens, cached_tokens, completion_tokens) if own else 0.0

    def open(self, pool: Pool) -> _OpenAISession:
        self.check()
        return _OpenAISession(self, pool)


@lru_cache(maxsize=8)
def _special_tokens(folder: str) -> frozenset[str]:
    return special_tokens.special_tokens(local_folder(folder))


def _key(name: str | None) -> str | None:
    """The key in the environment variable ``name``. Raises ConfigError, which never shows it."""
    key = environment.key(name) if name else None
    if key == "":
        raise ConfigError(
            f"openai: the environment variable {name} (api_key_env) is not set; export it on every node before the run"
        )
    if key and not re.fullmatch(r"[!#-\[\]-~]+", key):
        raise ConfigError(f"openai: the key in {name} has spaces, quotes or letters that are not in keys; set it again")
    return key


def retry_after_s(value: str | None, now: float) -> float:
    """The seconds in a Retry-After header (RFC 9110, section 10.2.3); 0 if it is missing or invalid.

    >>> retry_after_s("2.5", 0), retry_after_s("Thu, 01 Jan 1970 00:00:30 GMT", 10), retry_after_s("soon", 0)
    (2.5, 20.0, 0.0)
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp() - now)
    except (ValueError, OverflowError, TypeError):
        return 0.0


class _Bucket:
    """A token bucket: ``per_minute`` units flow in evenly, and it holds at most ``burst``. None means no limit."""

    def __init__(self, per_minute: float | None, burst: float) -> None:
        self.rate, self.burst, self.level, self.at = (per_minute or math.inf) / 60, burst, burst, time.monotonic()

    async def take(self, amount: float) -> None:
        """Waits until ``amount`` is available. The caller may correct ``level`` by the amount actually used."""
        if self.rate < math.inf:
            now = time.monotonic()
            self.level, self.at = min(self.burst, self.level + (now - self.at) * self.rate) - amount, now
            await asyncio.sleep(max(0.0, -self.level / self.rate))


class _Budget:
    """Dollars spent, and dollars reserved for requests in progress."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.spent, self.held, self.under_way = limit or math.inf, 0.0, 0.0, 0
        self.changed = asyncio.Event()

    async def hold(self, most: float) -> None:
        """Reserves ``most``; first waits for requests in progress, which mostly cost less. Raises ConfigError."""
        while self.spent + self.held + most > self.limit:
            if not self.under_way:
                raise ConfigError(
                    f"openai: ${self.spent:.6f} of this worker's ${self.limit:.6f} of budget_usd are spent, the next "
                    f"request could cost ${most:.6f}; raise budget_usd and run again; finished shards are kept"
                )
            self.changed.clear()
            await self.changed.wait()
        self.held, self.under_way = self.held + most, self.under_way + 1

    def settle(self, most: float, cost: float) -> None:
        self.held, self.under_way, self.spent = self.held - most, self.under_way - 1, self.spent + cost
        self.changed.set()


class _Failure(NamedTuple):
    """Why an attempt gave no completion. ``billed``: it may have been charged anyway.

    ``bad``: the answer is not valid. A busy proxy may send such answers; a server that always does may bill them. ``away``:
    the server is unreachable or refuses all requests, so the request is not at fault; None means unknown.
    """

    cause: str
    again: bool = True
    billed: bool = False
    bad: bool = False
    wait_s: float = 0.0
    away: bool | None = False


class _OpenAISession:
    """An event loop with its connections, in its own thread, because the caller's thread may run one (in a notebook)."""

    def __init__(self, config: OpenAIServer, pool: Pool) -> None:
        self.config, self._key, share = config, _key(config.api_key_env), max(pool.workers, 1)
        requests, tokens = ((x and x / share) for x in (config.requests_per_minute, config.tokens_per_minute))
        # bursts of one request, and of the tokens of one second, because servers also count by the second
        self.requests, self.tokens = _Bucket(requests, 1), _Bucket(tokens, (tokens or 0) / 60)
        self.budget = _Budget(config.budget_usd and config.budget_usd / share)
        self.slots = asyncio.Semaphore(max(config.in_flight // share, 1))
        self.gate, self.shut_until, self.answered = asyncio.Lock(), 0.0, 0.0
        self.sends_logprobs = True  # until the server refuses them
        # set here, because aiohttp's own proxy lookup would also send credentials from a .netrc
        url = urlsplit(config.base_url)
        direct = url.hostname in LOCAL or urllib.request.proxy_bypass(str(url.hostname))
        self.proxy = None if direct else urllib.request.getproxies().get(url.scheme)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="dagr-openai", daemon=True)
        self.thread.start()
        self.http = self._wait(self._connect())

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()  # if Ctrl-C ended the waiting

    async def _connect(self) -> aiohttp.ClientSession:
        import aiohttp

        plain = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers = plain | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        return aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),  # no cookies are sent back
            auto_decompress=False,  # see ``_answers.body``
        )

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """Raises ConfigError for a wrong key, model or address and an exhausted budget; ConnectionError without a server."""
        requests: list[tuple[dict[str, Any], bool]] = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            passage = prompt.passage[: self.config.passage_characters]
            text = tables.clean(prompt.before + passage + prompt.after)
            request = {"model": self.config.model, "prompt": text, **sampling.model_dump(exclude={"logprob"})}
            if sampling.logprob:
                request["logprobs"] = 1
            if prompt.stop:
                request["stop"] = list(prompt.stop)
            cut = len(passage) < len(prompt.passage)
            if self.config.one_request and n > 1:
                requests.append((request | {"seed": seed, "n": n}, cut))
            else:
                requests += [(request | {"seed": seed + i}, cut) for i in range(n)]
        completions = [completion for answer in self._wait(self._all(requests)) for completion in answer]
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    async def _all(self, requests: list[tuple[dict[str, Any], bool]]) -> list[list[Completion]]:
        tasks = [asyncio.ensure_future(self._complete(request, truncated)) for request, truncated in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:  # an error of one cancels all
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(self, request: dict[str, Any], truncated: bool) -> list[Completion]:
        """The samples of a request. The first one has the possible cost of failed attempts."""
        cause, samples = "", request.get("n", 1)
        retries = billed = bad = 0
        async with self.slots:
            began = time.monotonic()
            for attempt in range(self.config.max_attempts):
                if (
                    attempt
                ):  # half of the delay is random, so that requests that failed together are not repeated together
                    delay = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(attempt - 1, 30))
                    await asyncio.sleep(delay * random.uniform(0.5, 1))
                answer = await self._attempt(request)
                if isinstance(answer, list):
                    break
                retries, billed, bad = retries + 1, billed + answer.billed, bad + answer.bad
                cause = f"{answer.cause} (attempt {attempt + 1})"
                if not answer.again or bad == BAD_ANSWERS or answer.wait_s > RETRY_AFTER_MAX_S:
                    break
                self.shut_until = max(self.shut_until, time.monotonic() + answer.wait_s)
        if isinstance(answer, _Failure):
            away = answer.away or (answer.away is None and answer.again and not await self._serves_others(began))
            if away:
                raise ConnectionError(f"openai: {self.config.base_url!r} answers no request: {cause}")
            answer = [Completion(None, None, 0, 0, 0, error=cause) for _ in range(samples)]
        else:
            self.answered = time.monotonic()
        for completion in answer:
            completion.truncated, completion.own_prompt = truncated, samples == 1
        answer[0].retries = retries
        answer[0].failed_prompt_tokens = billed * (answer[0].prompt_tokens or _most_tokens(request["prompt"]))
        answer[0].failed_completion_tokens = billed * request["max_tokens"] * samples
        return answer

    async def _serves_others(self, since: float) -> bool:
        """Whether the server has answered another request since, or lists its models. If so, the request is at fault."""
        import aiohttp

        if self.answered > since:
            return True
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=min(self.config.timeout_s, 10))
            url = f"{self.config.base_url}/models"
            async with self.http.get(url, proxy=self.proxy, allow_redirects=False, timeout=timeout) as response:
                return response.status < 500 and response.status != 429
        return False

    async def _attempt(self, request: dict[str, Any]) -> list[Completion] | _Failure:
        """One request within the budget and the limits."""
        longest = request["max_tokens"] * request.get("n", 1)
        # for the rate limit, three bytes per token are a good estimate
        most, guess = (
            self.config.usd(_most_tokens(request["prompt"]), longest),
            len(request["prompt"].encode()) // 3 + longest,
        )
        cost, used = 0.0, guess
        await self.budget.hold(most)
        try:
            async with self.gate:  # one request at a time, so that a wait requested by the server delays all of them
                await self.requests.take(1)
                await self.tokens.take(guess)
                while (wait_s := self.shut_until - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
            cost = most
            answer = await self._post(request)
            if isinstance(answer, _Failure):
                cost = most if answer.billed else 0.0
            elif answer[0].prompt_tokens and any(c.completion_tokens or not c.raw for c in answer):
                prompt, written = answer[0].prompt_tokens, sum(c.completion_tokens for c in answer)
                cost, used = self.config.usd(prompt, written, answer[0].cached_tokens), prompt + written
            return answer
        finally:
            self.budget.settle(most, cost)
            self.tokens.level += guess - used

    async def _post(self, request: dict[str, Any]) -> list[Completion] | _Failure:
        import aiohttp

        sent = {name: value for name, value in request.items() if self.sends_logprobs or name != "logprobs"}
        url, body = f"{self.config.base_url}/completions", json.dumps(sent, ensure_ascii=False).encode()
        # No exception of aiohttp leaves this method, because some have the request's headers, and with them the key.
        try:
            async with self.http.post(url, data=body, proxy=self.proxy, allow_redirects=False) as response:
                status, headers = response.status, response.headers
                raw = await _answers.body(response, _answers.size_limit(sent))
        except aiohttp.ClientConnectorError as error:
            return _Failure(self._line(f"no connection: {error}"), away=True)
        except TimeoutError:
            return _Failure(f"no answer within timeout_s = {self.config.timeout_s:g}", billed=True, away=None)
        except _answers.TooLarge as error:
            return _Failure(str(error), again=False, billed=True)
        except ValueError as error:
            return _Failure(self._line(str(error)), billed=True, bad=True)
        except (aiohttp.ClientError, OSError) as error:
            broken = isinstance(error, aiohttp.ClientConnectionError | OSError)  # otherwise the answer is not HTTP
            return _Failure(
                f"the connection broke: {type(error).__name__}", billed=True, away=None if broken else False
            )
        if 200 <= status < 300:
            try:
                answer = _answers.completions(raw, request, _most_tokens(request["prompt"]))
            except _answers.TooLarge as error:
                return _Failure(str(error), again=False, billed=True)
            return _Failure(answer, billed=True, bad=True) if isinstance(answer, str) else answer
        message = raw.decode(errors="replace")
        if status in (400, 422) and "logprobs" in sent and "logprobs" in message:
            self.sends_logprobs = False
            return await self._post(request)
        with contextlib.suppress(ValueError, RecursionError):
            message = json.dumps(
                json.loads(raw), ensure_ascii=False
            )  # without escapes, which could conceal a quoted key
        cause, remedy, name = self._line(f"HTTP {status}: {message}"), None, self.config.api_key_env
        if status in (401, 403):
            remedy = f"put a key into {name} that may use model = {self.config.model!r}" if name else "set api_key_env"
        elif status == 404 or 300 <= status < 400:
            remedy = f"set base_url to the address before /completions, model = {self.config.model!r} to one it serves"
        elif status == 429 and b"insufficient_quota" in raw:
            remedy = "add credit to the account and run again; finished shards are kept"
        if remedy:
            raise ConfigError(f"openai: {self.config.base_url!r} answers {cause}; {remedy}")
        wait_s = retry_after_s(headers.get("Retry-After"), time.time())
        away = True if status == 429 else None if status >= 500 else False
        return _Failure(cause, status in RETRY_STATUS or status >= 500, wait_s=wait_s, away=away)

    def _line(self, text: str) -> str:
        """One line of at most 300 characters, without the key, which some servers quote."""
        return " ".join(text.replace(self._key or HIDDEN, HIDDEN).split())[:300]

    def close(self) -> None:
        """Closes the connections and ends the thread. A second call does nothing."""
        if not self.loop.is_closed():
            self._wait(self.http.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()


def _most_tokens(prompt: str) -> int:
    """An upper bound: a token has at least one byte, and a start token may be added."""
    return len(prompt.encode()) + 16
