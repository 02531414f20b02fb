"""The Generate stage beside vLLM alone and Ray's own processor: the same prompts, sampling and seeds, in turns.

    python -m benchmarks.speed.generation [--prompts 1024] [--rounds 3] [--arms vllm,compiled,inline,stage,ray] [--json FILE]
    python -m benchmarks.speed.generation --config 8b --dummy --placement cluster/one_gpu.toml --prompts 8192

Each arm runs in a process of its own, with its engine's start left out and reported. The stage runs twice: in the calling
process (a placement without workers) and on a pool of Ray actors, whose own processes (driver, raylet, GCS, agents, three
helper actors of Ray Data) take cores from an engine that computes on them. vLLM alone has the stage's engine arguments;
``compiled`` is the same with vLLM's compiler, which fuses what the stage's engine has kernels for on a CPU and takes long
to start, and ``stock`` (not run by default) has vLLM's own defaults for that and for the size of cache blocks. On a GPU all
three are one.

Prints the ratios of requests a second as median, least and most over the rounds, and writes benchmarks/speed/generation.md where
all arguments are the default ones. Exits 1 where the stage, in process or on Ray, is under 0.97 of vLLM alone, or on Ray
under 1.0 of ray.data.llm.

``--config`` is a folder with a config.json and a tokenizer, or a shape that the script writes out (8b: Llama's with 8
billion parameters, tiny: for a test). ``--dummy`` gives the model random weights, so that none have to be there.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Benchmark, in_own_process
from dagr_ray.core import environment, ray_start
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, load_placement
from dagr_ray.core.tables import seed_of
from dagr_ray.engines import Sampling
from dagr_ray.engines.vllm import VLLM, start
from dagr_ray.quickstart.models import smollm2
from dagr_ray.stages.exemplars import Exemplars
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import PyDocs, Sample
from dagr_ray.strategies.promptagator import Promptagator

BOUNDS = {("inline", "vllm"): 0.97, ("stage", "vllm"): 0.97, ("stage", "ray"): 1.0}
NAMES = {
    "vllm": "`vllm.LLM.generate`",
    "compiled": "the same, compiled",
    "stock": "`vllm.LLM.generate`, vLLM's defaults",
    "inline": "`Generate`, in process",
    "stage": "`Generate`, on Ray",
    "ray": "`ray.data.llm`",
}
MAX_TOKENS = 24
PEERS = {"vllm": "over vLLM alone: median, least, most", "compiled": "over vLLM compiled", "ray": "over `ray.data.llm`"}
# engine arguments of the stage that a peer goes without
WITHOUT: dict[str, tuple[str, ...]] = {
    "vllm": (),
    "compiled": ("enforce_eager",),
    "stock": ("enforce_eager", "block_size"),
}
# hidden_size, intermediate_size, layers, attention heads, key-value heads
SHAPES = {"8b": (4096, 14336, 32, 32, 8), "tiny": (128, 256, 2, 4, 2)}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def written(shape: str, folder: Path) -> Path:
    """A model folder without weights: a Llama config of this shape beside SmolLM2's tokenizer."""
    hidden, inner, layers, heads, shared = SHAPES[shape]
    source = smollm2()
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "max_position_embeddings": 8192,
        "vocab_size": 128256,  # Llama 3's; the tokenizer uses the first 49,152 of them
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def asked(prompts: int, model: str, dummy: bool) -> Generate:
    """The stage that is measured."""
    docs = PyDocs(part="stdlib")
    shown = Exemplars(corpus=docs, k=4)
    return Generate(
        corpus=Sample(corpus=docs, n=prompts, exclude=shown),
        strategy=Promptagator(),
        engine=VLLM(model=model, engine_args={"load_format": "dummy"} if dummy else {}),
        sampling=Sampling(max_tokens=MAX_TOKENS),
        exemplars=shown,
    )


def requests(stage: Generate, runs: str) -> list[tuple[str, str, int]]:
    """(doc_id, prompt, seed) in the order of the corpus."""
    inputs = {name: materialize(each, runs) for name, each in stage.inputs().items()}
    ids = inputs["corpus"].read("corpus")["doc_id"].to_pylist()
    texts = stage.prompts(inputs, ids)
    return [(i, texts[i], seed_of(stage.fingerprint(), i)) for i in ids]


