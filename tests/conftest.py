"""One compilation cache for all tests, their workers and the programs they start."""

import gc
import os
import shutil
import signal
from importlib.metadata import version
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Networks are compared with references to five digits, of which TF32 on NVIDIA's cards keeps three.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# Most of the suite's time is compilation: half of it without optimisation, for the same semantics.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.9."):  # the older emitters compile in half the time; gone later
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
else:
    FLAGS += " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"


def pytest_configure(config):
    if config.option.markexpr != "slow":  # learning runs are long enough to be optimised
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"


# Tracing makes objects by the million, and hardly any garbage: search for it less often.
gc.set_threshold(200_000, 50, 100)


@pytest.fixture
def signals():
    """Put back the handlers that a launch in this process replaces."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite started with & ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# One run for all tests of the launcher; they are in one worker, the group "ppo".


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that nothing disturbed, and what it said."""
    import launching  # jax reads the settings above when it is imported

    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    status, said = launching.run(*launching.FLAGS, "--run-dir", str(run_dir))
    assert status == 0
    return run_dir, said


@pytest.fixture
def copy(whole, tmp_path):
    """The run as a crash before its end would have left it, with its checkpoint in the middle."""
    run_dir = tmp_path / "copy"
    shutil.copytree(whole[0], run_dir)
    (run_dir / "done.json").unlink()
    (run_dir / "checkpoints" / "000000006.npz").unlink()
    return run_dir
