"""One real engine asked by several threads at once: sharing its batch, failing alone, dying together, ending."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import EngineDied
from dagr_ray.engines import Sampling
from dagr_ray.engines.vllm import VLLM
from dagr_ray.prompts import Prompt
from dagr_ray.quickstart.models import smollm2

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

TWELVE = Sampling(max_tokens=12)
GREEDY = Sampling(max_tokens=12, temperature=0)
LONG = Sampling(max_tokens=900)
POISON = "Zebra"


def prompts(shard, passage="{} of {} is about paper planes that fold in {} steps and fly far."):
    opening = (
        "A passage and a question that it answers.\nPassage: Tea cools in ten minutes.\nQuestion: how long\nPassage: "
    )
    texts = [passage.format(f"Item {i}", f"part {shard}", i + shard + 2) for i in range(8)]
    return [Prompt(opening, text, "\nQuestion:", stop=("\n",)) for text in texts]


def seeds(shard):
    return [1000 * shard + 10 * i for i in range(8)]


@pytest.fixture(scope="module")
def session():
    opened = VLLM(model=str(smollm2())).open(Pool(workers=1))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def alone(session):
    """Each shard asked by itself, and how many steps of the engine that took."""
    with steps_of(session) as steps:
        answers = [session.generate(prompts(shard), seeds(shard), TWELVE, 2) for shard in range(4)]
    return answers, len(steps)


class steps_of:
    """Counts the engine's steps, by how many requests are inside."""

    def __init__(self, session):
        self.engine, self.inside = session.feeding.llm.llm_engine, []

    def __enter__(self):
        right = self.engine.step
        self.engine.step = lambda: (self.inside.append(len(session_requests(self.engine))), right())[1]
        return self.inside

    def __exit__(self, *_):
        del self.engine.step


def session_requests(engine):
    return engine.output_processor.request_states


def together(session, shards, ask=prompts, n=2):
    with ThreadPoolExecutor(len(shards)) as pool:
        made = [pool.submit(session.generate, ask(s), seeds(s), TWELVE, n) for s in shards]
        return [each.result(timeout=120) for each in made]


def texts(answers):
    return [[c.raw for c in answer] for answer in answers]


def share_equal(some, others):
    pairs = [(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def test_threads_share_the_batch_and_each_gets_its_own_answers(session, alone):
    separate, steps_alone = alone
    with steps_of(session) as steps:
        found = together(session, range(4))
    assert max(steps) > 16, "requests of more than one shard are inside at once"
    assert len(steps) < 0.6 * steps_alone
    for shard in range(4):
        # bf16 sums differ a little with the shape of the batch, so a rare draw may fall on the other side
        assert share_equal(texts(found[shard]), texts(separate[shard])) >= 0.75
    assert share_equal(texts(found[0]), texts(found[1])) < 0.5, "the shards' own texts differ"
    assert all(c.error is None for shard in found for answer in shard for c in answer)


def break_steps(monkeypatch, session, is_bad):
    """The executor raises, as a kernel would, when a step holds a request whose tokens are bad."""
    executor = session.feeding.llm.llm_engine.engine_core.engine_core.model_executor
    right, bad = executor.execute_model, set()

    def execute(scheduled, *args, **more):
        bad.update(new.req_id for new in scheduled.scheduled_new_reqs if is_bad(new.prompt_token_ids))
        bad.difference_update(scheduled.finished_req_ids)
        if bad & set(scheduled.num_scheduled_tokens):
            raise RuntimeError("no kernel for this")
        return right(scheduled, *args, **more)

    monkeypatch.setattr(executor, "execute_model", execute)


def test_a_request_that_breaks_the_step_fails_alone(session, alone, monkeypatch):
    token = session.tokenise(f" {POISON}")[0]
    break_steps(monkeypatch, session, lambda tokens: token in tokens)
    # so that the failed step is the one that was to fill the prompts' blocks, and nothing right lies there by chance
    engine = session.feeding.llm.llm_engine
    engine.reset_prefix_cache()
    for cache in engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.kv_caches:
        cache.zero_()

    def asked(shard):
        made = prompts(shard)
        if shard == 1:
            made[3] = Prompt(made[3].before, f"About a {POISON}.", made[3].after, stop=("\n",))
        return made

    for found in (session.generate(asked(1), seeds(1), TWELVE, 1), together(session, range(3), asked, n=1)[1]):
        bad = found.pop(3)[0]
        assert bad.raw is None and "no kernel for this" in bad.error
        assert all(c.error is None for answer in found for c in answer)
        right = [answer[:1] for i, answer in enumerate(alone[0][1]) if i != 3]
        assert share_equal(texts(found), texts(right)) >= 0.7


def test_a_caller_that_is_interrupted_leaves_nothing_inside(session):
    engine = session.feeding.llm.llm_engine
    main = threading.main_thread().ident

    def interrupt():
        while not session_requests(engine):
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        session.generate(prompts(7), seeds(7), LONG, 1)
    assert not session_requests(engine) and not engine.has_unfinished_requests()
    assert session.generate(prompts(0), seeds(0), TWELVE, 1)[0][0].error is None


def test_an_engine_that_dies_tells_every_caller(session, monkeypatch):
    break_steps(monkeypatch, session, lambda tokens: True)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(session.generate, prompts(s), seeds(s), TWELVE, 1) for s in range(3)]
        for each in asked:
            with pytest.raises(EngineDied, match="no kernel for this"):
                each.result(timeout=120)
    with pytest.raises(EngineDied, match="no kernel for this"):
        session.generate(prompts(0), seeds(0), TWELVE, 1)
    session.close()


def adapter(folder):
    """A LoRA adapter as PEFT writes it: rank 4 on every query and value projection, far too strong to go unseen."""
    config = json.loads((smollm2() / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = {"q_proj": hidden, "v_proj": hidden // heads * config["num_key_value_heads"]}
    torch.manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in size.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, hidden, dtype=torch.bfloat16)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4, dtype=torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(size), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def test_an_engine_with_an_adapter_opens_after_one_died(session, alone, tmp_path):
    """The last test of this file: it ends the second engine with callers waiting."""
    plain = VLLM(model=str(smollm2()))
    tuned = VLLM(model=str(smollm2()), lora=str(adapter(tmp_path / "tuned")))
    assert tuned.fingerprint() != plain.fingerprint() and tuned.model_name().endswith("+tuned")
    opened = tuned.open(Pool(workers=1, engine_args={"max_num_seqs": 3}))
    try:
        with steps_of(opened) as steps:
            changed = opened.generate(prompts(0), seeds(0), GREEDY, 1)
        assert steps and opened.feeding.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 3
        opened.feeding._lora = None  # the same engine without the adapter
        base = opened.generate(prompts(0), seeds(0), GREEDY, 1)
        assert all(c.error is None for answer in [*changed, *base] for c in answer)
        assert share_equal(texts(changed), texts(base)) < 0.5
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(opened.generate, prompts(0), seeds(0), LONG, 1)
            while not session_requests(opened.feeding.llm.llm_engine):
                time.sleep(0.01)
            opened.close()
            with pytest.raises(EngineDied, match="closed"):
                waiting.result(timeout=60)
    finally:
        opened.close()
