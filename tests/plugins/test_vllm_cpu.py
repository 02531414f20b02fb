"""What an engine on a CPU is given beyond vLLM's own: kernels for norms, and memory that it keeps while it works."""

import json
import subprocess
import sys

import pytest
import torch

from dagr_ray.engines._vllm_arguments import prepare_environment

prepare_environment()
from dagr_ray.engines import _vllm_cpu  # noqa: E402  it imports vLLM, which reads the environment

pytestmark = pytest.mark.engine

EAGER = {"enforce_eager": True}

# Faults of pages in a thread whose steps take and free 48 MB each: before memory is kept, meanwhile and afterwards. And
# how much is handed back then.
FAULTS = """
import json, resource, threading
import torch
from dagr_ray.engines import _vllm_cpu as vllm_cpu
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(10):
        torch.ones(12 << 20)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def work():
    first = faults()
    vllm_cpu.keep_memory()
    faults()
    kept, held = faults(), resident()
    vllm_cpu.give_memory_back()
    print(json.dumps([first, kept, held - resident(), faults()]))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def kernels(name):
    from vllm import ir

    _vllm_cpu.norm_kernels(EAGER)
    return [getattr(ir.ops, name).impls[each] for each in ("native", _vllm_cpu.PROVIDER)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(40, 576), (0, 576), (3, 5, 64), (4, 72)])
@pytest.mark.parametrize("weighed", [True, False])
def test_norms_are_those_of_vllm(dtype, shape, weighed):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) if weighed else None
    close = {"rtol": {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1.3e-6}[dtype], "atol": 1e-5}
    native, ours = kernels("rms_norm")
    assert ours.supports_args(x, weight, 1e-5)
    torch.testing.assert_close(ours.impl_fn(x, weight, 1e-5), native.impl_fn(x, weight, 1e-5), **close)
    native, ours = kernels("fused_add_rms_norm")
    expected = native.impl_fn(x, residual, weight, 1e-5)
    found = ours.impl_fn(x.clone(), residual.clone(), weight, 1e-5)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def test_rows_that_the_kernels_cannot_read_are_left_to_vllm():
    whole, weight = torch.randn(40, 1152).bfloat16(), torch.randn(576).bfloat16()
    part = whole[:, :576]
    for name, rows in (("rms_norm", (part,)), ("fused_add_rms_norm", (part, part.contiguous()))):
        _, ours = kernels(name)
        assert not ours.supports_args(*rows, weight, 1e-5)
        assert not ours.supports_args(*(each.contiguous() for each in rows), weight.float(), 1e-5)
        assert not ours.supports_args(*(each.contiguous() for each in rows), weight, 1e-5, 64)
        # a row with a rest, which they refuse with an error
        assert not ours.supports_args(*(each[:, :20].contiguous() for each in rows), weight[:20], 1e-5)
        assert ours.supports_args(*(each.contiguous() for each in rows), weight, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (EAGER, [_vllm_cpu.PROVIDER]),
        ({"enforce_eager": False}, None),
        (EAGER | {"tensor_parallel_size": 2}, None),
        (EAGER | {"pipeline_parallel_size": 2}, None),
        (EAGER | {"kernel_config": {"ir_op_priority": {"rms_norm": ["native"]}}}, ["native"]),
    ],
)
def test_norm_kernels_need_one_process_and_no_compiler(arguments, first):
    found = _vllm_cpu.norm_kernels(arguments)
    assert found.get("kernel_config", {}).get("ir_op_priority", {}).get("rms_norm") == first


def test_other_settings_of_kernels_are_kept():
    found = _vllm_cpu.norm_kernels(EAGER | {"kernel_config": {"moe_backend": "auto"}})
    assert found["kernel_config"]["moe_backend"] == "auto" and "ir_op_priority" in found["kernel_config"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_is_kept_between_steps_and_given_back():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, kept, handed_back, last = json.loads(done.stdout.splitlines()[-1])
    pages = 10 * (48 << 20) // 4096
    assert first > 0.5 * pages and last > 0.5 * pages
    assert kept < 0.01 * pages
    assert handed_back > 40 << 20
