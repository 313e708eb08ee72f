"""Playground: parity with its own step, privileged observations, missing assets and package."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import wrappers

pytest.importorskip("mujoco_playground")

from mujoco_playground import State, registry

from envs import mjx, playground

NUM_STEPS = 30
DMC = [t for t in envs.TASKS["playground"] if not t.startswith(tuple(playground.MENAGERIE))]
JOYSTICK = [t for t in envs.TASKS["playground"] if t not in DMC]


def test_the_tasks_are_those_of_playground():
    assert sorted(DMC) == sorted(registry.dm_control_suite.ALL_ENVS)
    assert len(DMC) == 25
    assert set(JOYSTICK) <= set(registry.locomotion.ALL_ENVS)


@pytest.mark.slow
@pytest.mark.parametrize("task", DMC)
def test_parity_with_playground(task):
    """Our step from every state of a random rollout of Playground's own environment."""
    raw = playground.make(task)
    source = registry.load(task, config_overrides={"impl": "jax"})

    def theirs(key, actions):
        def step(state, action):
            after = wrappers.strong(source.step(state, jnp.clip(action, -1, 1)))
            info = {field: state.info[field] for field in state.info if field != "rng"}
            before = playground.PlaygroundState(mjx.pack(state.data), state.obs, info)
            outputs = after.obs, after.reward, after.done > 0.5
            return after, (before, state.info["rng"], outputs)

        start = wrappers.strong(source.reset(key))
        return start.obs, jax.lax.scan(step, start, actions)[1]

    def ours(key, before, keys, actions):
        def step(inputs):
            obs, _, reward, terminated, info = raw.step(*inputs)
            return (obs, reward, terminated), info["env_nan"]

        return raw.reset(key)[0], jax.lax.map(step, (keys, before, actions))

    shape = (4, NUM_STEPS, raw.action_size)
    actions = jax.random.uniform(jax.random.key(1), shape, minval=-1.2, maxval=1.2)
    resets = jax.random.split(jax.random.key(0), 4)
    source_start, (before, keys, expected) = jax.jit(jax.vmap(theirs))(resets, actions)
    start, (out, env_nan) = jax.jit(jax.vmap(ours))(resets, before, keys, actions)
    # programs compiled apart round apart, and contacts magnify that
    tolerance = 1e-5 if task == "CartpoleBalance" else 2e-3
    np.testing.assert_allclose(start, source_start, rtol=1e-5, atol=1e-5)
    for result, wanted in zip(out[:2], expected[:2], strict=True):
        np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(out[2], expected[2])
    assert not env_nan.any()
    assert raw.max_steps == source._config.episode_length
    assert source._config.action_repeat == 1


# --- privileged observations, on a stand-in with the interface of a joystick task ---


class Joystick:
    """Observes the step and the noise drawn from its own key; keeps notes in info, in place."""

    action_size = 2
    dt = 0.02

    def __init__(self):
        self.cartpole = registry.load("CartpoleBalance", config_overrides={"impl": "jax"})
        self.mj_model = self.cartpole.mj_model

    def _obs(self, data, info):
        noise = jax.random.uniform(info["rng"])
        state = jnp.array([info["step"], noise])
        return {"state": state, "privileged_state": jnp.hstack([state, data.qpos])}

    def reset(self, key):
        state = self.cartpole.reset(key)
        info = {"rng": key, "step": 0}
        return State(
            state.data, self._obs(state.data, info), state.reward, state.done, {"m": 0.0}, info
        )

    def step(self, state, action):
        state.info["rng"], _ = jax.random.split(state.info["rng"])
        state.info["step"] += 1
        state.metrics["m"] = action.sum()
        obs = self._obs(state.data, state.info)
        return state.replace(obs=obs, reward=action.sum(), done=jnp.float32(0))


@pytest.fixture(scope="module")
def joystick():
    return Joystick()


def test_only_the_policys_observation_by_default(joystick):
    raw = playground.adapt("fake", joystick, 1000)
    env = wrappers.wrap(raw, 3, stagger=False)
    assert (env.obs_size, env.privileged_size) == (2, 0)
    obs, state = jax.jit(env.reset)(jax.random.key(0))
    assert obs.shape == (3, 2)
    obs, *_, info = jax.jit(env.step)(jax.random.key(1), state, jnp.ones((3, 2)))
    assert obs.shape == info["final_observation"].shape == (3, 2)


def test_privileged_part_is_at_the_end_and_no_key_is_kept(joystick):
    raw = playground.adapt("fake", joystick, 1000)
    assert (raw.obs_size, raw.privileged_size) == (6, 4)
    env = wrappers.wrap(raw, 3, stagger=False, privileged=True)
    obs, state = jax.jit(env.reset)(jax.random.key(0))
    assert obs.shape == (3, 6)
    for leaf in jax.tree.leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    step = jax.jit(env.step)
    seen = []
    for t in range(3):
        obs, state, reward, *_ = step(jax.random.key(t), state, 3 * jnp.ones((3, 2)))
        np.testing.assert_array_equal(obs[:, :2], obs[:, 2:4])
        np.testing.assert_array_equal(obs[:, 0], t + 1)
        np.testing.assert_array_equal(reward, 2.0)  # actions are clipped
        seen.append(obs[:, 1])
    assert len(np.unique(seen)) == 9  # noise comes from the key of the step


def test_where_there_is_nothing_privileged_asking_changes_nothing():
    assert envs.make("CartpoleBalance", 1, privileged=True).privileged_size == 0


# --- what is missing ---


@pytest.mark.parametrize("task", JOYSTICK)
def test_missing_assets_are_an_error_and_never_a_download(task, monkeypatch, tmp_path):
    monkeypatch.setattr(playground.mjx_env, "MENAGERIE_PATH", tmp_path / "none")
    refuse = lambda *args, **kwargs: pytest.fail("tried to download")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ValueError, match=f"{task} needs the model .* not downloaded for you"):
        envs.make(task, 1)


def test_missing_playground_names_the_extra(monkeypatch):
    envs._load.cache_clear()
    monkeypatch.delitem(sys.modules, "envs.playground")
    monkeypatch.setitem(sys.modules, "mujoco_playground", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[playground\]"'):
        envs.make("CartpoleBalance", 1)
    monkeypatch.undo()
    importlib.import_module("envs.playground")


@pytest.mark.skipif(
    not playground.mjx_env.MENAGERIE_PATH.exists(), reason="robot models are not installed"
)
@pytest.mark.slow
@pytest.mark.parametrize("task", JOYSTICK)
def test_joystick_tasks_run_where_their_models_are(task):
    env = envs.make(task, 2, privileged=True)
    obs, state = jax.jit(env.reset)(jax.random.key(0))
    obs = jax.jit(env.step)(jax.random.key(1), state, jnp.zeros((2, env.action_size)))[0]
    assert obs.shape == (2, env.obs_size)
    assert jnp.isfinite(obs).all()
