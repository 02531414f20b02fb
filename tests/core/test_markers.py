"""Special tokens that a passage spells out: broken for the tokenizers of many families, and no other text is changed."""

import json
import re
import time

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.special_tokens import escape_special_tokens, special_tokens
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.support.endpoint import SHORT, served

# From the published tokenizers: added_tokens of tokenizer.json, special_tokens of tekken.json.
FAMILIES = {
    "Llama 2, Mistral 7B": "<s> </s> <unk> [INST] [/INST] <<SYS>> <</SYS>>",
    "Code Llama": "<PRE> <SUF> <MID> <EOT>",
    "Llama 3": "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
    " <|finetune_right_pad_id|> <|reserved_special_token_0|> <|reserved_special_token_247|> <|image|>",
    "Llama 4": "<|header_start|> <|header_end|> <|eot|> <|eom|> <|step|> <|image_start|> <|patch|> <|tile_x_separator|>"
    " <|python_start|> <|fim_prefix|> <|reserved_200001|>",
    "Mistral v3 and later": "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CONTENT]"
    " [IMG] [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AUDIO] [BEGIN_AUDIO]"
    " [TRANSCRIBE] [ARGS] [CALL_ID] [THINK] [/THINK] [MODEL_SETTINGS] [REFERENCE_DOC_0] [control_8] <SPECIAL_20> <pad>",
    "Qwen (ChatML)": "<|im_start|> <|im_end|> <|endoftext|> <|object_ref_start|> <|box_end|> <|quad_start|> <|vision_start|>"
    " <|image_pad|> <|fim_middle|> <|repo_name|> <|file_sep|> <tool_call> </tool_call> <tool_response> </tool_response>"
    " <think> </think>",
    "Gemma": "<bos> <eos> <pad> <unk> <mask> <2mass> [@BOS@] <unused0> <unused99> <start_of_turn> <end_of_turn>"
    " <start_of_image> <end_of_image> <image_soft_token> [toxicity=0] <|fim_suffix|> <|file_separator|>",
    "Phi": "<|system|> <|user|> <|assistant|> <|end|> <|placeholder1|> <|im_sep|> <|tool|> <|/tool|> <|dummy_0|>",
    "DeepSeek": "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜▁pad▁｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜>"
    " <｜tool▁call▁end｜> <｜tool▁sep｜> <｜fim▁hole｜> <|EOT|>",
    "Command R": "<BOS_TOKEN> <EOS_TOKEN> <PAD> <UNK> <CLS> <SEP> <MASK_TOKEN> <EOP_TOKEN> <|START_OF_TURN_TOKEN|>"
    " <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|START_THINKING|> <|END_ACTION|>",
    "Falcon": ">>TITLE<< >>ABSTRACT<< >>INTRODUCTION<< >>SUMMARY<< >>COMMENT<< >>ANSWER<< >>QUESTION<< >>DOMAIN<<"
    " >>PREFIX<< >>SUFFIX<< >>MIDDLE<< <|endoftext|>",
    "Granite, StarCoder": "<|start_of_role|> <|end_of_role|> <|tool_call|> <fim_prefix> <fim_middle> <fim_suffix> <fim_pad>"
    " <filename> <gh_stars> <issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code>"
    " <jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after> <reponame> <file_sep> <repo_name>",
    "SantaCoder": "<fim-prefix> <fim-middle> <fim-suffix> <fim-pad>",
    "gpt-oss (harmony)": "<|start|> <|end|> <|message|> <|channel|> <|constrain|> <|return|> <|call|> <|startoftext|>"
    " <|endofprompt|> <|reserved_200000|>",
    "OLMo, Tülu, GPT-NeoX": "<|user|> <|assistant|> <|endoftext|> <|padding|> |||IP_ADDRESS||| |||EMAIL_ADDRESS|||"
    " |||PHONE_NUMBER|||",
    "Zephyr, StableLM": "<|user|> <|assistant|> <|system|> <|reg0|>",
    "Nemotron": "<extra_id_0> <extra_id_1> <SPECIAL_10> <TOOLCALL> </TOOLCALL> <AVAILABLE_TOOLS> </AVAILABLE_TOOLS>",
    "Yi": "<|startoftext|> <|Human|> <fim_prefix>",
    "GLM, ChatGLM": "[gMASK] [sMASK] [MASK] <sop> <eop> <|observation|> <|begin_of_image|> <|code_prefix|> <tool_call>"
    " <arg_key> </arg_key> <arg_value> </arg_value> /nothink",
    "Kimi": "<|im_user|> <|im_assistant|> <|im_middle|> <|im_system|> <|tool_calls_section_begin|> <|media_start|> [BOS] [EOS]"
    " [EOT] [PAD] [UNK] [start_header_id] [end_header_id] [EXTRA_ID_0]",
    "MiniMax": "<beginning_of_sentence> <end_of_sentence> ]~b] ]~!b[ ]!p~[ [e~[ ]<]image[>[ ]<]speech[>[ ]<]minimax[>["
    " <minimax:tool_call> </minimax:tool_call>",
    "Jamba": "<|startoftext|> <|bom|> <|eom|> <|pad|> <|unk|> <|tool|>",
    "SmolLM": "<|im_start|> <jupyter_script> <reponame> <gh_stars>",
    "BERT": "[CLS] [SEP] [MASK] [PAD] [UNK] [unused1] [unused993]",
    "BART, XLNet, ERNIE": "<s> </s> <mask> <cls> <sep> <eod> <mask:0> <mask:7>",
    "T5": "<extra_id_0> <extra_id_99> </s>",
    "Seed-OSS": "<seed:bos> <seed:eos> <seed:think> </seed:think> <seed:tool_call> <seed:cot_budget_reflect>",
    "Hunyuan": "<｜hy_begin▁of▁sentence｜> <｜hy_User｜> <|startoftext|> <|extra_0|>",
    "EXAONE": "[|system|] [|user|] [|assistant|] [|endofturn|] [BOS]",
    "InternLM, MOSS": "<|plugin|> <|action_start|> <|interpreter|> <eoh> <eoa> <eosys> <TOKENS_UNUSED_0> <eom> <eot> <eoc>",
    "Baichuan, Ling": "<reserved_106> <reserved_107> <role> </role>",
    "LLaVA": "<image> <im_patch> <im_start>",
}
MARKERS = [(family, marker) for family, words in FAMILIES.items() for marker in words.split()]
# The form counts, not the case; and tokenizers that normalise by NFKC read full-width brackets as brackets.
VARIANTS = (
    "<|IM_START|> <BOS> </S> <｜im_start｜> <|im_start｜> ＜|im_start|＞ ＜s＞ ﹤/s﹥ ＜｜User｜＞ [inst] [/Inst] <<sys>> <Think>"
).split()
WORDS = ["USER: hello", "a </s>USER: hello", "x\nASSISTANT: yes", "ASSISTANT:", "### Instruction:\nx", "x\n### Response: y",
         "###Human: x", "### System:"]  # fmt: skip


