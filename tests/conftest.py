"""One compilation cache for all tests, their workers and the programs they start."""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Networks are compared with references to five digits, of which TF32 on NVIDIA's cards keeps three.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# Most of the suite's time is compilation: half of it without optimisation, for the same semantics.
FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.9."):  # the older emitters compile in half the time; gone later
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    if config.option.markexpr != "slow":  # learning runs are long enough to be optimised
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"


# Tracing makes objects by the million, and hardly any garbage: search for it less often.
gc.set_threshold(200_000, 50, 100)


@pytest.fixture
def signals():
    """Put back the handlers that a launch in this process replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
