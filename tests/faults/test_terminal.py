"""What reaches a terminal: nothing of what it obeys, and everything that a person reads."""

import ast
import io
import json
import logging
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from dagr_ray.cli import inspect, main, results, run
from dagr_ray.cli.progress import Reporter
from dagr_ray.core.attempt import Progress
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.terminal import EscapingFormatter, Parser, print_json, print_table, say, shown
from dagr_ray.engines.crop import CropEngine
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir

ROOT = Path(__file__).parents[2]

# What a terminal obeys, or what a person would not see. Each is one that has been used against people.
OBEYED = {
    "sets the clipboard (OSC 52)": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "sets the title (OSC 0)": "\x1b]0;root@host\x07",
    "asks for the title back": "\x1b[21t",
    "a link to elsewhere (OSC 8)": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "clears the screen": "\x1b[2J",
    "clears what was scrolled": "\x1b[3J",
    "moves up a line": "\x1b[1A",
    "colours": "\x1b[31mRED\x1b[0m",
    "hidden letters": "\x1b[8msecret",
    "another screen": "\x1b[?1049h",
    "another character set": "\x0e\x0f\x1b(0",
    "reports the cursor": "\x1b[6n",
    "a device control string": "\x1bP$q\"p\x1b\\",
    "an application command": "\x1b_G\x1b\\",
    "a privacy message": "\x1b^x\x1b\\",
    "resets the terminal": "\x1bc",
    "C1: CSI in one character": "\x9b2J",
    "C1: OSC in one character": "\x9d52;c;QQ==\x9c",
    "C1: DCS in one character": "\x90x\x9c",
    "C1: next line": "a\x85b",
    "writes over the line": "failed\rdone  ",
    "backspaces": "rm\b\bls",
    "rings": "\x07",
    "NUL": "a\x00b",
    "form feed and vertical tab": "a\x0cb\x0bc",
    "DEL": "a\x7fb",
    "XOFF, XON": "\x13\x11",
    "enquiry (answerback)": "\x05",
    "separators of records": "\x1c\x1d\x1e\x1f",
    "right to left override": "\u202egnp.exe",
    "left to right override": "\u202dabc\u202c",
    "embeddings": "\u202a\u202b\u202c",
    "isolates": "\u2066\u2067\u2068\u2069",
    "marks of direction": "a\u200eb\u200fc\u061cd",
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "zero width space in Latin": "pass\u200bword",
    "a joiner in Latin": "pass\u200dword\u200c",
    "zero width no-break space": "\ufeffa",
    "word joiner": "a\u2060b",
    "invisible operators": "a\u2061\u2062\u2063\u2064b",
    "deprecated format characters": "\u206a\u206f",
    "soft hyphen": "pass\xadword",
    "Hangul fillers": "a\u3164b\uffa0c\u115fd\u1160",
    "Mongolian vowel separator alone": "a\u180eb",
    "grapheme joiner": "a\u034fb",
    "annotations": "\ufff9a\ufffab\ufffb",
    "tags (text nobody sees)": "ok\U000e0001\U000e0049\U000e0067\U000e007f",
    "bits in variation selectors": "a\ufe00\ufe0f\U000e0100\U000e01ef",
    "runs of selectors after an emoji": "\u2764\ufe0f\ufe0e\ufe0f\ufe0e",
    "musical format characters": "\U0001d173\U0001d17a",
    "shorthand format controls": "\U0001bca0",
    "halves of surrogates": "a\ud800b\udfff",
    "a byte that was not UTF-8 (surrogateescape)": "a\udc9bb",
    "noncharacters": "\ufffe\uffff",
}  # fmt: skip
# Texts of people; none of these may change.
READ = {
    "Latin": "naïve café — “quoted”… €5 ½ ß Ø",
    "combining": "e\u0301 o\u0308 ạ̄",
    "Greek, Cyrillic": "Ἀθῆναι Москва Ћ",
    "Hindi with joiners": "क्\u200dष र\u094d\u200cय हिन्दी",
    "Bengali": "র\u200d্যাব বাংলা",
    "Sinhala": "ශ්\u200dරී ලංකා",
    "Malayalam": "ന്\u200d മലയാളം",
    "Persian with non-joiners": "می\u200cخواهم کتاب\u200cها",
    "Urdu, Arabic with vowels": "مُحَمَّد اردو ـ ؟ ١٢٣",
    "Hebrew with points": "שָׁלוֹם",
    "Thai, with spaces of no width": "ภาษา\u200bไทย",
    "Khmer": "ភាសា\u200bខ្មែរ",
    "Burmese": "မြန်မာ",
    "Lao": "ພາສາ",
    "Tibetan": "བོད་ཡིག",
    "Mongolian with selectors": "ᠮᠣᠩᠭᠣᠯ ᠪᠠ\u180eᠨ ᠠ\u180b",
    "Chinese": "中文，句子。　全角空格",
    "Japanese with a selector": "葛\U000e0100城 カタカナ ｶﾀｶﾅ",
    "Korean, decomposed": "한국어 \u1112\u1161\u11ab",
    "emoji": "😀 👩\u200d👩\u200d👧 ❤\ufe0f 👍🏽 🏳\ufe0f\u200d🌈 1\ufe0f⃣ ☺\ufe0e 🇩🇪",
    "mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ 𝒜",
    "spaces": "a\xa0b\u2009c\u202fd",
    "private use": "\ue000",
    "code": "for (i = 0; i < n; i++) { a[i] \\= '\\x1b'; }\n\treturn `x`\n",
    "box drawing": "┌─┐│└─┘ ▁▂▃",
}


