"""Brax: parity with Brax's own step and with MuJoCo C, the line search caps, and drawing."""

import base64
import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from algos import bpo, cli, ppo
from envs import brax, mjx, viewer, wrappers
from envs.wrappers import raw_state

pytestmark = pytest.mark.xdist_group("brax")  # one worker, which compiles each model once

NUM_ENVS, NUM_STEPS = 8, 50

# Default suite: a light model on mjx; contacts and further backends are slow to compile.
FAST = [("inverted_pendulum", "mjx")]
MODELS = [
    pytest.param(
        task,
        backend,
        id=f"{task}-{backend}",
        marks=() if (task, backend) in FAST else pytest.mark.slow,
    )
    for task in envs.TASKS["brax"]
    for backend in (("generalized",) if task == "swimmer" else envs.BRAX_BACKENDS)
]


class Parity(NamedTuple):
    """A random rollout of Brax's own environment, and our adapter's step from each of its states.

    Leaves are [NUM_ENVS, NUM_STEPS, ...]; outputs are obs, reward, done. Stepping from the same
    state keeps rounding apart from chaos.
    """

    before: Any  # integration state, or pipeline state off mjx
    source: tuple
    ours: tuple
    after: Any  # as `before`, one step of ours later
    env_nan: np.ndarray
    starts: tuple  # reset observations [NUM_ENVS, obs_size] of both


@pytest.fixture(scope="module")
def parity():
    """Memo of parity(task, backend) -> Parity, so that a compile is shared between tests."""
    done = {}

    def get(task, backend="mjx"):
        if (task, backend) not in done:
            done[task, backend] = run_parity(task, backend)
        return done[task, backend]

    return get


def run_parity(task, backend):
    source = brax.brax_envs.get_environment(task, backend=backend)
    raw = brax.make(task, backend)
    pack = lambda pipeline: mjx.pack(pipeline, brax.READ) if backend == "mjx" else pipeline

    def theirs(key, actions):
        def step(state, action):
            after = wrappers.strong(source.step(state, jnp.clip(action, -1, 1)))
            before = brax.BraxState(pack(state.pipeline_state), state.info)
            return after, (before, (after.obs, after.reward, after.done > 0.5))

        start = wrappers.strong(source.reset(key))
        return start.obs, jax.lax.scan(step, start, actions)[1]

    def ours(key, before, actions):
        def step(pair):
            obs, state, reward, terminated, info = raw.step(key, *pair)
            return (obs, reward, terminated), state.pipeline, info["env_nan"]

        return raw.reset(key)[0], jax.lax.map(step, (before, actions))

    keys = jax.random.split(jax.random.key(0), NUM_ENVS)
    shape = (NUM_ENVS, NUM_STEPS, raw.action_size)
    actions = jax.random.uniform(jax.random.key(1), shape, minval=-1.2, maxval=1.2)
    source_start, (before, expected) = jax.jit(jax.vmap(theirs))(keys, actions)
    start, (out, after, env_nan) = jax.jit(jax.vmap(ours))(keys, before, actions)
    return jax.tree.map(
        np.asarray, Parity(before.pipeline, expected, out, after, env_nan, (start, source_start))
    )


# --- parity with Brax at the model's own settings: also the test of the line search caps ---


@pytest.mark.parametrize(("task", "backend"), MODELS)
def test_parity_with_brax(task, backend, parity):
    result = parity(task, backend)
    # programs compiled apart round apart; in the stiffer models that comes to 5e-4 in one step
    tolerance = 1e-5 if task in ("hopper", "inverted_pendulum") else 2e-3
    np.testing.assert_allclose(*result.starts, rtol=1e-5, atol=1e-5)
    for ours, source in zip(result.ours[:2], result.source[:2], strict=True):
        np.testing.assert_allclose(ours, source, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(result.ours[2], result.source[2])
    assert not result.env_nan.any()


def test_the_line_search_cap_is_what_runs():
    assert brax_model("hopper").opt.ls_iterations == brax.LS_ITERATIONS["hopper"] == 4


def brax_model(task, **options):
    """The mjx model that an adapter steps."""
    seen = {}
    set_solver = brax.mjx.set_solver
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            brax.mjx, "set_solver", lambda *args: seen.setdefault("model", set_solver(*args))
        )
        brax.make(task, "mjx", **options)
    return seen["model"]


