"""The compiled program: devices, hosts, settings of jax."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from launching import FLAGS, checkpoint, start
from tiny import assert_close

import envs
from algos.launch import program, rundir

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


# --- devices and hosts ---


@pytest.mark.slow  # one more process that compiles
def test_eight_devices_and_the_compilation_cache(whole, tmp_path):
    """One seed on each of eight devices; the cache goes to its place under the user's folder."""
    run_dir = tmp_path / "run"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    variables = {"XLA_FLAGS": flags, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    variables |= {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": ""}
    process = start(*FLAGS, "--num-seeds", "8", "--run-dir", str(run_dir), **variables)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert "on 8 x cpu" in said
    assert json.loads((run_dir / "meta.json").read_text())["num_devices"] == 8
    first = {k: v[:2] if v.ndim else v for k, v in checkpoint(run_dir).items()}
    assert_close(first, checkpoint(whole[0]), rtol=1e-3, atol=1e-4)
    assert rundir.read_run(run_dir).returns.shape == (8, 3, 2)
    assert any((tmp_path / "cache" / "purepo").iterdir())


def test_ctrl_c_waits_for_no_compilation():
    interrupt, done, waited = threading.Event(), threading.Event(), []

    def compile_slowly(**_):
        interrupt.set()
        waited.append(done.wait(60))

    slow = SimpleNamespace(lower=lambda: SimpleNamespace(compile=compile_slowly))
    traced = program.Program(*[slow] * len(program.Program._fields))
    send = lambda: interrupt.wait() and os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=send).start()
    with pytest.raises(KeyboardInterrupt):
        program.compile_ahead(traced)
    assert waited == []
    done.set()


MANY_FACTORS = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
mesh, row = jax.sharding.Mesh(jax.local_devices(), "row"), jax.sharding.PartitionSpec("row")
factors = lambda a: jax.lax.fori_loop(0, 50, lambda i, a: a + 0 * jnp.linalg.cholesky(a), a)
factors = jax.shard_map(factors, mesh=mesh, in_specs=row, out_specs=row, check_vma=False)
jax.block_until_ready(jax.jit(factors)(jnp.broadcast_to(jnp.eye(14), (4096, 14, 14))))
"""


def test_physics_of_many_environments_does_not_hang_on_several_devices():
    """Batched Cholesky as MJX calls it; jaxlib 0.10 would wait for ever."""
    variables = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", MANY_FACTORS], env=variables, timeout=60)
    assert done.returncode == 0


@pytest.mark.slow  # two more processes that compile
def test_two_hosts_are_one_launch(whole, tmp_path):
    run_dir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        start(
            *FLAGS, "--num-seeds", "4", "--run-dir", str(run_dir),
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "192/192 | IQM" in said[0]
    assert "192" not in said[1]  # only the first host prints
    first = {k: v[:2] if v.ndim else v for k, v in checkpoint(run_dir).items()}
    assert_close(first, checkpoint(whole[0]), rtol=1e-3, atol=1e-4)
    run = rundir.read_run(run_dir)
    assert run.seeds.tolist() == [0, 1, 2, 3]
    assert run.returns.shape == (4, 3, 2)
    assert np.isfinite(run.returns).all()
    np.testing.assert_allclose(run.returns[:2], rundir.read_run(whole[0]).returns, rtol=1e-3)


CORES = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, envs
from algos.launch import program
program.setup_jax(num_rows=16)
print(envs.cores(), jax.local_device_count())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_only_the_cores_that_the_process_may_use_count():
    """As under a cluster's scheduler: 16 devices on one core would wait for each other."""
    variables = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", CORES]
    said = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout
    assert said.split() == ["1", "1"]


@pytest.mark.parametrize(
    ("limit", "count"),
    [("max 100000", 8), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1),
     ("900000 100000", 8), ("", 8), (None, 8)],
)  # fmt: skip
def test_only_the_cores_that_a_container_grants_count(limit, count, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(envs, "CPU_MAX", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert envs.cores() == count


DEVICES = """
import jax, envs
from algos.launch import program
envs.cores = lambda: 4
program.setup_jax(num_rows=6)
print(jax.local_device_count(), len(program.row_devices(6)))
"""


def test_no_device_is_without_rows():
    """It would keep its share of the cores from the physics of the others."""
    command = [sys.executable, "-c", DEVICES]
    variables = os.environ | {"XLA_FLAGS": ""}
    said = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout
    assert said.split() == ["3", "3"]


# --- settings of jax ---


def test_double_precision_is_refused(tmp_path):
    with jax.enable_x64(True), pytest.raises(ValueError, match="JAX_ENABLE_X64 is set"):
        program.setup_jax(1)


@pytest.mark.parametrize(
    ("name", "value"), [("jax_disable_jit", True), ("jax_numpy_dtype_promotion", "strict")]
)
def test_modes_of_jax_that_programs_cannot_have_are_refused(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        with pytest.raises(ValueError, match=f"{name.upper()} is set: unset it"):
            program.setup_jax(1)
    finally:
        jax.config.update(name, before)


def test_settings_that_are_made_before_jax_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    try:
        program.setup_jax(1)
        assert jax.config.values[name] == before  # the user's choice stays
        jax.config.update(name, None)
        program.setup_jax(1)
        assert jax.config.values[name] == str(tmp_path / "purepo")
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
        with pytest.raises(ValueError, match="not 'JAX_NUM_PROCESSES'"):
            program.setup_jax(1)
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost")
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        with pytest.raises(ValueError, match="DDRESS=localhost: write HOST:PORT"):
            program.setup_jax(1)
        monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
        wanted = "NUM_PROCESSES='two', JAX_PROCESS_ID='0': whole numbers"
        with pytest.raises(ValueError, match=wanted):
            program.setup_jax(1)
    finally:
        jax.config.update(name, before)


def test_the_generator_of_keys_is_fixed():
    before = jax.config.values["jax_default_prng_impl"]
    try:
        jax.config.update("jax_default_prng_impl", "rbg")
        program.setup_jax(1)
        assert jax.config.values["jax_default_prng_impl"] == rundir.PRNG
    finally:
        jax.config.update("jax_default_prng_impl", before)


def test_what_an_update_does_not_report_as_it_should_is_named():
    scalar = jax.ShapeDtypeStruct((), "float32")
    program.check_metrics({"health/finite": scalar, "losses/x": scalar})
    wrong = jax.ShapeDtypeStruct((2,), "float32")
    with pytest.raises(ValueError, match=r"'losses/x' has shape \[2\]: make it a scalar"):
        program.check_metrics({"health/finite": scalar, "losses/x": wrong})
    with pytest.raises(ValueError, match=r"no metric 'health/finite': add those of common\.run_"):
        program.check_metrics({"losses/x": scalar})
