"""Collections as other people write them, a few lines each: those that are read, and those that are refused."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq

DOCS = [("d1", "Rivers", "the river runs"), ("d2", "", 'a bell, it "rings" at noon'), ("7", "Stone", "cold stone")]
QUERIES = [("q1", "what runs"), ("q2", "what rings, at noon"), ("3", "what is cold")]
QRELS = [("q1", "d1", 1), ("q2", "d2", 2), ("q2", "7", 0), ("3", "7", 1)]
PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda b: pa.compress(b, "zstd", asbytes=True),
}


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(columns, schema=None):
    out = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns, schema=schema), out)
    return out.getvalue()


def delimited(rows, mark, head=(), end="\n"):
    """Rows as Python's csv (and so pandas) writes them."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=mark, lineterminator=end)
    writer.writerows([head, *rows] if head else rows)
    return out.getvalue().encode()


def lines(rows, mark="\t", end="\n"):
    """Rows as nobody quotes them."""
    return "".join(mark.join(map(str, row)) + end for row in rows).encode()


CORPUS = jsonl({"_id": i, "title": t, "text": x} for i, t, x in DOCS)
ASKED = jsonl({"_id": i, "text": x} for i, x in QUERIES)
HEAD = ("query-id", "corpus-id", "score")
JUDGED = lines([HEAD, *QRELS])
TREC = [(q, 0, d, g) for q, d, g in QRELS]
CORPUS_PARQUET = parquet({"_id": [d[0] for d in DOCS], "title": [d[1] for d in DOCS], "text": [d[2] for d in DOCS]})
QUERIES_PARQUET = parquet({"_id": [q[0] for q in QUERIES], "text": [q[1] for q in QUERIES]})


def judged_parquet(rows=QRELS, names=HEAD, kind=None, ids=None):
    scores = pa.array([row[2] for row in rows], kind or pa.float64())
    columns = [*(pa.array([row[i] for row in rows], ids) for i in (0, 1)), scores]
    return parquet(pa.table(columns[: len(names)], names=list(names)))


def classic(**changed):
    """BEIR's own folder, with other files in place of some (``None``: without it)."""
    files = {"corpus.jsonl": CORPUS, "queries.jsonl": ASKED, "qrels/test.tsv": JUDGED}
    for name, data in changed.items():
        key = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"}[name]
        files.pop(key)
        if isinstance(data, dict):
            files |= data
        elif data is not None:
            files[key] = data
    return files


CORPUS_AT, QUERIES_AT, QRELS_AT = (
    f"{folder}/{name}-00000-of-00001.parquet"
    for folder, name in (("corpus", "corpus"), ("queries", "queries"), ("default", "test"))
)


def hugging_face(qrels, corpus=CORPUS_AT, queries=QUERIES_AT):
    return {corpus: CORPUS_PARQUET, queries: QUERIES_PARQUET, "README.md": b"---\nconfigs: []\n---\n"} | qrels


