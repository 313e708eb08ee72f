"""The arm: physics and observations against MuJoCo C, its target, its goals and rewards."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from envs import arm

pytestmark = pytest.mark.xdist_group("arm")

N = 16


@pytest.fixture(scope="module", params=["c", "mjx"])
def raw(request):
    return envs._load(f"arm/reacher-moving?engine={request.param}")


@pytest.fixture(scope="module")
def played(raw):
    """States and what a step with random actions gives, from random states; leaves [N, ...]."""
    rng = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), N)
    state = jax.jit(jax.vmap(raw.reset))(keys)[1]._replace(
        qpos=jnp.float32(rng.uniform(-3, 3, (N, 4))),
        qvel=jnp.float32(rng.uniform(-6.9, 6.9, (N, 4))),
        angle=jnp.float32(rng.uniform(0, 360, N)),
        speed=jnp.float32(rng.uniform(-1, 1, N)),
    )
    action = jnp.float32(rng.uniform(-1, 1, (N, 4)))
    return state, action, jax.jit(jax.vmap(raw.step))(keys, state, action)


def test_step_and_observation_agree_with_mujoco_c(played):
    state, action, (obs, after, *_) = jax.device_get(played)
    model = mujoco.MjModel.from_xml_string(arm.MODEL)
    data = mujoco.MjData(model)
    for i in range(N):
        data.qpos[:], data.qvel[:] = state.qpos[i], state.qvel[i]
        torque = 150 * action[i]
        data.xfrc_applied[1, [3, 5]], data.xfrc_applied[2, [3, 5]] = torque[:2], torque[2:]
        for _ in range(4):
            mujoco.mj_step(model, data)
            data.qvel[:] = np.clip(data.qvel, -7, 7)
        np.testing.assert_allclose(after.qpos[i], data.qpos, atol=1e-5)
        np.testing.assert_allclose(after.qvel[i], data.qvel, atol=2e-4)
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(obs[i, :26], seen(model, data), atol=1e-3)
        hand = data.xpos[2] + data.xmat[2].reshape(3, 3) @ [0, -6, 0]
        np.testing.assert_allclose(obs[i, 29:32], hand, atol=1e-3)


def seen(model, data):
    """Position, orientation and velocities of the centres of both links, by MuJoCo."""
    parts = []
    for body, centre in (1, -4.0), (2, -3.0):
        offset = data.xmat[body].reshape(3, 3) @ [0, centre, 0]
        quaternion = data.xquat[body] * (1 if data.xquat[body][0] >= 0 else -1)
        velocity = np.zeros(6)
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, body, velocity, 0)
        linear = velocity[3:] + np.cross(velocity[:3], offset)
        parts += [data.xpos[body] + offset, quaternion, velocity[:3], linear]
    return np.concatenate(parts)


def test_hanging_is_an_equilibrium(raw):
    obs, state = raw.reset(jax.random.key(0))
    np.testing.assert_allclose(obs[:3], [0, -4, 0], atol=1e-5)
    np.testing.assert_allclose(obs[13:16], [0, -10, 0], atol=1e-5)
    for _ in range(5):
        obs, state, *_ = jax.jit(raw.step)(jax.random.key(0), state, jnp.zeros(4))
    np.testing.assert_allclose(obs[29:32], [0, -13, 0], atol=1e-4)


def test_a_free_swing_gains_no_energy(raw):
    """Energy, by MuJoCo C, of 100 decisions without torque; wide swings gain some (Euler)."""
    _, state = raw.reset(jax.random.key(0))
    state = state._replace(qpos=jnp.array([0.3, 0.0, -0.1, 0.0]))
    step = lambda state, key: 2 * (raw.step(key, state, jnp.zeros(4))[1],)
    _, states = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), 100)))(
        state
    )
    model = mujoco.MjModel.from_xml_string(arm.MODEL)
    model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_ENERGY
    data = mujoco.MjData(model)

    def energy(qpos, qvel):
        data.qpos[:], data.qvel[:] = qpos, qvel
        mujoco.mj_forward(model, data)
        return data.energy.sum()

    lowest = energy(np.zeros(4), np.zeros(4))
    start = energy(state.qpos, state.qvel) - lowest
    later = [
        energy(*x) - lowest for x in zip(*jax.device_get((states.qpos, states.qvel)), strict=True)
    ]
    assert max(later) < 1.01 * start
    assert later[-1] > 0.05 * start


def test_target_goes_round(played):
    state, _, (obs, after, *_) = played
    np.testing.assert_allclose(after.angle, (state.angle + 4 * state.speed) % 360, rtol=1e-5)
    target = arm.desired_goal(obs)
    radians = np.radians(after.angle)
    expected = np.stack([8 * np.sin(radians), np.full(N, -1.0), 8 * np.cos(radians)], -1)
    np.testing.assert_allclose(target, expected, atol=1e-5)
    np.testing.assert_array_equal(obs[:, 32], state.speed)


def test_start_states():
    keys = jax.random.split(jax.random.key(0), 500)
    for task, moving in (("reacher-moving", True), ("reacher-static", False)):
        obs, state = jax.vmap(envs._load(f"arm/{task}").reset)(keys)
        angles = np.asarray(state.angle)
        assert (angles == np.round(angles)).all()
        assert angles.min() < 10
        assert 350 < angles.max() < 360
        speed = np.asarray(obs[:, 32])
        assert (speed != 0).all() if moving else (speed == 0).all()
        assert abs(speed).max() <= 1
        np.testing.assert_array_equal(state.qpos, 0)


# --- goals ---


def test_the_task_pays_for_touching_the_target():
    """From 300 random poses, near the target and far from it."""
    raw, rng = envs._load("arm/reacher-moving"), np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), 300)
    state = jax.jit(jax.vmap(raw.reset))(keys)[1]
    state = state._replace(qpos=jnp.float32(rng.uniform(-3, 3, (300, 4))))
    obs, _, reward, *_ = jax.jit(jax.vmap(raw.step))(keys, state, jnp.zeros((300, 4)))
    near = np.linalg.norm(obs[:, 29:32] - obs[:, 26:29], axis=1) < 3.5
    assert 3 < near.sum() < 297
    np.testing.assert_allclose(reward, 0.04 * near)


def test_one_broken_substep_is_reported():
    raw = envs._load("arm/reacher-moving?engine=c")
    _, state = raw.reset(jax.random.key(0))
    broken = state._replace(qvel=state.qvel.at[0].set(jnp.nan))
    *_, info = jax.jit(raw.step)(jax.random.key(0), broken, jnp.zeros(4))
    assert info["env_nan"]


def test_reward_is_that_of_the_goals(played):
    _, _, (obs, _, reward, terminated, _) = played
    achieved, goal = arm.achieved_goal(obs), arm.desired_goal(obs)
    np.testing.assert_array_equal(achieved[:, :3], obs[:, 29:32])
    np.testing.assert_array_equal(achieved[:, 3:], obs[:, 13:16])
    np.testing.assert_allclose(reward, arm.compute_reward(achieved, goal, "env")[:, 0])
    assert not terminated.any()


def test_rewards_by_hand():
    goal = jnp.array([1.0, 2.0, 3.0])
    for distance, touches in ((3.49, True), (3.51, False)):
        achieved = jnp.concatenate([goal + jnp.array([0.0, distance, 0.0]), goal])
        assert arm.compute_reward(achieved, goal, "env") == (np.float32(0.04) if touches else 0.0)
        assert arm.compute_reward(achieved, goal, "sparse") == (0.0 if touches else -1.0)
    # on both sides of 1.15, 3.45 and 5.75: too near or near, near or between, between or far
    offset = jnp.array([[1.1, 1.2, 3.4], [5.8, -1.1, -5.7], [-5.8, 3.5, 1.1]])
    achieved = jnp.concatenate([jnp.zeros((3, 3)), goal + offset], -1)
    heads = [[0, 0, 0, 1, 1, 1, -1, 0, 0], [-1, 0, 0, 0, 1, 0, 0, -1, 0]]
    heads += [[-1, 0, 0, 0, 0, 1, 0, 0, -1]]
    proxy = arm.compute_reward(achieved, goal, "proxy")
    np.testing.assert_allclose(proxy, 0.01 * np.array(heads), atol=1e-7)
    total = arm.compute_reward(achieved, goal, "proxy_sum")
    np.testing.assert_allclose(total[:, 0], 0.01 * np.sum(heads, 1), atol=1e-7)


def test_environment_says_what_goals_it_has():
    moving, static = (envs.make(f"arm/reacher-{x}", 2).goals for x in ("moving", "static"))
    assert moving.moving
    assert not static.moving
    assert moving.kinds == arm.KINDS
    assert envs.make("cartpole", 2).goals is None


def test_episode_is_a_thousand_decisions(raw):
    assert raw.max_steps == 1000
    assert raw.max_steps * arm.REWARD == pytest.approx(40)


def test_it_is_drawn(raw, tmp_path):
    _, state = raw.reset(jax.random.key(0))
    frames = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], 3, 0), raw.frame(state))
    path = raw.render(frames, tmp_path / "arm")
    assert path.stat().st_size > 1000


def test_loading_it_without_warp_prints_nothing():
    load = "import sys; sys.modules['warp'] = None; import envs; envs.make('arm/reacher-moving', 1)"
    done = subprocess.run(
        [sys.executable, "-c", load],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
