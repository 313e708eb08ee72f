"""The two-link arm with four torques that has to touch a target, moving or not.

After Unity's Reacher: two capsules hang from a pivot; torques about x and z act on each of them
from outside, so that one link's torque has no reaction on the other; the target goes round a
circle, at a speed that is drawn for each episode and shown. Units are those of the original: it
pays 0.04 per decision of 0.08 s while the hand touches the target, 40 in 1000 decisions.

Observation [33]: link A (position and orientation of its centre, angular and linear velocity, in
the world's axes), link B likewise, target, hand, speed of the target.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco

from envs import engines, viewer
from envs.wrappers import Goals, RawEnv

MODEL = """
<mujoco>
  <option timestep="0.02" gravity="0 -9.81 0" integrator="Euler"><flag contact="disable"/></option>
  <statistic center="0 -6 0" extent="16"/>
  <asset>
    <texture type="skybox" builtin="gradient" rgb1="1 1 1" rgb2="1 1 1" width="16" height="16"/>
  </asset>
  <worldbody>
    <light pos="10 20 20" dir="-0.4 -0.7 -0.6"/>
    <camera pos="0 0 37" xyaxes="1 0 0 0 1 0"/>
    <geom type="sphere" size="0.6" rgba="0.4 0.4 0.4 1"/>
    <body>
      <joint axis="1 0 0" damping="0.05"/>
      <joint axis="0 0 1" damping="0.05"/>
      <geom type="capsule" fromto="0 -1.5 0 0 -6.5 0" size="0.5" mass="1" rgba="0.3 0.5 0.7 1"/>
      <body pos="0 -7 0">
        <joint axis="1 0 0" damping="0.05"/>
        <joint axis="0 0 1" damping="0.05"/>
        <geom type="capsule" fromto="0 -0.5 0 0 -5.5 0" size="0.5" mass="0.515"
              rgba="0.3 0.5 0.7 1"/>
        <geom type="sphere" pos="0 -6 0" size="1" mass="0.485" rgba="0.2 0.3 0.5 1"/>
      </body>
    </body>
    <body mocap="true" pos="0 -1 8">
      <geom type="sphere" size="2.5" rgba="0.9 0.5 0.2 0.5"/>
    </body>
  </worldbody>