@pytest.mark.parametrize("name", OBEYED)
def test_what_a_terminal_obeys_or_hides_is_spelled_out(name):
    text = f"before {OBEYED[name]} after"
    found = shown(text)
    kept = [c for c in found if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\ufe0f"]
    assert not kept and found != text
    out = io.StringIO()
    say(text, to=out)
    assert out.getvalue() == f"{found}\n"
    assert shown(found) == found, "what is shown is shown as it is"


@pytest.mark.parametrize("name", READ)
def test_text_of_people_is_printed_as_it_is(name):
    assert shown(READ[name]) == READ[name]


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(), max_size=40))
def test_no_text_gets_a_control_through_and_json_stays_json(text):
    found = shown(text)
    assert not [c for c in found if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t"]
    assert not set(found) & set(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x61C)))
    assert "\n" not in shown(text, lines=False)
    told = json.dumps({text: [text]}, ensure_ascii=False)
    assert json.loads(shown(told)) == {text: [text]}


def test_json_and_tables_are_printed_by_the_same_function(capsys):
    hostile = "".join(OBEYED.values())
    print_json({"a": hostile})
    told = capsys.readouterr().out
    assert json.loads(told) == {"a": hostile} and "\x9b" not in told and "\u202e" not in told
    print_table([["a\nb\x1b[2J", 1], ["c", 22]], ["name", "n"])
    assert capsys.readouterr().out.splitlines() == [
        "name           n",
        r"a\nb\u001b[2J  1",
        "c              22",
    ]


def test_a_terminal_of_few_letters_is_shown_numbers():
    for encoding, wanted in (("ascii", b"caf\\xe9 \\u4e2d \\u001b\n"), ("latin-1", b"caf\xe9 \\u4e2d \\u001b\n")):
        raw = io.BytesIO()
        with io.TextIOWrapper(raw, encoding=encoding) as stream:
            say("café 中 \x1b", to=stream)
            told = raw.getvalue()
        assert told == wanted


def test_log_records_errors_and_progress_lines(capsys, tmp_path):
    record = logging.LogRecord("dagr", logging.ERROR, "", 1, "%s: bad", ("\x1b[2J\u202e",), None)
    assert EscapingFormatter("%(message)s").format(record) == r"\u001b[2J\u202e: bad"
    with pytest.raises(SystemExit):
        Parser(prog="dagr").parse_args(["--\x1b]52;c;QQ==\x07"])
    assert r"\u001b]52" in capsys.readouterr().err
    data = tiny_beir(tmp_path / "set")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (io.StringIO(), Terminal()):
        reporter = Reporter(stream)
        stage = Beir(path=str(data))
        stage.__dict__["folder_name"] = lambda: "beir-\x1b]52;c;QQ==\x07"
        reporter(Progress(stage, "start", shards=1, of=2))
        reporter(Progress(stage, "running", shards=1, of=2))
        reporter(Progress(stage, "done", shards=2, of=2))
        assert r"beir-\u001b]52;c;QQ==\u0007" in stream.getvalue()
        assert stream.getvalue().replace("\r\x1b[2K", "").isprintable() or stream.getvalue().count("\x1b") in (0, 3)


def test_a_page_shows_marks_that_would_turn_a_line_around():
    """In the report's own environment: what is text is escaped and shown, what is markup stays."""
    from dagr_ray.report.page import _environment

    template = _environment().from_string("<p>{{ text }}</p>{{ chart | safe }}{{ 1.5 }}")
    made = template.render(text="".join(OBEYED.values()) + "<script>é", chart="<svg>\u202e</svg>")
    assert made.endswith("&lt;script&gt;é</p><svg>\u202e</svg>1.5")
    assert not set(made.partition("</p>")[0]) & set("\x1b\x9b\x00\r\u202e\u2028\u200b\U000e0049")


# -- nothing else prints ------------------------------------------------------------------------------------------------


