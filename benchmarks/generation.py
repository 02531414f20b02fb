"""The Generate stage beside vLLM alone and Ray's own processor: the same prompts, sampling and seeds, in turns.

    python benchmarks/generation.py [--prompts 1000] [--rounds 3] [--arms vllm,stage,ray] [--json FILE]

Each arm runs in a process of its own, with its engine's start left out and reported. Prints the ratios of requests a
second as median, least and most over the rounds, and writes benchmarks/generation.md. Exits 1 where the stage is under
0.97 of vLLM alone or under 1.0 of ray.data.llm.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from dagr_ray import cluster
from dagr_ray.cluster import Placement
from dagr_ray.engines import Sampling
from dagr_ray.engines.vllm import VLLM
from dagr_ray.models import smollm2
from dagr_ray.stage import materialize
from dagr_ray.stages.corpus import PyDocs, Sample
from dagr_ray.stages.generate import Exemplars, Generate
from dagr_ray.strategies.promptagator import Promptagator

BOUNDS = {"vllm": 0.97, "ray": 1.0}
NAMES = {"vllm": "`vllm.LLM.generate`", "ray": "`ray.data.llm`", "stage": "`Generate`"}


def asked(prompts: int) -> Generate:
    """The stage that is measured."""
    docs = PyDocs(part="stdlib")
    shown = Exemplars(corpus=docs, k=4)
    return Generate(
        corpus=Sample(corpus=docs, n=prompts, exclude=shown),
        strategy=Promptagator(),
        engine=VLLM(model=str(smollm2())),
        sampling=Sampling(max_tokens=24),
        exemplars=shown,
    )


def requests(stage: Generate, runs: str) -> list[tuple[str, str, int]]:
    """(doc_id, prompt, seed) in the order of the corpus."""
    inputs = {name: materialize(each, runs) for name, each in stage.inputs().items()}
    ids = inputs["corpus"].read("corpus")["doc_id"].to_pylist()
    texts = stage.prompts(inputs, ids)
    from dagr_ray.tables import seed_of

    return [(i, texts[i], seed_of(stage.fingerprint(), i)) for i in ids]


def vllm_alone(stage: Generate, runs: str) -> dict[str, Any]:
    """One call with all prompts."""
    from vllm import SamplingParams

    rows = requests(stage, runs)
    started = time.perf_counter()
    session = stage.engine.open(cluster.Pool(workers=1, cpus=2))
    ready = time.perf_counter()
    wanted = [SamplingParams(temperature=0.7, max_tokens=24, seed=seed, stop=["\n"]) for _, _, seed in rows]
    answers = session.llm.generate([text for _, text, _ in rows], wanted, use_tqdm=False)
    done = time.perf_counter()
    tokens = sum(len(a.prompt_token_ids) + len(a.outputs[0].token_ids) for a in answers)
    return {"seconds": done - ready, "start_s": ready - started, "tokens": tokens, "answers": len(answers)}


def through_the_stage(stage: Generate, runs: str) -> dict[str, Any]:
    """From the first shard's start to the last one's commit, on an actor of Ray Data, with Parquet and receipts."""
    cluster.connect()
    for each in stage.inputs().values():
        materialize(each, runs)
    started = time.time()
    folder = materialize(stage, runs, Placement())
    first = min(p.stat().st_mtime for p in Path(folder.path, "tries").iterdir())
    last = max(p.stat().st_mtime for p in Path(folder.path, "receipts").iterdir())
    cost, rows = folder.manifest["cost"], folder.count("generations")
    tokens = cost["prompt_tokens"] + cost["completion_tokens"]
    return {"seconds": last - first, "start_s": first - started, "tokens": tokens, "answers": rows}


def ray_data_llm(stage: Generate, runs: str) -> dict[str, Any]:
    """Ray's processor over the same prompts; its start is the time until its first batch minus one batch's own time."""
    cluster.connect()
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    rows = requests(stage, runs)
    config = vLLMEngineProcessorConfig(
        model_source=stage.engine.model,
        engine_kwargs={
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 4096,
            "block_size": 32,
            "generation_config": "vllm",
        },
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": "2"}},
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},
        concurrency=1,
        batch_size=64,
        max_concurrent_batches=8,
        apply_chat_template=False,
        log_engine_metrics=False,
    )

    def before(row: dict[str, Any]) -> dict[str, Any]:
        params = {"temperature": 0.7, "max_tokens": 24, "seed": int(row["seed"]), "stop": ["\n"]}
        return {"prompt": row["text"], "sampling_params": params}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        tokens = row["num_input_tokens"] + row["num_generated_tokens"]
        return {"raw": row["generated_text"], "tokens": tokens, "ended": time.time(), "took": row["time_taken_llm"]}

    data = ray.data.from_items([{"text": text, "seed": seed} for _, text, seed in rows], override_num_blocks=16)
    started = time.time()
    made = build_processor(config, preprocess=before, postprocess=after)(data).take_all()
    first = min(row["ended"] - row["took"] for row in made)
    last = max(row["ended"] for row in made)
    tokens = int(sum(row["tokens"] for row in made))
    return {"seconds": last - first, "start_s": first - started, "tokens": tokens, "answers": len(made)}


ARMS = {"vllm": vllm_alone, "stage": through_the_stage, "ray": ray_data_llm}


def measure(arm: str, prompts: int) -> dict[str, Any]:
    """One arm, in a process of its own."""
    words = [sys.executable, __file__, "--one", arm, "--prompts", str(prompts)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    """Runs the rounds, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="vllm,stage,ray")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as runs:
            print(json.dumps(ARMS[args.one](asked(args.prompts), runs)), flush=True)
        return 0
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms.split(",")}
    for number in range(args.rounds):
        for arm, rounds in found.items():
            rounds.append(measure(arm, args.prompts))
            print(f"round {number + 1} {arm}: {rounds[-1]}", file=sys.stderr, flush=True)
    lines = ["| arm | requests/s, median | start, median | tokens | stage over it: median, least, most | bound |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    report, short = {}, False
    for arm, rounds in found.items():
        speed = [r["answers"] / r["seconds"] for r in rounds]
        cells = [
            NAMES[arm],
            f"{median(speed):.2f}",
            f"{median(r['start_s'] for r in rounds):.1f} s",
            f"{rounds[0]['tokens']:,}",
        ]
        report[arm] = {
            "requests_per_s": speed,
            "start_s": [r["start_s"] for r in rounds],
            "tokens": rounds[0]["tokens"],
        }
        if arm in BOUNDS and "stage" in found:
            ratios = [s["answers"] / s["seconds"] / own for s, own in zip(found["stage"], speed, strict=True)]
            report[arm]["stage_over_it"] = ratios
            short |= median(ratios) < BOUNDS[arm]
            cells += [f"{median(ratios):.3f}, {min(ratios):.3f}, {max(ratios):.3f}", f"at least {BOUNDS[arm]}"]
        lines.append("| " + " | ".join([*cells, "", ""][:6]) + " |")
    text = f"{args.prompts:,} prompts, {args.rounds} rounds in turns, SmolLM2-135M on this CPU.\n\n" + "\n".join(lines)
    print(text)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    Path(__file__).with_suffix(".md").write_text(text + "\n")
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
