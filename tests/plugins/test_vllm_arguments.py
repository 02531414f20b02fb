"""vLLM's own arguments and structured output: checked when a study is planned, and followed by the real engine."""

import json
import pickle
import re

import pytest

from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.engines import Engine, Sampling
from dagr_ray.engines._vllm_arguments import ELSEWHERE, SPEED, parallel_sizes
from dagr_ray.engines._vllm_memory import GIB, Need, cache_of_one, check_gpu, free_on_cpu, weights_of
from dagr_ray.engines.vllm import VLLM
from dagr_ray.prompts import Prompt
from dagr_ray.quickstart.models import smollm2

pytestmark = pytest.mark.engine

HERE = Pool(workers=1)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["what", "how"]}, "query": {"type": "string", "maxLength": 40}},
    "required": ["kind", "query"],
    "additionalProperties": False,
}
QUESTION = r"(what|how) [a-z ]{5,30}\?"
PROMPTS = [Prompt(f"Passage {i}: ", "Paper planes fold in six steps.", " Question:", stop=("\n",)) for i in range(6)]


@pytest.fixture(scope="module")
def model():
    return str(smollm2())


def refused(engine, pool=None, **fields):
    with pytest.raises(ConfigError) as caught:
        engine.model_copy(update=fields).check(pool)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_logprob": 3}, "no argument 'max_logprob'; the nearest: max_logprobs"),
        ({"load_format": 3}, "load_format = 3: Input should be a valid string"),
        ({"kv_cache_dtype": "fp7"}, "kv_cache_dtype = 'fp7': Input should be 'auto'"),
        ({"max_logprobs": "20"}, "max_logprobs = '20': Input should be a valid integer"),
        ({"max_num_seqs": 4}, r"set it in the placement, below \[generate.engine_args\]"),
        ({"trust_remote_code": True}, "code from a model's folder is never run"),
        ({"seed": 7}, "set the seed of the Generate stage"),
        ({"hf_token": "secret-of-mine"}, "set HF_TOKEN in the environment"),
    ],
)
def test_engine_arguments_are_checked_before_the_start(model, given, said):
    message = refused(VLLM(model=model, engine_args=given))
    assert re.search(said, message), message
    assert "secret" not in message


def test_placement_arguments_are_checked_before_the_start(model):
    engine = VLLM(model=model)
    assert "max_num_seqs" in refused(engine, Pool(engine_args={"max_num_seq": 4}))
    assert "can change the text" in refused(engine, Pool(engine_args={"kv_cache_dtype": "fp8"}))
    engine.check(Pool(engine_args={"max_num_seqs": 4, "kv_cache_memory_bytes": GIB}))


def test_every_name_that_is_sorted_is_one_of_vllms():
    from dagr_ray.engines._vllm_arguments import _hints

    assert set(_hints()) >= SPEED | set(ELSEWHERE)


def test_the_fingerprint_has_engine_args_but_no_placement(model):
    plain, other = VLLM(model=model), VLLM(model=model, engine_args={"kv_cache_dtype": "fp8"})
    assert plain.fingerprint() != other.fingerprint()
    assert "engine_args" not in plain.identity() and "lora" not in plain.identity()
    for config in (other, VLLM(model=model, json_schema=SCHEMA), VLLM(model=model, regex="a+")):
        assert from_json(json.loads(json.dumps(config.to_json())), Engine) == config
        assert pickle.loads(pickle.dumps(config)) == config
        assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    with pytest.raises(TypeError, match="cannot be changed"):
        other.engine_args["kv_cache_dtype"] = "auto"
    fast = Pool(engine_args={"max_num_seqs": 4})
    assert from_json(json.loads(json.dumps(Placement(generate=fast).to_json())), Placement).generate == fast
    with pytest.raises(ConfigError, match="engine_args"):
        from_json({"type": "vllm", "model": model, "engine_args": {"a": {1, 2}}}, Engine)


def test_parallel_sizes_fill_the_gpus_of_a_worker(model):
    assert parallel_sizes(Pool(gpus=0)) == (1, 1) == parallel_sizes(Pool(gpus=0.5))
    assert parallel_sizes(Pool(gpus=4)) == (4, 1)
    assert parallel_sizes(Pool(gpus=4, engine_args={"pipeline_parallel_size": 2})) == (2, 2)
    engine = VLLM(model=model)
    for pool in (
        Pool(gpus=0, engine_args={"tensor_parallel_size": 2}),
        Pool(gpus=4, engine_args={"tensor_parallel_size": 2}),
        Pool(gpus=3, engine_args={"pipeline_parallel_size": 2}),
    ):
        assert "set gpus = 2" in refused(engine, pool)
    assert "whole number" in refused(engine, Pool(gpus=1.5))
    assert "whole number" in refused(engine, Pool(gpus=2, engine_args={"tensor_parallel_size": "2"}))
    assert "9 attention heads" in refused(engine, Pool(gpus=2))
    assert engine.arguments(Pool(gpus=3))["tensor_parallel_size"] == 3


