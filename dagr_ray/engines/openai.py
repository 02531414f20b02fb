"""A server with OpenAI's completions API as an engine: a hosted model, or one served elsewhere (``vllm serve``)."""

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
RETRY_AFTER_MAX_S = 600.0  # a server that asks for more (a daily quota) is not waited for
BAD_ANSWERS = 3  # answers to one request that are none, each of which may be paid for
AGAIN = frozenset({408, 409, 429})  # and 5xx
HIDDEN = "(hidden)"
LOCAL = ("localhost", "127.0.0.1", "::1")
# All other fields but `one_request` say where, how fast and for how much; none of them changes a completion.
HASHED = ("type", "version", "model", "revision", "passage_characters")


class OpenAIServer(Engine):
    """A model behind ``base_url``/completions (OpenAI API reference, "Completions"): raw prompts.

    The result is named by ``model`` and ``revision``, a label of the user's: no server proves which weights it has, and
    not every one heeds seeds. ``api_key_env`` names the environment variable that holds the key in every worker (None
    sends no key); the key itself is no field. A passage is cut at its end to ``passage_characters``; a prompt that is
    still too long is an error of its row. The limits hold for a stage: each of the pool's workers has an equal share.

    A special token that data spells out (``</s>`` in a passage) is broken by a space; the strategy's own words are not.
    Those of known families are (``markers``); ``tokenizer`` is a folder (or its address) with the files of the model's own
    tokenizer, whose special tokens are broken too. It is read as data, on the machine that asks.

    Log-probabilities are asked for until the server refuses a request because of them.

    Every sample is a request with a seed of its own. ``one_request`` asks for all samples of a prompt at once, with the
    seed of the first: their prompt is paid for once, and it is the server's affair how they differ.

    ``budget_usd`` holds for a stage, whatever the number of runs: a request counts as the most that it can cost until
    its answer says how much it did, and none is begun that could go over. What was under way when a run was killed is
    taken for as dear as the same rows elsewhere. Cached tokens cost as much as others unless a price is given for them.

    >>> OpenAIServer(model="org/name", revision="2025-01", base_url="https://llm.example/v1").model_name()
    'org/name@2025-01'
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "openai"
    version: ClassVar[int] = (
        3  # special tokens spelled out in data are broken, those of more families and words of templates
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
        # pydantic's errors quote what was given: a key in a wrong place must be refused without being shown
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
                "allowed is the name of an environment variable in capital letters, never the key; "
                "put the key into a variable and give its name, such as 'OPENAI_API_KEY'"
            )
        return value

    @field_validator("base_url")
    @classmethod
    def _is_safe(cls, value: str, info: ValidationInfo) -> str:
        url = urlsplit(value)  # ValueError where host or port are none
        plain_http = url.hostname in LOCAL or info.data.get("allow_plain_http")
        safe = url.scheme == "https" or (url.scheme == "http" and plain_http)
        if not (safe and url.hostname and url.port != 0) or HIDDEN in value or re.search(r"\s", value):
            raise ConfigError(
                "allowed are https://host/v1 without user, password and query, and http:// to localhost or 127.0.0.1; "
                "give one of these, or allow_plain_http=True for http:// in a network that you trust"
            )
        return value

    @model_validator(mode="after")
    def _has_prices(self) -> OpenAIServer:
        if self.budget_usd and not (self.usd_per_million_prompt_tokens or self.usd_per_million_completion_tokens):
            raise ConfigError(
                f"openai: budget_usd = {self.budget_usd} means nothing without prices; "
                "set usd_per_million_prompt_tokens and usd_per_million_completion_tokens"
            )
        return self

    def identity(self) -> dict[str, Any]:
        fields = {name: value for name, value in super().identity().items() if name in HASHED}
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
        """The engine's own prices, else those of the placement for the model's name."""
        own = self._own_prices()
        table = prices.tokens
        return own or table.get(self.model_name()) or table.get(self.model) or table.get("default")

    def _own_prices(self) -> TokenPrices | None:
        per_million = self.usd_per_million_prompt_tokens, self.usd_per_million_completion_tokens
        if not any(per_million):
            return None
        return TokenPrices(prompt=per_million[0], cached=self.usd_per_million_cached_tokens, completion=per_million[1])

    def usd(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
        """What so many tokens cost at the engine's own prices, in dollars."""
        own = self._own_prices()
        return own.usd(prompt_tokens, cached_tokens, completion_tokens) if own else 0.0

    def open(self, pool: Pool) -> _Session:
        self.check()
        return _Session(self, pool)


