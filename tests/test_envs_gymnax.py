"""gymnax: our stack against gymnax's own step, auto-reset included, on every task."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import envs
from envs.wrappers import raw_state

NUM_STEPS = {"Pendulum-v1": 220, "MountainCar-v0": 220}  # past a time limit; 120 elsewhere


def scan_both(task):
    """Outputs of our step and of gymnax's with the same keys and actions, [T, ...] each."""
    env = envs.make(f"gymnax/{task}", 1, stagger=False)
    source, params = gymnax.make(task)
    num_steps = NUM_STEPS.get(task, 120)
    one = lambda key: jax.random.split(key, 1)[0]  # what the vmap over one environment hands on

    def actions(key):
        if env.discrete:
            action = jax.random.randint(key, (1,), 0, env.action_size)
            return action, action[0]
        action = jax.random.uniform(key, (1, env.action_size), minval=-1.3, maxval=1.3)
        return action, jnp.clip(action[0], -1, 1) * source.action_space(params).high

    @jax.jit
    def ours(key, keys):
        def step(carry, key):
            key_act, key_step = jax.random.split(key)
            action, _ = actions(key_act)
            obs, state, reward, terminated, truncated, info = env.step(key_step, carry[1], action)
            return (obs, state), (obs, reward, terminated, truncated, info["final_observation"])

        return jax.lax.scan(step, env.reset(key), keys)[1]

    @jax.jit
    def theirs(key, keys):
        def step(state, key):
            key_act, key_step = jax.random.split(key)
            _, action = actions(key_act)
            obs, state, reward, terminated, truncated, info = source.step(
                one(key_step), state, action, params
            )
            state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
            final = info["final_observation"]
            return state, (obs.ravel(), reward, terminated, truncated, final.ravel())

        state = source.reset(one(key), params)[1]
        state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
        return jax.lax.scan(step, state, keys)[1]

    key = jax.random.key(0)
    keys = jax.random.split(jax.random.key(1), num_steps)
    return [np.asarray(x)[:, 0] for x in ours(key, keys)], [
        np.asarray(x) for x in theirs(key, keys)
    ]


SLOW = "Asterix-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar"  # ten seconds each to compile
TASKS = [
    pytest.param(task, marks=pytest.mark.slow) if task in SLOW else task
    for task in envs.TASKS["gymnax"]
]


@pytest.mark.parametrize("task", TASKS)
def test_parity_with_gymnax(task):
    (obs, reward, terminated, truncated, final), source = scan_both(task)
    source_obs, source_reward, source_terminated, source_truncated, source_final = source
    if task == "DiscountingChain-bsuite":  # its end is part of the task, see the adapter
        source_terminated = source_terminated | source_truncated
        assert source_terminated.any()
    np.testing.assert_array_equal(terminated, source_terminated)
    np.testing.assert_array_equal(truncated, source_truncated & ~source_terminated)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # the rescaled action rounds differently
    np.testing.assert_allclose(obs, source_obs, **tolerance)
    np.testing.assert_allclose(final, source_final, **tolerance)
    np.testing.assert_allclose(reward, source_reward, **tolerance)
    assert reward.dtype == np.float32
    assert obs.dtype == (bool if task.endswith("MinAtar") else np.float32)
    if task in NUM_STEPS:
        assert truncated.any()


@pytest.mark.parametrize("task", envs.TASKS["gymnax"])
def test_declared_sizes(task):
    env = envs.make(f"gymnax/{task}", 2)
    source, params = gymnax.make(task)
    obs, _ = jax.eval_shape(env.reset, jax.random.key(0))
    assert obs.shape == (2, env.obs_size)
    assert env.obs_shape == source.observation_space(params).shape
    assert np.prod(env.obs_shape) == env.obs_size
    assert env.action_size == source.num_actions
    assert env.discrete == (task not in ("Pendulum-v1", "MountainCarContinuous-v0"))
    assert env.max_steps == params.max_steps_in_episode


@pytest.mark.parametrize("task", envs.TASKS["gymnax"])
def test_drawing(task, tmp_path):
    env = envs.make(f"gymnax/{task}", 1)
    if env.render is None:
        assert task in (
            "DiscountingChain-bsuite", "MemoryChain-bsuite", "SimpleBandit-bsuite",
            "UmbrellaChain-bsuite",
        )  # fmt: skip
        return
    _, state = jax.jit(env.reset)(jax.random.key(0))
    frame = env.frame(raw_state(jax.tree.map(lambda x: x[0], state)))
    frames = np.stack([np.asarray(frame), np.roll(np.asarray(frame), 1, axis=0)])
    path = env.render(frames, tmp_path / "episode")
    assert path == tmp_path / "episode.gif"
    with Image.open(path) as image:
        assert image.n_frames == 2
        assert len(image.convert("RGB").getcolors()) > 1


@pytest.mark.parametrize("action", [0.75, -0.75])
def test_a_picture_of_the_pendulum_has_its_torque(action, tmp_path):
    """Hanging down, with an arrow to the right for a positive torque, counterclockwise."""
    env = envs.make("pendulum", 1, stagger=False)
    _, state = env.reset(jax.random.key(0))
    _, state, *_ = env.step(jax.random.key(1), state, jnp.array([[action]]))
    frame = np.array(env.frame(raw_state(jax.tree.map(lambda x: x[0], state))))
    assert frame[3] == 2 * action
    frame[:3] = -1, 0, 0
    path = env.render(frame[None], tmp_path / "episode")
    pixels = np.asarray(Image.open(path).convert("RGB"), int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 120)
    rows, columns = np.nonzero(red)
    assert len(rows) > 50
    assert np.sign(columns.mean() - 150) == np.sign(action)
    assert rows.mean() > 150