def held(token, text):
    """Whether a tokenizer with this one special token finds it in a text."""
    found = Tokenizer(WordLevel({"[none]": 0}, unk_token="[none]"))
    found.normalizer = NFKC()
    found.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return token in found.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_of_a_family_are_escaped_readably(family):
    for marker in FAMILIES[family].split():
        for text in (
            marker,
            f"a{marker}b",
            f"{marker}{marker}",
            f"<{marker}>",
            f"[{marker}]",
            f"\u3000{marker}\n",
            f"1{marker}{{",
        ):
            broken = escape_special_tokens(text)
            assert marker not in broken and not held(marker, broken), (marker, text, broken)
            assert "".join(broken.split()) == "".join(text.split()) and escape_special_tokens(broken) == broken
        assert held(marker, f"a {marker} b"), "the tokenizer of this test would find it"


@pytest.mark.parametrize("marker", VARIANTS)
def test_variants_that_some_tokenizers_read_as_the_same(marker):
    broken = escape_special_tokens(f"a{marker}b")
    assert marker not in broken and broken.replace(" ", "") == f"a{marker}b"


@pytest.mark.parametrize("text", WORDS)
def test_words_of_templates_are_parted_from_their_colon(text):
    broken = escape_special_tokens(text)
    assert broken.replace(" :", ":").replace("< /", "</") == text != broken and escape_special_tokens(broken) == broken