@lru_cache(maxsize=8)
def _special_tokens(folder: str) -> frozenset[str]:
    return special_tokens.special_tokens(local_folder(folder))


def _key(name: str | None) -> str | None:
    """The key in the environment variable ``name``. Raises ConfigError, which never shows it."""
    key = environment.key(name) if name else None
    if key == "":
        raise ConfigError(
            f"openai: the environment variable {name} (api_key_env) is not set; export it before the run, on every node"
        )
    if key and not re.fullmatch(r"[!#-\[\]-~]+", key):
        raise ConfigError(f"openai: the key in {name} has spaces, quotes or letters that no key has; set it again")
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
        return max(0.0, parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp() - now)
    except (ValueError, OverflowError, TypeError):
        return 0.0


class _Bucket:
    """A token bucket: ``per_minute`` units flow in evenly, at most ``burst`` are kept. None is no limit."""

    def __init__(self, per_minute: float | None, burst: float) -> None:
        self.rate, self.burst, self.level, self.at = (per_minute or math.inf) / 60, burst, burst, time.monotonic()

    async def take(self, amount: float) -> None:
        """Waits until ``amount`` has flowed in; what is used of it in the end may be corrected in ``level``."""
        if self.rate < math.inf:
            now = time.monotonic()
            self.level, self.at = min(self.burst, self.level + (now - self.at) * self.rate) - amount, now
            await asyncio.sleep(max(0.0, -self.level / self.rate))


