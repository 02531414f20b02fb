"""Finds special tokens that a text spells out, and breaks them so that no tokenizer reads them as its own.

A server tokenises prompts itself, and may read ``<|im_start|>`` in a passage as the start of a turn. The tokens come
from the model's own tokenizer if there is one (``special_tokens``); otherwise from the tokenizers of known families:

* bars: ChatML (Qwen, Yi, SmolLM, Phi-4), Llama 3 and 4, Phi-3, Zephyr, OLMo and Tülu, Granite, gpt-oss, GLM, Kimi, Jamba,
  Command R, Falcon 3, InternLM; with full-width bars DeepSeek and Hunyuan; in square brackets EXAONE
* an underscore in angle brackets: Gemma, T5, StarCoder and SmolLM, Nemotron, MiniMax, Command R, Mistral, Baichuan
* names in angle brackets: Llama, Gemma, BART, XLNet, ChatGLM, MOSS, CodeLlama, SantaCoder, Seed, ERNIE, Ling
* square brackets: Mistral (also ``[control_8]``), BERT, Kimi, GLM, Gemma
* ``>>TITLE<<`` Falcon; ``|||IP_ADDRESS|||`` OLMo, GPT-NeoX; ``]~b]`` MiniMax; ``/nothink`` GLM
* words of chat templates, at the start of a line or after a space: Vicuna's ``USER:``, Alpaca's ``### Response:``

Sources: ``added_tokens`` of the published ``tokenizer.json`` and ``tekken.json``, and the published chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from dagr_ray.core.config import ConfigError

# Brackets and bars, also in the forms that NFKC normalises to them.
_OPEN, _CLOSE, _BAR = "<\uff1c\ufe64", ">\uff1e\ufe65", "|\uff5c"
_INSIDE = f"[^\\s{_OPEN}{_CLOSE}]{{1,64}}"
_NAMES = (
    r"(?i:s|bos|eos|pad|unk|mask|cls|sep|sop|eop|eod|eot|eoh|eoa|eom|eoc|eor|eosys|think|image|filename|reponame|role"
    r"|unused\d+|2mass|mask:\d+|(?:seed|minimax):[\w:]{1,64}|fim-\w{1,64}|0x[0-9a-f]{2})|PRE|SUF|MID|TOOLCALL"
)
_SQUARE = (
    r"(?i:INST|IMG|THINK|ARGS|CLS|SEP|[gs]?MASK|PAD|UNK|BOS|EOS|EOT|PREFIX|MIDDLE|SUFFIX|AUDIO|TRANSCRIBE|@BOS@|toxicity=0"
    r"|unused\d{1,5}|control_\d{1,5}|(?:start|end)_header_id)|[A-Z]{1,64}_[A-Z_0-9]{1,64}"
)
_FALCON = "TITLE|ABSTRACT|INTRODUCTION|SUMMARY|COMMENT|ANSWER|QUESTION|DOMAIN|PREFIX|SUFFIX|MIDDLE"
_MARKER = re.compile(
    # the character that a space will follow, and a lookahead for the rest of the token
    f"[{_OPEN}](?=[{_BAR}]{_INSIDE}[{_CLOSE}]|/?{_INSIDE}[{_BAR}][{_CLOSE}]|/?\\w{{1,64}}_\\w{{1,64}}[{_CLOSE}]"
    f"|[{_OPEN}]/?(?i:SYS)[{_CLOSE}]{{2}}|/?(?:{_NAMES})[{_CLOSE}])"
    f"|\\[(?=[{_BAR}][^\\s\\[\\]]{{1,64}}[{_BAR}]\\]|/?(?:{_SQUARE})\\])"
    f"|>(?=>(?:{_FALCON})<<)"
    r"|\|(?=\|\|[A-Z]{1,32}_[A-Z]{1,32}\|\|\|)"
    r"|\](?=~!?[a-z]\[|~!?[a-z]\]|!p~\[|<\]\w{1,32}\[>\[)|\[(?=e~\[)"
    r"|/(?=nothink)"
)
_WORDS = re.compile(
    r"(?<![^\s>])(?:USER|ASSISTANT)(?=:(?:\s|$))|(?m:^)###[ ]?(?:Instruction|Input|Response|Human|Assistant|User|System)(?=:)"
)


def escape_special_tokens(text: str, own: frozenset[str] = frozenset()) -> str:
    """A text without special tokens of known families, or of ``own``: a space is inserted after a token's first sign.

    The rest of the text is unchanged, and the text stays readable.

    >>> escape_special_tokens("<|im_start|>user [INST] a < b, x[0] </s> <b>bold</b> <start_of_turn>")
    '< |im_start|>user [ INST] a < b, x[0] < /s> <b>bold</b> < start_of_turn>'
    """
    if own:
        text = _pattern(own).sub(r"\g<0> ", text)
    text = _MARKER.sub(r"\g<0> ", text)
    return _WORDS.sub(r"\g<0> ", text) if "USER:" in text or "ASSISTANT:" in text or "###" in text else text


@lru_cache(maxsize=8)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in longest_first))


def special_tokens(folder: Path) -> frozenset[str]:
    """The special tokens in a tokenizer's folder, from the files of Hugging Face and Mistral, read as data. Raises ConfigError."""
    tokens: set[str] = set()
    has_file = False
    for name, listed in _FILES.items():
        path = folder / name
        if path.is_file():
            try:
                tokens |= {token for token in listed(json.loads(path.read_bytes())) if isinstance(token, str)}
            except (ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
                raise ConfigError(
                    f"{path}: not a tokenizer file ({type(error).__name__}: {error}); fetch it again"
                ) from None
            has_file = True
    if not has_file:
        raise ConfigError(f"no tokenizer in {str(folder)!r}; give a folder with one of {', '.join(_FILES)}")
    # a token of one letter, or of spaces, would break every text
    return frozenset(token for token in tokens if len(token) > 1 and not token.isspace())


def _contents(tokens: Iterable[Any]) -> Iterable[Any]:
    return [token["content"] for token in tokens if token.get("special")]


def _mapped(value: dict[str, Any]) -> Iterable[Any]:
    items = [item for entry in value.values() for item in (entry if isinstance(entry, list) else [entry])]
    return [item["content"] if isinstance(item, dict) else item for item in items]


_FILES = {
    "tokenizer.json": lambda value: _contents(value.get("added_tokens") or []),
    "tokenizer_config.json": lambda value: _contents((value.get("added_tokens_decoder") or {}).values()),
    "special_tokens_map.json": _mapped,
    "tekken.json": lambda value: [token["token_str"] for token in value.get("special_tokens") or []],
}