def vllm_alone(stage: Generate, runs: str, placement: Placement, without: tuple[str, ...]) -> dict[str, Any]:
    """One call with all prompts, which vLLM tokenises itself."""
    rows = requests(stage, runs)
    began = time.perf_counter()
    assert isinstance(stage.engine, VLLM)
    llm = start(stage.engine, placement.generate, lambda given: {k: v for k, v in given.items() if k not in without})
    ready = time.perf_counter()
    from vllm import SamplingParams

    wanted = [SamplingParams(temperature=0.7, max_tokens=MAX_TOKENS, seed=seed, stop=["\n"]) for _, _, seed in rows]
    answers = llm.generate([text for _, text, _ in rows], wanted, use_tqdm=False)
    done = time.perf_counter()
    return {
        "seconds": done - ready,
        "start_s": ready - began,
        "answers": len(answers),
        "prompt_tokens": sum(len(answer.prompt_token_ids) for answer in answers),
        "completion_tokens": sum(len(answer.outputs[0].token_ids) for answer in answers),
    }


def through_the_stage(stage: Generate, runs: str, placement: Placement) -> dict[str, Any]:
    """From the moment that the worker's engine is open to the last shard's commit, in Parquet with receipts."""
    for each in stage.inputs().values():
        materialize(each, runs)
    began = time.time()
    folder = materialize(stage, runs, placement)
    receipts = folder.receipts().values()
    last = max(path.stat().st_mtime for path in Path(folder.path, "receipts").iterdir())
    # a worker's receipts add up to its time since it opened; the last of them is written after it was added up
    cost = (folder.manifest or {})["cost"]
    workers = max(placement.generate.workers, 1)
    seconds = (cost["busy_s"] + cost["idle_s"]) / workers + last - max(receipt["at"] for receipt in receipts)
    return {
        "seconds": seconds,
        "start_s": last - seconds - began,
        "answers": folder.count("generations"),
        "prompt_tokens": cost["prompt_tokens"],
        "completion_tokens": cost["completion_tokens"],
    }


def in_process(stage: Generate, runs: str, placement: Placement) -> dict[str, Any]:
    """The stage without a pool: one shard after the other, so all prompts are one."""
    assert isinstance(stage.corpus, Sample)
    alone = placement.generate.model_copy(update={"workers": 0, "shard_rows": stage.corpus.n})
    return through_the_stage(stage, runs, placement.model_copy(update={"generate": alone}))