class _Budget:
    """Dollars spent, and held for requests under way."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.spent, self.held, self.under_way = limit or math.inf, 0.0, 0.0, 0
        self.changed = asyncio.Event()

    async def hold(self, most: float) -> None:
        """Sets ``most`` aside; first waits for requests under way, as they mostly cost less. Raises ConfigError."""
        while self.spent + self.held + most > self.limit:
            if not self.under_way:
                raise ConfigError(
                    f"openai: ${self.spent:.6f} of this worker's ${self.limit:.6f} of budget_usd are spent, the next "
                    f"request could cost ${most:.6f}; raise budget_usd and run again: finished shards are kept"
                )
            self.changed.clear()
            await self.changed.wait()
        self.held, self.under_way = self.held + most, self.under_way + 1

    def settle(self, most: float, cost: float) -> None:
        self.held, self.under_way, self.spent = self.held - most, self.under_way - 1, self.spent + cost
        self.changed.set()


class _Failure(NamedTuple):
    """Why an attempt gave no completion; ``billed`` where it may have cost something all the same.

    ``bad``: there was an answer, and it is none. A proxy that is busy gives such; a server that always does is paid for it.
    ``away``: there is no server, or it takes no more requests, which is no request's fault. ``None`` is not known: it may be.
    """

    cause: str
    again: bool = True
    billed: bool = False
    bad: bool = False
    wait_s: float = 0.0
    away: bool | None = False


class _Session:
    """An event loop in a thread of its own (the caller's may run one already, as in a notebook), and its connections."""

    def __init__(self, config: OpenAIServer, pool: Pool) -> None:
        self.config, self._key, share = config, _key(config.api_key_env), max(pool.workers, 1)
        requests, tokens = ((x and x / share) for x in (config.requests_per_minute, config.tokens_per_minute))
        # bursts of one request, and of a second's tokens: servers count by the second, too
        self.requests, self.tokens = _Bucket(requests, 1), _Bucket(tokens, (tokens or 0) / 60)
        self.budget = _Budget(config.budget_usd and config.budget_usd / share)
        self.slots = asyncio.Semaphore(max(config.in_flight // share, 1))
        self.gate, self.shut_until, self.answered = asyncio.Lock(), 0.0, 0.0
        self.tells = True  # log-probabilities, until the server says that it cannot
        # asked here, as aiohttp's own way would also send what it finds in a .netrc
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
            future.cancel()  # where Ctrl-C ended the waiting

    async def _connect(self) -> aiohttp.ClientSession:
        import aiohttp

        plain = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers = plain | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        return aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),  # a server gets nothing back that it sent
            auto_decompress=False,  # see ``answers.body``
        )

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """Raises ConfigError for a wrong key, model or address, and at the budget's end; ConnectionError if nobody is served."""
        asked: list[tuple[dict[str, Any], bool]] = []
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
                asked.append((request | {"seed": seed, "n": n}, cut))
            else:
                asked += [(request | {"seed": seed + i}, cut) for i in range(n)]
        made = [completion for answer in self._wait(self._all(asked)) for completion in answer]
        return [made[i : i + n] for i in range(0, len(made), n)]

    async def _all(self, asked: list[tuple[dict[str, Any], bool]]) -> list[list[Completion]]:
        tasks = [asyncio.ensure_future(self._complete(request, truncated)) for request, truncated in asked]
        try:
            return await asyncio.gather(*tasks)
        finally:  # an error of one ends all
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(self, request: dict[str, Any], truncated: bool) -> list[Completion]:
        """The samples of a request. What its failed attempts may have cost stands with the first."""
        cause, samples = "", request.get("n", 1)
        retries = billed = bad = 0
        async with self.slots:
            began = time.monotonic()
            for attempt in range(self.config.max_attempts):
                if attempt:  # half of it by chance, so that what failed together does not come back together
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
                raise ConnectionError(f"openai: {self.config.base_url!r} serves nobody: {cause}")
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
        """Whether the server has answered another request meanwhile, or lists its models: then the request is at fault."""
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
        # for the pace, three bytes to a token are a fair guess
        most, guess = (
            self.config.usd(_most_tokens(request["prompt"]), longest),
            len(request["prompt"].encode()) // 3 + longest,
        )
        cost, used = 0.0, guess
        await self.budget.hold(most)
        try:
            async with self.gate:  # one after the other, so that a wait which the server asks for holds all of them
                await self.requests.take(1)
                await self.tokens.take(guess)
                while (left := self.shut_until - time.monotonic()) > 0:
                    await asyncio.sleep(left)
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

        wanted = {name: value for name, value in request.items() if self.tells or name != "logprobs"}
        url, body = f"{self.config.base_url}/completions", json.dumps(wanted, ensure_ascii=False).encode()
        # Nothing of aiohttp's gets out of here: some of its exceptions hold the request's headers, and so the key.
        try:
            async with self.http.post(url, data=body, proxy=self.proxy, allow_redirects=False) as response:
                status, headers = response.status, response.headers
                raw = await _answers.body(response, _answers.largest(wanted))
        except aiohttp.ClientConnectorError as error:
            return _Failure(self._line(f"no connection: {error}"), away=True)
        except TimeoutError:
            return _Failure(f"no answer within timeout_s = {self.config.timeout_s:g}", billed=True, away=None)
        except _answers.TooLarge as error:
            return _Failure(str(error), again=False, billed=True)
        except ValueError as error:
            return _Failure(self._line(str(error)), billed=True, bad=True)
        except (aiohttp.ClientError, OSError) as error:
            broken = isinstance(error, aiohttp.ClientConnectionError | OSError)  # else an answer that is no HTTP
            return _Failure(
                f"the connection broke: {type(error).__name__}", billed=True, away=None if broken else False
            )
        if 200 <= status < 300:
            try:
                found = _answers.completions(raw, request, _most_tokens(request["prompt"]))
            except _answers.TooLarge as error:
                return _Failure(str(error), again=False, billed=True)
            return _Failure(found, billed=True, bad=True) if isinstance(found, str) else found
        said = raw.decode(errors="replace")
        if status in (400, 422) and "logprobs" in wanted and "logprobs" in said:
            self.tells = False
            return await self._post(request)
        with contextlib.suppress(ValueError, RecursionError):
            said = json.dumps(
                json.loads(raw), ensure_ascii=False
            )  # without escapes, which a quoted key could hide behind
        cause, remedy, name = self._line(f"HTTP {status}: {said}"), None, self.config.api_key_env
        if status in (401, 403):
            remedy = f"put a key into {name} that may use model = {self.config.model!r}" if name else "set api_key_env"
        elif status == 404 or 300 <= status < 400:
            remedy = f"set base_url to what stands before /completions, model = {self.config.model!r} to one it serves"
        elif status == 429 and b"insufficient_quota" in raw:
            remedy = "add credit to the account and run again: finished shards are kept"
        if remedy:
            raise ConfigError(f"openai: {self.config.base_url!r} answers {cause}; {remedy}")
        wait_s = retry_after_s(headers.get("Retry-After"), time.time())
        away = True if status == 429 else None if status >= 500 else False
        return _Failure(cause, status in AGAIN or status >= 500, wait_s=wait_s, away=away)

    def _line(self, text: str) -> str:
        """One line of at most 300 characters without the key, which some servers quote."""
        return " ".join(text.replace(self._key or HIDDEN, HIDDEN).split())[:300]

    def close(self) -> None:
        """Closes the connections and ends the thread. A second call does nothing."""
        if not self.loop.is_closed():
            self._wait(self.http.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()


def _most_tokens(prompt: str) -> int:
    """No token is less than a byte, and a start token may come on top."""
    return len(prompt.encode()) + 16