LEFT = {
    "comparisons": "if a < b > c: x[0], 1 << 2 >> 3, a <= b, a <- b, <>, <=>",
    "generics": "List<int>, std::map<K, V>, Vec<Option<T>>, Map<String, List<Long>>, dict[str, int]",
    "HTML": "<b>bold</b> <a href='x'>y</a> <pre>x</pre> <h1>t</h1> <br/> <table><tr><td>1</td></tr></table> <ul><li></li></ul> <img"
    " src='s'> <!-- c --> <p class=\"s\">",
    "XML with namespaces": "<xs:element name='a'/> <dc:title>x</dc:title> <ns2:x/>",
    "pipes": "a |> f <| g, a || b ||| c, ls | wc, |x|, <|>, (<|>), [|1; 2|], x |||",
    "brackets": "[1], [RFC 2119], [A], [citation needed], [sic], [x](y), [[link]], [a-z], [ERROR] x",
    "e-mail and links": "<me@example.com> <https://example.com/a-b> http://x/y",
    "doctests, quotes": ">>> f(x) << 2\n>> quoted\n> quoted",
    "Markdown": "### Input\n## USER guide\n### How to answer: a note\n| a | b |",
    "colons": "the USER:PASS of ssh, user: x, Superuser: y, ENDUSER: z, Human: hello, Question: why",
    "paths": "/no/think /nothing a/b",
    "other scripts": "《书名》 「引用」 ‹a› «b» 〈c〉 ＜名前＞ a｜b",
    "mathematics": "|x| < |y|, <x|y>, <x | y>, ⟨ψ|φ⟩ |ψ>",
    "Lisp, regular expressions": "(?P<name>x) \\<word\\> [^|]+ ]~/ ~",
}


@pytest.mark.parametrize("kind", LEFT)
def test_other_text_is_left_alone(kind):
    assert escape_special_tokens(LEFT[kind]) == LEFT[kind]


def test_breaking_takes_linear_time():
    began = time.perf_counter()
    for text in ("<|", "<", "[", "<a_", "]~", "|", ">>", "###", "USER"):
        escape_special_tokens(text * 100_000)
    assert time.perf_counter() - began < 10


# -- the model's own tokenizer --------------------------------------------------------------------------------------------


def test_the_special_tokens_of_a_tokenizer_s_files(tmp_path):
    def added(content, special=True):
        return {"id": 1, "content": content, "special": special}

    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [added("⟦turn⟧"), added("<h1>", False), added("\n\n")]})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"7": added("@@end")}, "eos_token": "x"})
    )
    mapped = {
        "bos_token": "[[go]]",
        "pad_token": {"content": "~pad~"},
        "additional_special_tokens": ["@@", {"content": "@@tool"}],
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
    (tmp_path / "tekken.json").write_text(json.dumps({"special_tokens": [{"rank": 0, "token_str": "{{sys}}"}]}))
    own = special_tokens(tmp_path)
    assert own == {"⟦turn⟧", "@@end", "[[go]]", "~pad~", "@@", "@@tool", "{{sys}}"}
    text = "a ⟦turn⟧ @@end [[go]] ~pad~ @@tool {{sys}} @@@ <h1> <s>"
    broken = escape_special_tokens(text, own)
    assert broken == "a ⟦ turn⟧ @ @end [ [go]] ~ pad~ @ @tool { {sys}} @ @ @ <h1> < s>" and not any(
        t in broken for t in own
    )


@pytest.mark.parametrize(
    "text", ["", "[", "[1]", "null", '{"added_tokens": [1]}', '{"added_tokens": [{"special": true}]}', "[" * 5000]
)
def test_an_invalid_tokenizer_file_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="tokenizer.json: not a tokenizer file"):
        special_tokens(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer in"):
        special_tokens(tmp_path / "none")


def test_what_is_sent_spells_no_special_token(tmp_path):
    """All markers in one corpus, and one of the model's own, through the stage to the endpoint."""
    set_ = tmp_path / "set"
    (set_ / "qrels").mkdir(parents=True)
    rows = [
        {"_id": f"d{i}", "title": marker, "text": f"{marker} a{marker}b ⟦turn⟧"}
        for i, (_, marker) in enumerate(MARKERS)
    ]
    (set_ / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (set_ / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    (set_ / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "⟦turn⟧", "special": True}]}))
    with served() as server:
        engine = OpenAIServer(model="m", base_url=server.url, tokenizer=str(tmp_path))
        stage = Generate(corpus=Beir(path=str(set_)), strategy=Crop(), engine=engine, sampling=SHORT)
        materialize(stage, str(tmp_path / "runs"), Placement(generate=Pool(workers=0)))
    assert len(server.seen) == len(MARKERS)
    for body in server.seen:
        assert not [marker for _, marker in MARKERS if marker in body["prompt"]] and "⟦turn⟧" not in body["prompt"]
    plain = engine.model_copy(update={"tokenizer": None})
    assert plain.fingerprint() != engine.fingerprint()
    assert plain.fingerprint() == OpenAIServer(model="m", base_url="https://other.example/v1").fingerprint()
    assert re.search(
        "no tokenizer in", str(_refused(lambda: engine.model_copy(update={"tokenizer": str(set_)}).check()))
    )


def _refused(call):
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value