def ray_data_llm(stage: Generate, runs: str, placement: Placement) -> dict[str, Any]:
    """Ray's processor, from its engine's first request to its last row."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    rows = requests(stage, runs)
    pool = placement.generate
    assert isinstance(stage.engine, VLLM)
    options = stage.engine.arguments(pool)
    variables = {name: os.environ.get(name, value) for name, value in environment.VLLM.items()}
    config = vLLMEngineProcessorConfig(
        model_source=options.pop("model"),
        engine_kwargs=options,
        runtime_env={"env_vars": variables},
        placement_group_config=None if pool.gpus else {"bundles": [{"CPU": 1}]},
        concurrency=1,
        batch_size=64,
        max_concurrent_batches=8,
        # the engine does all three itself, in processes of its own: on two cores an actor for each is slower
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
    )

    def before(row: dict[str, Any]) -> dict[str, Any]:
        params = {"temperature": 0.7, "max_tokens": MAX_TOKENS, "seed": int(row["seed"]), "stop": ["\n"]}
        return {"prompt": row["text"], "sampling_params": params}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        counted = {"prompt_tokens": row["num_input_tokens"], "completion_tokens": row["num_generated_tokens"]}
        return {"raw": row["generated_text"], "ended": time.time(), "took": row["time_taken_llm"], **counted}

    blocks = max(1, len(rows) // 64)
    data = ray.data.from_items([{"text": text, "seed": seed} for _, text, seed in rows], override_num_blocks=blocks)
    began = time.time()
    made = build_processor(config, preprocess=before, postprocess=after)(data).take_all()
    first = min(row["ended"] - row["took"] for row in made)
    return {
        "seconds": max(row["ended"] for row in made) - first,
        "start_s": first - began,
        "answers": len(made),
        "prompt_tokens": int(sum(row["prompt_tokens"] for row in made)),
        "completion_tokens": int(sum(row["completion_tokens"] for row in made)),
    }


ARMS = {arm: partial(vllm_alone, without=left_out) for arm, left_out in WITHOUT.items()} | {
    "inline": in_process,
    "stage": through_the_stage,
    "ray": ray_data_llm,
}


def measure(arm: str, args: argparse.Namespace, model: str) -> dict[str, Any]:
    """One arm, in a process of its own."""
    words = ["--one", arm, "--prompts", str(args.prompts), "--config", model]
    words += ["--placement", args.placement, *(["--dummy"] if args.dummy else [])]
    found = in_own_process(__file__, *words)
    return found | {"per_s": found["answers"] / found["seconds"]}


def summary(found: dict[str, list[dict[str, Any]]]) -> tuple[list[str], dict[str, Any], bool]:
    """Lines of the table, the same as JSON, and whether a bound is missed."""
    columns = ["arm", "requests/s, median", "start, median", "tokens in, out"]
    columns += [PEERS[peer] for peer in PEERS if peer in found]
    head = "| " + " | ".join(columns) + " |"
    lines = [head, "|---|" + "---:|" * (len(columns) - 1)]
    report: dict[str, Any] = {}
    short = False
    for arm, rounds in found.items():
        cells = [
            NAMES[arm],
            f"{median(each['per_s'] for each in rounds):.2f}",
            f"{median(each['start_s'] for each in rounds):.1f} s",
            f"{rounds[0]['prompt_tokens']:,}, {rounds[0]['completion_tokens']:,}",
        ]
        report[arm] = {"rounds": rounds}
        for peer in PEERS:
            if peer not in found:
                continue
            if arm not in ("inline", "stage"):
                cells.append("")
                continue
            ratios = [ours["per_s"] / own["per_s"] for ours, own in zip(rounds, found[peer], strict=True)]
            bound = BOUNDS.get((arm, peer))
            said = {"median": median(ratios), "min": min(ratios), "max": max(ratios), "bound": bound}
            report[arm][f"over_{peer}"] = {"each": ratios, **said}
            short |= bound is not None and said["median"] < bound
            wanted = "" if bound is None else f" (bound: at least {bound})"
            cells.append(f"{said['median']:.3f}, {said['min']:.3f}, {said['max']:.3f}{wanted}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines, report, short


def main() -> int:
    """Runs the rounds, prints and writes the table."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--prompts", type=int, default=1024)
    bench.add("--rounds", type=int, default=3)
    bench.add("--arms", default="vllm,compiled,inline,stage,ray")
    bench.add("--config", metavar="DIR|SHAPE", help=f"a model folder, or one of {', '.join(SHAPES)}")
    bench.add("--dummy", action="store_true", help="random weights")
    bench.add("--placement", default="local")
    bench.add("--one", choices=ARMS, help=argparse.SUPPRESS)
    args = bench.parse()
    with tempfile.TemporaryDirectory() as temporary:
        if args.one:
            if args.one in ("stage", "ray"):
                ray_start.connect()  # before a stage is made, which imports every plugin and with them Ray
            stage = asked(args.prompts, args.config, args.dummy)
            print(json.dumps(ARMS[args.one](stage, temporary, load_placement(args.placement))), flush=True)
            return 0
        if args.config in SHAPES and not args.dummy:
            bench.error(f"--config {args.config} has no weights; add --dummy")
        model = Path(args.config or smollm2())
        if args.config in SHAPES:
            model = written(args.config, Path(temporary, f"llama-{args.config}"))
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms.split(",")}
        for number in range(args.rounds):
            for arm, rounds in found.items():
                rounds.append(measure(arm, args, str(model)))
                print(f"round {number + 1} {arm}: {rounds[-1]}", file=sys.stderr, flush=True)
    lines, report, short = summary(found)
    bench.say(f"{args.prompts:,} prompts, {args.rounds} rounds in turns, {model.name}, placement {args.placement}.\n")
    bench.say("\n".join(lines))
    if short:
        bench.fail("a ratio is under its bound")
    return bench.finish(report)


if __name__ == "__main__":
    sys.exit(main())