</mujoco>
"""
CENTRE_A, ELBOW = jnp.array([0.0, -4.0, 0.0]), jnp.array([0.0, -7.0, 0.0])  # in link A's axes
CENTRE_B, HAND = jnp.array([0.0, -3.0, 0.0]), jnp.array([0.0, -6.0, 0.0])  # from the elbow
SUBSTEPS = 4  # physics steps of a decision
TORQUE = 150.0  # of an action of 1
MAX_SPEED = 7.0  # of a joint, rad/s
RADIUS, HEIGHT = 8.0, -1.0  # of the target's circle
TOUCH = 3.5  # distance from hand to target below which they touch
REWARD = 0.04  # per decision
MAX_STEPS = 1000
# The shaped reward looks at the centre of link B on each axis: far, near, and too near.
CLOSE, SHAPED = 1.15, 0.01

KINDS = ("env", "proxy", "proxy_sum", "sparse")


class ArmState(NamedTuple):
    """What a step reads."""

    rest: Any  # the engine's state of an arm at rest, into which a step writes qpos and qvel
    qpos: jax.Array  # [4] rad
    qvel: jax.Array  # [4] rad/s
    angle: jax.Array  # [] of the target, degrees
    speed: jax.Array  # [] of the target, degrees per physics step


def make(task: str, engine: str | None = None) -> RawEnv:
    """Build "reacher-moving", or "reacher-static" whose target stays where it is."""
    moving = {"reacher-moving": True, "reacher-static": False}[task]
    model = mujoco.MjModel.from_xml_string(MODEL)
    physics = engines.Physics(
        name=f"arm/{task}",
        model=model,
        frame_skip=1,
        reads=(),
        rule=lambda xp, data, memory: (memory, (data.qpos, data.qvel)),
        memory_size=0,
        inputs=("qpos", "qvel", "xfrc_applied"),
    )
    simulation = engines.make(engine, physics)

    def reset(key):
        key_angle, key_speed = jax.random.split(key)
        angle = jax.random.randint(key_angle, (), 0, 360).astype(jnp.float32)
        speed = (
            jax.random.uniform(key_speed, minval=-1.0, maxval=1.0)
            if moving
            else jnp.zeros_like(angle)
        )
        rest, (qpos, qvel) = simulation.reset(jnp.zeros(4), jnp.zeros(4))
        state = ArmState(rest, qpos, qvel, angle, speed)
        return observe(state), state

    def step(key, state, action):
        torque = TORQUE * action.reshape(2, 2)
        force = jnp.zeros((model.nbody, 6)).at[1:3, jnp.array([3, 5])].set(torque)

        def substep(now, _):
            _, (qpos, qvel), unstable = simulation.step(state.rest, *now, force)
            return (qpos, jnp.clip(qvel, -MAX_SPEED, MAX_SPEED)), unstable

        now, unstable = jax.lax.scan(substep, (state.qpos, state.qvel), length=SUBSTEPS)
        angle = (state.angle + SUBSTEPS * state.speed) % 360.0
        state = ArmState(state.rest, *now, angle, state.speed)
        obs = observe(state)
        reward = compute_reward(achieved_goal(obs), desired_goal(obs), "env")[0]
        return obs, state, reward, jnp.bool_(False), {"env_nan": unstable.any()}

    def frame(state):
        quaternion = jnp.array([[1.0, 0.0, 0.0, 0.0]])
        target = target_position(state.angle)[None]
        return {"qpos": state.qpos, "mocap_pos": target, "mocap_quat": quaternion}

    return RawEnv(
        reset=reset,
        step=step,
        obs_size=33,
        obs_shape=(33,),
        action_size=4,
        discrete=False,
        max_steps=MAX_STEPS,
        reset_mode="fresh",
        frame=frame,
        render=lambda frames, path: viewer.render(model, frames, path, 0.08, gif=True),
        goals=Goals(achieved_goal, desired_goal, with_goal, compute_reward, KINDS, moving),
    )


# --- goals ---


def achieved_goal(obs):
    """Hand and centre of link B [..., 6] in an observation [..., 33]."""
    return jnp.concatenate([obs[..., 29:32], obs[..., 13:16]], -1)


def desired_goal(obs):
    """Target [..., 3] in an observation [..., 33]."""
    return obs[..., 26:29]


def with_goal(obs, goal):
    """The observation [..., 33] with another target."""
    return obs.at[..., 26:29].set(goal)


def compute_reward(achieved, goal, kind):
    """Rewards [..., m] of being at `achieved` [..., 6] with the target at `goal` [..., 3].

    "env": what the task pays, m = 1. "sparse": 0 where the hand touches, else -1, m = 1. "proxy":
    for each axis whether link B is far, near and too near, m = 9; "proxy_sum": their sum, m = 1.
    """
    touching = jnp.linalg.norm(achieved[..., :3] - goal, axis=-1, keepdims=True) < TOUCH
    if kind == "env":
        return REWARD * touching
    if kind == "sparse":
        return touching - 1.0
    distance = jnp.abs(achieved[..., 3:] - goal)
    heads = [-SHAPED * (distance > 5 * CLOSE), SHAPED * (distance < 3 * CLOSE)]
    heads = jnp.concatenate([*heads, -SHAPED * (distance < CLOSE)], -1)
    return heads if kind == "proxy" else heads.sum(-1, keepdims=True)


def target_position(angle):
    """Where the target is [..., 3] at an angle [...] in degrees."""
    radians = angle * (math.pi / 180.0)
    return jnp.stack(
        [RADIUS * jnp.sin(radians), jnp.full_like(radians, HEIGHT), RADIUS * jnp.cos(radians)], -1
    )


# --- kinematics: what MuJoCo would compute at the end of a step ---


def observe(state):
    """Observation [33] of a state."""
    (x_a, z_a, x_b, z_b), (dx_a, dz_a, dx_b, dz_b) = state.qpos, state.qvel
    first_a, first_b = about_x(x_a), about_x(x_b)
    quat_a = product(first_a, about_z(z_a))
    quat_b = product(quat_a, product(first_b, about_z(z_b)))
    axis_x, axis_z = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 1.0])
    spin_a = dx_a * axis_x + dz_a * rotate(first_a, axis_z)
    spin_b = spin_a + rotate(quat_a, dx_b * axis_x + dz_b * rotate(first_b, axis_z))
    centre_a, elbow = rotate(quat_a, CENTRE_A), rotate(quat_a, ELBOW)
    centre_b, hand = rotate(quat_b, CENTRE_B), rotate(quat_b, HAND)
    velocity_b = jnp.cross(spin_a, elbow) + jnp.cross(spin_b, centre_b)
    link_a = [centre_a, positive(quat_a), spin_a, jnp.cross(spin_a, centre_a)]
    link_b = [elbow + centre_b, positive(quat_b), spin_b, velocity_b]
    target = [target_position(state.angle), elbow + hand, state.speed[None]]
    return jnp.concatenate([*link_a, *link_b, *target])


def about_x(angle):
    """Quaternion [4] of a turn about x."""
    zero = jnp.zeros_like(angle)
    return jnp.stack([jnp.cos(angle / 2), jnp.sin(angle / 2), zero, zero])


def about_z(angle):
    """Quaternion [4] of a turn about z."""
    zero = jnp.zeros_like(angle)
    return jnp.stack([jnp.cos(angle / 2), zero, zero, jnp.sin(angle / 2)])


def product(p, q):
    """Product [4] of two quaternions: first q, then p."""
    scalar = p[0] * q[0] - p[1:] @ q[1:]
    return jnp.append(scalar, p[0] * q[1:] + q[0] * p[1:] + jnp.cross(p[1:], q[1:]))


def rotate(q, vector):
    """`vector` [3] turned by a unit quaternion."""
    twice = 2.0 * jnp.cross(q[1:], vector)
    return vector + q[0] * twice + jnp.cross(q[1:], twice)


def positive(q):
    """The same orientation, with w >= 0."""
    return jnp.where(q[0] < 0.0, -q, q)
