"""What every benchmark shares: arguments, tables beside the script, bounds, and processes that measure themselves."""

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.checkout import ROOT, commit, title
from benchmarks.harness.measured import in_own_process, peak_memory
from benchmarks.harness.tables import markdown

__all__ = ["ROOT", "Benchmark", "commit", "in_own_process", "markdown", "peak_memory", "title"]