def test_solver_options_reach_the_model():
    opt = brax_model("inverted_pendulum", iterations=3, ls_iterations=7).opt
    assert (opt.iterations, opt.ls_iterations) == (3, 7)


def test_solver_options_need_mjx():
    with pytest.raises(ValueError, match="need backend=mjx"):
        envs.make("hopper?backend=spring&iterations=2", 1)


# --- MuJoCo C ---


@pytest.mark.parametrize(
    "task", ["inverted_pendulum", pytest.param("hopper", marks=pytest.mark.slow)]
)
def test_step_agrees_with_mujoco_c(task, parity):
    """One environment step from the same state, MJX in float32, MuJoCo C in float64.

    Error of qpos and qvel: |difference| / (1 + |value|). Below 1e-5 in 99 % of 400 steps; below
    1e-3 in all, the largest where a pole lies at its joint limit and the solver stops early.
    """
    result = parity(task)
    before, after = result.before, result.after
    source = brax.brax_envs.get_environment(task, backend="mjx")
    model = source.sys.mj_model
    model.opt.ls_iterations = brax.LS_ITERATIONS[task]
    data = mujoco.MjData(model)
    errors, moved = [], 0.0
    for n, t in np.ndindex(NUM_ENVS, NUM_STEPS):
        for field in ("qpos", "qvel", "qacc_warmstart"):
            getattr(data, field)[:] = before[field][n, t]
        data.ctrl[:] = after["ctrl"][n, t]
        for _ in range(source._n_frames):
            mujoco.mj_step(model, data)
        ours = np.concatenate([after["qpos"][n, t], after["qvel"][n, t]])
        c = np.concatenate([data.qpos, data.qvel])
        errors.append((np.abs(c - ours) / (1 + np.abs(ours))).max())
        moved = max(moved, np.abs(after["qpos"][n, t] - before["qpos"][n, t]).max())
    assert moved > 0.01
    assert np.quantile(errors, 0.99) < 1e-5
    assert np.max(errors) < 1e-3


# --- the whole stack on real physics ---


@pytest.fixture(scope="module")
def stacked():
    """Five-step episodes of a pendulum, refreshed after ten steps, and its first raw state."""
    env = envs.make("inverted_pendulum?backend=spring", 3, stagger=False, max_steps=5)
    step, refresh = jax.jit(env.step), jax.jit(env.refresh)
    obs, state = jax.jit(env.reset)(jax.random.key(0))
    rows, first = [], (obs, raw_state(state))
    for t in range(15):
        action = jnp.zeros((3, 1))
        obs, state, _, terminated, truncated, info = step(jax.random.key(t), state, action)
        rows.append((obs, info["final_observation"], terminated, truncated))
        if t == 9:
            state = refresh(jax.random.key(100), state)
    return first, [np.stack(column) for column in zip(*rows, strict=True)]


def test_final_observation_is_that_of_the_raw_environment(stacked):
    (_, state), (obs, final, terminated, truncated) = stacked
    raw = brax.make("inverted_pendulum", "spring")
    step = jax.jit(jax.vmap(raw.step, in_axes=(None, 0, 0)))
    for t in range(5):
        expected, state, *_ = step(jax.random.key(0), state, jnp.zeros((3, 1)))
        np.testing.assert_allclose(final[t], expected, rtol=1e-6, atol=1e-6)
    assert truncated[4].all()
    assert not terminated.any()
    assert (np.abs(obs[4] - final[4]).max(axis=-1) > 1e-4).all()


def test_refreshed_starts_really_differ(stacked):
    (start, _), (obs, _, _, truncated) = stacked
    assert np.flatnonzero(truncated[:, 0]).tolist() == [4, 9, 14]
    np.testing.assert_array_equal(obs[4], start)
    np.testing.assert_array_equal(obs[9], start)
    assert (np.abs(obs[14] - start).max(axis=-1) > 1e-4).all()


def test_state_is_small_and_holds_no_key():
    raw = brax.make("hopper", "mjx")
    _, state = jax.eval_shape(raw.reset, jax.random.key(0))
    leaves = jax.tree.leaves(state)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) < 1000  # mjx.Data: 4648
    assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves)