def test_an_invalid_adapter_is_refused(model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not an adapter" in refused(VLLM(model=model, lora=str(tmp_path / "empty")))
    (tmp_path / "empty" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "empty" / "adapter_config.json").write_text('{"r": 1000}')
    assert "rank 1000" in refused(VLLM(model=model, lora=str(tmp_path / "empty")))
    assert "give an existing path" in refused(VLLM(model=model, lora=str(tmp_path / "nowhere")))


def test_structures_that_no_backend_follows_are_refused(model):
    assert "is not supported" in refused(VLLM(model=model, regex="(unclosed"))
    assert "is not supported" in refused(VLLM(model=model, json_schema={"type": "nonsense"}))
    with pytest.raises(ValueError, match="remove one of them"):
        VLLM(model=model, json_schema=SCHEMA, regex="a+")


# -- memory -----------------------------------------------------------------------------------------------------------


def test_missing_memory_is_refused_before_the_start(model):
    huge = Pool(workers=1, engine_args={"kv_cache_memory_bytes": 10**15})
    with pytest.raises(
        ConfigError, match=r"needs 9313\d\d\.\d GiB .* but \d+\.\d GiB are free; .*kv_cache_memory_bytes"
    ):
        VLLM(model=model).open(huge)


def test_weights_are_counted_as_they_will_be_loaded(model, tmp_path):
    half = weights_of(smollm2(), "bfloat16", quantised=False)
    assert 134e6 * 2 < half < 136e6 * 2
    assert weights_of(smollm2(), "float32", quantised=False) == 2 * half
    whole = (smollm2() / "model.safetensors").read_bytes()
    assert abs(weights_of(smollm2(), "bfloat16", quantised=True) - len(whole)) == 0
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="copy the model again"):
        weights_of(tmp_path, "bfloat16", quantised=False)
    (tmp_path / "model.safetensors").write_bytes(b"no header at all")
    with pytest.raises(ConfigError, match="copy the model again"):
        weights_of(tmp_path, "bfloat16", quantised=False)


def test_a_control_group_limits_free_memory(tmp_path):
    groups = tmp_path / "cgroup"
    groups.write_text("0::/outer/inner\n")
    inner = tmp_path / "fs" / "outer" / "inner"
    inner.mkdir(parents=True)
    unbound = free_on_cpu(str(groups), str(tmp_path / "fs"))
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text(f"{3 * 2**20}\n")
    (inner.parent / "memory.current").write_text(f"{2 * 2**20}\n")
    (inner.parent / "memory.stat").write_text(f"anon 5\ninactive_file {2**20}\n")
    assert free_on_cpu(str(groups), str(tmp_path / "fs")) == 2 * 2**20 < unbound
    # version 1, the path being that of the host
    groups.write_text("4:memory:/docker/0123\n")
    old = tmp_path / "fs" / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text(f"{9 * 2**20}\n")
    (old / "memory.usage_in_bytes").write_text(f"{8 * 2**20}\n")
    (old / "memory.stat").write_text("total_inactive_file 0\n")
    assert free_on_cpu(str(groups), str(tmp_path / "fs")) == 2**20


def test_a_gpu_must_have_enough_memory():
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    assert cache_of_one(config, 1024, "bfloat16") == 128 * 2**20
    need = Need(weights=15 * GIB, cache=cache_of_one(config, 1024, "bfloat16"))
    check_gpu("llm", need, free=23 * GIB, total=24 * GIB, share=0.9)
    with pytest.raises(ConfigError, match="21.6 GiB .* but 20.0 GiB are free; .*lower gpu_memory_utilization"):
        check_gpu("llm", need, free=20 * GIB, total=24 * GIB, share=0.9)
    with pytest.raises(ConfigError, match="needs 16.6 GiB .* gets 14.4 GiB of a GPU; give the pool more gpus"):
        check_gpu("llm", need, free=16 * GIB, total=16 * GIB, share=0.9)


# -- with the engine ----------------------------------------------------------------------------------------------------


def answers(engine, tokens, pool=HERE):
    session = engine.open(pool)
    try:
        made = session.generate(PROMPTS, list(range(0, 60, 10)), Sampling(max_tokens=tokens, temperature=1.0), 2)
    finally:
        session.close()
    found = [completion for answer in made for completion in answer]
    assert all(c.error is None for c in found)
    return found


def test_completions_follow_a_json_schema(model):
    found = answers(VLLM(model=model, json_schema=SCHEMA), 64)
    whole = [c for c in found if c.finish_reason == "stop"]
    assert len(whole) >= 6, "few are cut off at max_tokens"
    for completion in whole:
        value = json.loads(completion.raw)
        assert set(value) == {"kind", "query"} and value["kind"] in ("what", "how") and len(value["query"]) <= 40


def test_completions_follow_a_regular_expression(model):
    pool = Pool(workers=1, engine_args={"max_num_seqs": 3, "kv_cache_memory_bytes": GIB})
    found = answers(VLLM(model=model, regex=QUESTION), 40, pool)
    whole = [c for c in found if c.finish_reason == "stop"]
    assert len(whole) >= 6
    assert all(re.fullmatch(QUESTION, c.raw) for c in whole)
    assert len({c.raw for c in whole}) > 2, "seeds still tell the samples apart"