def writers(tree):
    """The lines of a module that write to standard output or error by themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "pprint", "pprint.pprint", "warnings.warn", "traceback.print_exc", "os.write"):
                yield f"{node.lineno}: {name}"
            if name.endswith(("stdout.write", "stderr.write", "stdout.buffer.write", "stdout.writelines")):
                yield f"{node.lineno}: {name}"
            if name.endswith("StreamHandler"):
                yield f"{node.lineno}: {name}"


def test_nothing_of_this_package_prints_but_the_one_function():
    # pydocs answers its own parent process in JSON; the command line gives its handler the formatter of this module
    allowed = {("pydocs.py", "sys.stdout.write"), ("main.py", "logging.StreamHandler")}
    found = []
    for path in sorted((ROOT / "dagr_ray").rglob("*.py")):
        for each in writers(ast.parse(path.read_text())):
            if (path.name, each.partition(": ")[2]) not in allowed:
                found.append(f"{path.relative_to(ROOT)}:{each}")
    assert not found, "use dagr_ray.core.terminal.say"
    assert list(writers(ast.parse("import sys\nprint(1)\nsys.stderr.write('x')"))) == [
        "2: print",
        "3: sys.stderr.write",
    ]


HOSTILE = "\x1b]52;c;cm0gLXJmIC8=\x07\x1b[2J over\r\u202egnp.exe\u2028 \x9b31m \u200b"


def hostile_set(folder: Path) -> Path:
    """A BEIR folder whose every name and text is of that kind."""
    (folder / "qrels").mkdir(parents=True)
    ids = [f"d{i}\x1b[31m" for i in range(24)]
    rows = [{"_id": d, "title": f"=1{HOSTILE}", "text": f"The amber mill number {i} was finished in {1500 + i}. It keeps "
             f"maps {i} of the road.{HOSTILE}"} for i, d in enumerate(ids)]  # fmt: skip
    asked = [{"_id": f"q{i}\x07", "text": f"when was mill {i} finished{HOSTILE}"} for i in range(6)]
    for name, found in (("corpus", rows), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    lines = "".join(f"q{i}\x07\t{ids[i]}\t1\n" for i in range(6))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}", newline="")
    return folder


def test_no_verb_sends_what_a_corpus_or_a_name_spells(tmp_path, capsys):
    """Every verb that shows what others wrote, on a set of a hostile author; and errors that quote names."""
    data = hostile_set(tmp_path / f"set{HOSTILE[:12]}")
    runs = tmp_path / "runs"
    corpus = Beir(path=str(data))
    generated = Generate(corpus=corpus, strategy=Crop(), engine=CropEngine())
    folder = materialize(Parse(generations=generated, corpus=corpus), str(runs), Placement(generate=Pool(workers=0)))
    query = folder.read("queries")["query_id"][0].as_py()
    job = tmp_path / "asked.py"
    job.write_text(
        "from dagr_ray.stages.sources import Beir\nfrom dagr_ray.stages.generate import Generate, Parse\n"
        "from dagr_ray.engines.crop import CropEngine\nfrom dagr_ray.strategies.crop import Crop\n"
        "def asked(data: str):\n    corpus = Beir(path=data)\n"
        "    return Parse(generations=Generate(corpus=corpus, strategy=Crop(), engine=CropEngine()), corpus=corpus)\n"
    )
    tried = [
        (0, ["preview", job, f"data={data}", "--rows", "2"], "over"),
        (0, ["trace", query, "--runs", runs], "over"),
        (0, ["trace", query, "--runs", runs, "--json"], "over"),
        (0, ["show", "beir", "--runs", runs, "--table", "corpus"], "over"),
        (0, ["show", "beir", "--runs", runs, "--table", "corpus", "--json"], "over"),
        (0, ["show", "beir", "--runs", runs], "u001b"),
        (0, ["ls", "--runs", runs], "beir"),
        (0, ["check", job, f"data={data}", "--one", "--runs", runs], "cached"),
        (2, ["show", f"none{HOSTILE}", "--runs", runs], "over"),
        (2, ["check", job, f"data=none{HOSTILE}", "--one"], "over"),
        (2, ["check", job, f"other{HOSTILE}=1", "--one"], "other"),
        (2, ["run", job, f"data={data}", "--placement", f"x{HOSTILE}"], "over"),
    ]  # fmt: skip
    capsys.readouterr()
    for wanted, words, seen in tried:
        args = main.parser().parse_args([*map(str, words)])
        try:
            code = next(getattr(m, args.verb) for m in (run, results, inspect) if hasattr(m, args.verb))
            code = code(args) or 0
        except Exception as error:
            code = main._explain(error)
        out, err = capsys.readouterr()
        assert code == wanted, out + err
        assert seen in out + err, words
        assert not [c for c in "\x1b\x07\r\x9b\u202e\u2028\u200b" if c in out + err], words
        if "--json" in words:
            json.loads(out)
