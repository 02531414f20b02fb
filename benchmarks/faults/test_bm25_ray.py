"""Lucene and Ray in one process, with faults: the rounds of the benchmark, ten of them."""

import pytest
import ray

from benchmarks.faults.bm25_ray import FAULTS, rounds
from dagr_ray.core.ray_start import connect

pytestmark = pytest.mark.cluster


def test_ten_rounds_with_faults_do_not_crash_and_give_one_answer():
    connect()
    survived, others = rounds(10)
    assert others == 0 and survived == dict.fromkeys(FAULTS, 2)
    assert ray.is_initialized()