HALVES = [lines([HEAD, *QRELS[:2]]), lines([HEAD, *QRELS[2:]])]
RIGHT = {
    "BEIR": classic(),
    "BEIR, all gzipped": {f"{n}.gz": gzip.compress(b) for n, b in classic().items()},
    "plain and packed side by side": classic() | {"corpus.jsonl.gz": gzip.compress(CORPUS), "queries.jsonl.gz": b"old"},
    **{f"packed by {p}": {f"{n}.{p}": PACK[p](b) for n, b in classic().items()} for p in PACK},
    "gzip under a name without .gz": classic(corpus=gzip.compress(CORPUS), qrels=gzip.compress(JUDGED)),
    ".gz in the name alone": {f"{n}.gz": b for n, b in classic().items()},
    "two gzip members": classic(corpus=gzip.compress(CORPUS[:40]) + gzip.compress(CORPUS[40:])),
    "CRLF": {n: b.replace(b"\n", b"\r\n") for n, b in classic().items()},
    "BOM of UTF-8": {n: b"\xef\xbb\xbf" + b for n, b in classic().items()},
    "UTF-16 with its mark": {n: b.decode().encode("utf-16") for n, b in classic().items()},
    "UTF-16 without, both orders": classic(
        corpus=CORPUS.decode().encode("utf-16-le"), queries=ASKED.decode().encode("utf-16-be")
    ),
    "no line end at the end, blank lines": {
        n: b"\n" + b.replace(b"\n", b"\n\n").strip(b"\n") for n, b in classic().items()
    },
    "judgements without names": classic(qrels=lines(QRELS)),
    "TREC's four columns by tabs": classic(qrels=lines(TREC)),
    "TREC's four columns by spaces": classic(qrels=lines(TREC, " ")),
    "TREC's four columns, tabs and spaces mixed": classic(qrels=b"q1 0\td1 1\nq2\t0 d2  2\nq2 0 7\t0\n3\t0\t7\t1\n"),
    "TREC's four columns as qrels/test.txt": classic(qrels={"qrels/test.txt": lines(TREC, " ")}),
    "TREC's four columns as qrels.test.tsv, Q0": classic(
        qrels={"qrels.test.tsv": lines([(q, "Q0", d, g) for q, _, d, g in TREC])}
    ),
    "three columns by spaces": classic(qrels=lines(QRELS, " ")),
    "three columns by commas in a .tsv": classic(qrels=lines([HEAD, *QRELS], ",")),
    "three columns by commas without names": classic(qrels=lines(QRELS, ",")),
    "semicolons": classic(qrels={"qrels/test.csv": lines([HEAD, *QRELS], ";")}),
    "names by spaces": classic(qrels=lines([("query_id", "doc_id", "rel"), *QRELS], " ")),
    "other names": classic(qrels=lines([("query", "document", "label"), *QRELS])),
    "other case and signs": classic(qrels=lines([("Query ID", "Doc_ID", "Relevance"), *QRELS])),
    "other order": classic(qrels=lines([("score", "corpus-id", "query-id"), *((g, d, q) for q, d, g in QRELS)])),
    "TREC's columns with names": classic(qrels=lines([("qid", "iteration", "docno", "rel"), *TREC])),
    "more columns than are wanted": classic(qrels=lines([(*HEAD, "who"), *((*row, "me") for row in QRELS)])),
    "scores as floats": classic(qrels=lines([HEAD, *((q, d, float(g)) for q, d, g in QRELS)])),
    "scores with a sign and an exponent": classic(qrels=b"q1\td1\t+1\nq2\td2\t2e0\nq2\t7\t0.\n3\t7\t 1\n"),
    "quoted cells": classic(qrels=lines([[f'"{cell}"' for cell in row] for row in (HEAD, *QRELS)])),
    "the same judgement twice": classic(qrels=JUDGED + lines(QRELS[:1])),
    "validation beside test": classic() | {"qrels/validation.tsv": JUDGED},
    "judgements at the root": classic(qrels={"test.tsv": JUDGED}),
    "judgements at the root as JSON lines": classic(
        qrels={"test.jsonl": jsonl(dict(zip(HEAD, row, strict=True)) for row in QRELS)}
    ),
    "judgements in one file without a split": classic(qrels={"qrels.tsv": JUDGED}),
    "MTEB 1: judgements as JSON lines": classic(
        qrels={"qrels/test.jsonl": jsonl(dict(zip(HEAD, row, strict=True)) for row in QRELS)}
    ),
    "a score of true": classic(
        qrels={"qrels/test.jsonl": jsonl([{"qid": q, "pid": d, "label": bool(g) if g < 2 else g} for q, d, g in QRELS])}
    ),
    "judgements as one JSON object": classic(
        qrels={"qrels/test.json": json.dumps({"q1": {"d1": 1}, "q2": {"d2": 2, "7": 0}, "3": {"7": 1}}).encode()}
    ),
    "judgements as CSV in UTF-16": classic(
        qrels={"qrels/test.csv": delimited(QRELS, ",", HEAD).decode().encode("utf-16")}
    ),
    "MTEB 2: default/, float64": hugging_face({QRELS_AT: judged_parquet()}),
    "MTEB 2: data/, int64": hugging_face({"data/test-00000-of-00001.parquet": judged_parquet(kind=pa.int64())}),
    "MTEB 2: qrels/, one split name for all": hugging_face(
        {"qrels/test-00000-of-00001.parquet": judged_parquet()},
        "corpus/test-00000-of-00001.parquet",
        "queries/test-00000-of-00001.parquet",
    ),
    "MTEB 2: a language": hugging_face(
        {"en-qrels/test-00000-of-00001.parquet": judged_parquet()},
        "en-corpus/test-00000-of-00001.parquet",
        "en-queries/test-00000-of-00001.parquet",
    ),
    "Hugging Face's conversion to Parquet": hugging_face(
        {"default/test/0000.parquet": judged_parquet()}, "corpus/corpus/0000.parquet", "queries/queries/0000.parquet"
    ),
    "everything in data/": hugging_face(
        {"data/test-00000-of-00001.parquet": judged_parquet()},
        "data/corpus-00000-of-00001.parquet",
        "data/queries-00000-of-00001.parquet",
    ),
    "two shards of judgements": hugging_face(
        {f"default/test-0000{i}-of-00002.parquet": judged_parquet(QRELS[2 * i : 2 * i + 2]) for i in (0, 1)}
    ),
    "two shards of JSON lines": classic(
        corpus={f"corpus-0000{i}-of-00002.jsonl": b"".join(CORPUS.splitlines(True)[i::2]) for i in (0, 1)}
    ),
    "Spark's parts": classic(corpus={"corpus/_SUCCESS": b"", "corpus/part-00000-1f0c9a3e.parquet": CORPUS_PARQUET}),
    "id for _id, extra columns, another order": hugging_face({QRELS_AT: judged_parquet()})
    | {
        CORPUS_AT: parquet(
            {
                "text": [d[2] for d in DOCS],
                "metadata": pa.nulls(3),
                "tags": [["a"], [], None],
                "id": [d[0] for d in DOCS],
                "title": [d[1] or None for d in DOCS],
            }
        )
    },
    "dictionary-encoded and large strings": hugging_face({QRELS_AT: judged_parquet(ids=pa.large_string())})
    | {
        CORPUS_AT: parquet(
            {
                "_id": pa.array([d[0] for d in DOCS]).dictionary_encode(),
                "title": pa.array([d[1] for d in DOCS], pa.large_string()),
                "text": pa.array([d[2] for d in DOCS], pa.string_view()),
            }
        )
    },
    "bytes for text": hugging_face({QRELS_AT: judged_parquet()})
    | {
        QUERIES_AT: parquet(
            {"_id": pa.array([q[0].encode() for q in QUERIES]), "text": pa.array([q[1].encode() for q in QUERIES])}
        )
    },
    "Parquet passages in BEIR's folder": classic(corpus={"corpus.parquet": CORPUS_PARQUET}),
    "MS MARCO's names": {
        "collection.tsv": lines([(i, x) for i, _, x in DOCS]),
        "queries.dev.tsv": lines(QUERIES[:2]),
        "queries.test.tsv": lines(QUERIES),
        "qrels.test.tsv": lines(TREC),
        "qrels.dev.tsv": lines(TREC[:2]),
    },
    "CSV, quoted cells, a line end inside": classic(
        corpus={"corpus.csv": delimited([(*d, "x\ny") for d in DOCS], ",", ("id", "title", "text", "more"))},
        queries={"queries.csv": delimited(QUERIES, ",", ("id", "text"), "\r\n")},
    ),
    "TSV with names, as pandas writes it": classic(
        corpus={"corpus.tsv": delimited(DOCS, "\t", ("_id", "title", "text"))},
        queries={"queries.tsv": delimited(QUERIES, "\t", ("query_id", "query"))},
    ),
    "TSV with names, nothing quoted": classic(corpus={"corpus.tsv": lines([("_id", "title", "text"), *DOCS])}),
    "JSON arrays": classic(
        corpus={"corpus.json": json.dumps([{"_id": i, "title": t, "text": x} for i, t, x in DOCS], indent=1).encode()},
        queries={"queries.json": json.dumps(dict(QUERIES)).encode()},
    ),
    "JSON, passages by id": classic(
        corpus={"corpus.json": json.dumps({i: {"title": t, "text": x} for i, t, x in DOCS}).encode()}
    ),
    "numbers for ids, NaN and null for titles": classic(
        corpus=jsonl(
            {"_id": int(i) if i.isdigit() else i, "title": t or float("nan"), "text": x, "more": [1]}
            for i, t, x in DOCS
        ),
        queries=jsonl({"_id": int(i) if i.isdigit() else i, "text": x, "title": None} for i, x in QUERIES),
    ),
    "what lies beside": classic()
    | {
        ".DS_Store": b"\0\1",
        "README.md": b"# a",
        "corpus.jsonl.swp": b"x",
        "qrels/README.txt": b"who judged",
        "qrels/.test.tsv.swp": b"x",
        "corpus.tsv": b"old",
        "docs/manual.txt": b"none",
        "train.jsonl": b"{}",
        "data/notes.json": b"[]",
        "top_ranked/test-00000-of-00001.parquet": b"x",
    },
}
# what is refused -> a part of what is said; the judgements of a split are refused where they are asked for
REFUSED = {
    "a grade of a half": (
        classic(qrels=lines([HEAD, ("q1", "d1", 0.5)])),
        r"test.tsv: 1 of 1 .*line 2: .*score 0.5 is not a whole number",
    ),
    "a large number": (
        classic(qrels=lines([HEAD, ("q1", "d1", 3_000_000_000)])),
        "line 2: .*score 3000000000 is too large",
    ),
    "a larger number": (classic(qrels=lines([HEAD, ("q1", "d1", "9" * 400)])), "too large"),
    "no number": (classic(qrels=lines([HEAD, ("q1", "d1", "yes")])), "score 'yes' is not a number"),
    "underscores in a number": (classic(qrels=lines([HEAD, ("q1", "d1", "1_0")])), "score '1_0' is not a number"),
    "infinity": (classic(qrels=lines([HEAD, ("q1", "d1", "inf")])), "score 'inf' is not a number"),
    "an empty score": (classic(qrels=lines([HEAD, ("q1", "d1", "")])), "no score"),
    "grades that contradict": (
        classic(qrels=JUDGED + b"q1\td1\t0\n"),
        "line 6: duplicate-id .q1 d1: grade 0, and 1 before",
    ),
    "one column": (classic(qrels=b"q1\nq2\n"), "line 1: .*1 column; a row has query-id"),
    "a run for judgements": (
        classic(qrels=lines([(q, "Q0", d, 1, 2.5, "x") for q, d, _ in QRELS], " ")),
        "6 columns; a TREC run has six",
    ),
    "names that nobody knows": (
        classic(qrels=lines([("frage", "treffer", "note"), *QRELS])),
        "line 1: .*of known names",
    ),
    "a name for the query alone": (
        classic(qrels=lines([("query-id", "hit", "score"), *QRELS])),
        "line 1: no corpus-id among the columns query-id, hit, score",
    ),
    "no name for the score": (
        classic(qrels=lines([("query-id", "corpus-id", "weight"), *QRELS])),
        "no score among the columns",
    ),
    "names of three, rows of four": (
        classic(qrels=lines([HEAD, *TREC])),
        "line 2: broken-line .4 columns, the header names 3",
    ),
    "four columns that are not TREC's": (
        classic(qrels=lines([(q, d, g, "me") for q, d, g in QRELS])),
        "header of known names|not TREC.s iteration",
    ),
    "another collection's judgements": (
        classic(qrels=lines([HEAD, *(("x" + q, d, g) for q, d, g in QRELS)])),
        "4 of 4 lines have unknown ids .line 2: no query has the id 'xq1'",
    ),
    "columns the other way round": (classic(qrels=lines([(d, q, g) for q, d, g in QRELS])), "no query has the id 'd1'"),
    "no judgement": (classic(qrels=lines([HEAD])), "no judgement"),
    "lists for ids in Parquet": (
        classic(qrels={"qrels/test.parquet": parquet({"query-id": [["q1"]], "corpus-id": ["d1"], "score": [1]})}),
        "column 'query-id' is of type list",
    ),
    "floats for ids in Parquet": (
        classic(qrels={"qrels/test.parquet": parquet({"query-id": [1.0], "corpus-id": ["d1"], "score": [1]})}),
        "column 'query-id' is of type double",
    ),
    "half grades in Parquet": (
        classic(qrels={"qrels/test.parquet": judged_parquet([("q1", "d1", 0.5)])}),
        "score 0.5 is not a whole number",
    ),
    "null scores in Parquet": (classic(qrels={"qrels/test.parquet": judged_parquet([("q1", "d1", None)])}), "no score"),
    "other names in Parquet": (
        classic(qrels={"qrels/test.parquet": judged_parquet(names=("a", "b", "c"))}),
        "no query-id and no corpus-id among the columns a, b, c",
    ),
    "two columns of one name": (
        classic(qrels=lines([(*HEAD, "score"), *((*row, 1) for row in QRELS)])),
        "two columns are called",
    ),
    "two columns of one name in Parquet": (
        classic(corpus={"corpus.parquet": parquet(pa.table([pa.array(["a"])] * 3, names=["_id", "text", "text"]))}),
        "two columns are called 'text'",
    ),
    "blank lines alone": (classic(qrels=b"\n" * 300), "first 200 lines are blank"),
    "JSON that nests without end": (classic(corpus=b"[" * 100_000), "line 1: broken-json .RecursionError"),
    "half of a letter in UTF-16": (classic(corpus=CORPUS.decode().encode("utf-16")[:-1]), "not UTF-16-LE"),
    "a time for a score": (
        classic(qrels={"qrels/test.parquet": judged_parquet(kind=pa.timestamp("s"))}),
        "column 'score' is of type timestamp",
    ),
    "a cut Parquet file": (
        classic(qrels={"qrels/test.parquet": judged_parquet()[:200]}),
        "not a complete Parquet file",
    ),
    "two files for one split": (
        classic(qrels={"qrels/test.csv": JUDGED, "qrels/test.jsonl": b""}),
        "it is unclear which of qrels/test.csv and qrels/test.jsonl",
    ),
    "no passages": ({"queries.jsonl": ASKED}, r"no corpus.jsonl in"),
    "no queries": ({"corpus.jsonl": CORPUS}, r"no queries.jsonl in"),
    "two sets of passages": (
        hugging_face({}, "en-corpus/test-00000-of-00001.parquet")
        | {"de-corpus/test-00000-of-00001.parquet": CORPUS_PARQUET},
        "has 2 sets of passages",
    ),
    "passages by split": (
        hugging_face({}) | {"corpus/dev-00000-of-00001.parquet": CORPUS_PARQUET},
        "has 2 sets of passages",
    ),
    "a shard that is not there": (
        hugging_face({}, "corpus/corpus-00000-of-00002.parquet"),
        "1 of 2 parts are present, number 1 is missing",
    ),
    "an empty corpus": (classic(corpus=b""), "corpus.jsonl has no passage"),
    "a pointer of Git LFS": (
        hugging_face({}) | {CORPUS_AT: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
        "pointer of Git LFS.*git lfs pull",
    ),
    "an archive": (classic(corpus=b"PK\x03\x04rest"), "ZIP archive; unpack it"),
    "markup": (
        classic(corpus={"corpus.trec": b"<DOC>\n<DOCNO>d1</DOCNO>\n</DOC>\n"}),
        "markup .'<doc>.*is not supported",
    ),
    "UTF-32": (classic(corpus=CORPUS.decode().encode("utf-32")), "UTF-32; save it as UTF-8"),
    "Latin-1": (classic(corpus='{"_id": "d1", "text": "café"}\n'.encode("latin-1")), "line 1: wrong-encoding"),
    "half of a gzip file": (classic(corpus=gzip.compress(CORPUS * 50)[:90]), "not a complete gzip file"),
    "a damaged gzip file": (classic(corpus=gzip.compress(CORPUS)[:14] + b"\xff" * 30), "not a complete gzip file"),
    "half of a zstd file": (classic(corpus={"corpus.jsonl.zst": PACK["zst"](CORPUS)[:-9]}), "not a complete zstd file"),
    "no _id": (
        classic(corpus=jsonl({"key": i, "text": x} for i, _, x in DOCS)),
        "line 1: broken-json .no _id among its names: key, text",
    ),
    "an id that is null": (classic(corpus=jsonl([{"_id": None, "text": "a"}])), "no-id .None is not an id"),
    "an id that is a fraction": (classic(corpus=jsonl([{"_id": 1.5, "text": "a"}])), "no-id .1.5 is not an id"),
    "a list for a text": (
        classic(corpus=jsonl([{"_id": "d1", "text": ["a", "b"]}])),
        "_id, title and text must be strings",
    ),
    "no text": (classic(corpus=jsonl([{"_id": "d1", "title": ""}])), "empty-text .d1"),
    "one id, two passages": (
        classic(corpus=CORPUS + jsonl([{"_id": "d1", "text": "another"}])),
        "line 4: duplicate-id .d1",
    ),
    "one id, two queries": (
        classic(queries=ASKED + jsonl([{"_id": "q1", "text": "another"}])),
        "line 4: duplicate-id .q1",
    ),
    "an open quotation mark": (
        classic(corpus={"corpus.csv": b'id,text\nd1,"never closed\nd2,b\n'}),
        "line 2: a quotation mark is not closed",
    ),
    "a TSV of three without names": (
        classic(corpus={"corpus.tsv": lines(DOCS)}),
        "3 columns and no header; add a first line",
    ),
    "a TSV whose names nobody knows": (
        classic(queries={"queries.tsv": lines([("nummer", "frage"), ("q1", "what runs"), ("q2", "what rings")])}),
        "line 1: .*unknown column names",
    ),
    "a TSV with a name for the id alone": (
        classic(queries={"queries.tsv": lines([("id", "frage"), *QUERIES])}),
        "no text among the columns id, frage",
    ),
    "text without a mark between columns": (classic(queries={"queries.txt": b"q1 what runs\n"}), "no tab in the lines"),
}