# --- NaN ---


class Pipeline(NamedTuple):
    q: jax.Array
    qd: jax.Array


class Clipped:
    """A Brax environment whose observation hides an infinite velocity, as hopper's clip does."""

    action_size = 1
    dt = 0.01

    def reset(self, key):
        zero = jnp.zeros(())
        return brax.brax_envs.State(Pipeline(jnp.zeros(1), jnp.ones(1)), jnp.ones(1), zero, zero)

    def step(self, state, action):
        pipeline = state.pipeline_state._replace(qd=state.pipeline_state.qd / (1 - action))
        obs = jnp.clip(pipeline.qd, -10, 10)
        return state.replace(pipeline_state=pipeline, obs=obs, reward=1.0, done=0.0)


def test_nan_that_the_observation_hides_is_reported(monkeypatch):
    monkeypatch.setattr(brax.brax_envs, "get_environment", lambda *args, **kwargs: Clipped())
    env = wrappers.wrap(brax.make("hopper", "spring"), 2, stagger=False)
    _, state = env.reset(jax.random.key(0))
    action = jnp.array([[1.0], [0.5]])
    *_, reward, terminated, truncated, info = env.step(jax.random.key(1), state, action)
    assert info["env_nan"].tolist() == terminated.tolist() == [True, False]
    assert reward.tolist() == [0.0, 1.0]
    assert not truncated.any()


# --- drawing ---


@pytest.fixture(scope="module")
def hopper():
    model = brax.brax_envs.get_environment("hopper", backend="mjx").sys.mj_model
    qpos = np.tile(model.qpos0, (20, 1))
    qpos[:, 0] = np.linspace(0, 1, 20)
    return model, {"qpos": qpos}


def test_page_is_self_contained_and_holds_the_poses(hopper, tmp_path):
    model, frames = hopper
    page = viewer.write_html(model, frames, tmp_path / "a.html", dt=0.01).read_text()
    assert not re.search(r"https?:|src=|import ", page)
    scene = json.loads(re.search(r"const scene = (\{.*\});", page).group(1))
    poses = np.frombuffer(base64.b64decode(scene["poses"]), "<f4").reshape(20, -1, 7)
    assert poses.shape[1] == len(scene["geoms"]) == model.ngeom
    data = mujoco.MjData(model)
    data.qpos[:] = frames["qpos"][7]
    mujoco.mj_kinematics(model, data)
    np.testing.assert_allclose(poses[7, :, :3], data.geom_xpos, atol=1e-6)
    rotation = np.zeros(9)
    for g in range(model.ngeom):
        mujoco.mju_quat2Mat(rotation, poses[7, g, 3:].astype(float))
        np.testing.assert_allclose(rotation, data.geom_xmat[g], atol=1e-6)
    assert [geom["type"] for geom in scene["geoms"]][:2] == ["plane", "capsule"]


def test_without_gl_the_page_is_written(hopper, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    path = viewer.render(*hopper, tmp_path / "b", dt=0.01, gif=True)
    assert path == tmp_path / "b.html"
    assert path.exists()


@pytest.mark.parametrize("backend", ["mjx", "spring"])
def test_an_environment_draws_its_own_frames(backend, tmp_path):
    raw = brax.make("inverted_pendulum", backend)
    _, state = jax.eval_shape(raw.reset, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    frames = jax.tree.map(lambda x: np.stack([x, x]), raw.frame(state))
    path = raw.render(frames, tmp_path / "c")
    assert path.suffix == ".html"
    assert path.stat().st_size > 100


@pytest.mark.parametrize("algo", [ppo, bpo])
def test_ant_may_stand_and_explore(algo):
    """Clipped actions cost less at first than standing pays: else an early fall is the best."""
    config, _ = cli.parse("ant", algo.Config, algo.PRESETS, ["--env", "ant"])
    noise = np.exp(config.log_std_init) * np.random.default_rng(0).normal(size=100_000)
    ant = brax.brax_envs.get_environment("ant")
    cost = ant._ctrl_cost_weight * ant.action_size * np.mean(np.clip(noise, -1, 1) ** 2)
    assert cost < ant._healthy_reward
