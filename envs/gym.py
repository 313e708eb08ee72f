"""Gymnasium's MuJoCo tasks, version 5, on MuJoCo's C engine or MJX.

Models are the XML files of the installed gymnasium; its environments are not used. Arguments of
Gymnasium's environments are options of the name: gym/Hopper-v5?ctrl_cost_weight=0.01. A task is a
rule (see envs/engines.py) and a distribution of start states. On C the numbers are Gymnasium's. On
MJX, Humanoid and HumanoidStandup run with Newton's solver, because MJX has no PGS, and friction of
capsules on the floor points in other directions, which changes Ant most.

Units are MuJoCo's: m, rad, s, N, Nm. Actions in [-1, 1] are scaled to the range of the actuators.
"""

from collections.abc import Callable
from importlib.metadata import distribution
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs import engines, viewer
from envs.options import COUNT, FLAG, NUMBER, RANGE, SIZE, Kind
from envs.wrappers import RawEnv


class Outcome(NamedTuple):
    """What a step gives; after a reset only obs counts."""

    obs: Any  # [..., obs_size]
    reward: Any  # [...]
    terminated: Any  # [...] bool


class Task(NamedTuple):
    """One environment of Gymnasium."""

    xml: str
    rule: Callable  # xp, data, memory [..., 1] (the last x, if the reward has a speed), options
    start: Callable  # key, qpos0, nv, options -> qpos, qvel
    reads: tuple[str, ...]  # derived fields of MjData
    options: dict[str, Any]  # Gymnasium's arguments and their defaults
    max_steps: int = 1000


def make(task: str, engine: str | None = None, **changes: Any) -> RawEnv:
    """Build a task such as "Ant-v5"; changes: options that are not the defaults."""
    if task not in TASKS:
        raise ValueError(f"gym has no {task!r}: choose from {', '.join(TASKS)}")
    spec = TASKS[task]
    for x in changes.keys() - spec.options.keys():
        raise ValueError(f"gym/{task} has no option {x!r}: choose from {', '.join(spec.options)}")
    path = distribution("gymnasium").locate_file(f"gymnasium/envs/mujoco/assets/{spec.xml}")
    try:
        model = mujoco.MjModel.from_xml_path(str(path))
    except ValueError as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"gym/{task}: MuJoCo refuses {path} ({problem}): reinstall gymnasium"
        ) from None
    options = SimpleNamespace(**spec.options | changes)
    options.timestep = model.opt.timestep
    options.dt = model.opt.timestep * options.frame_skip
    options.body_mass = model.body_mass
    physics = engines.Physics(
        name=f"gym/{task}",
        model=model,
        frame_skip=options.frame_skip,
        reads=spec.reads,
        rule=lambda xp, data, memory: spec.rule(xp, data, memory, options),
        memory_size=1,
    )
    simulation = engines.make(engine, physics)
    low, high = model.actuator_ctrlrange.T.astype(np.float32)

    def reset(key):
        state, outcome = simulation.reset(*spec.start(key, model.qpos0, model.nv, options))
        return outcome.obs, state

    def step(key, state, action):
        ctrl = (low + high) / 2 + (high - low) / 2 * action
        state, outcome, unstable = simulation.step(state, ctrl)
        return outcome.obs, state, outcome.reward, outcome.terminated, {"env_nan": unstable}

    obs_size = jax.eval_shape(reset, jax.random.key(0))[0].shape[0]
    return RawEnv(
        reset=reset,
        step=step,
        obs_size=obs_size,
        obs_shape=(obs_size,),
        action_size=model.nu,
        discrete=False,
        max_steps=spec.max_steps,
        reset_mode="refreshed",
        frame=simulation.frame,
        render=lambda frames, path: viewer.render(
            model, simulation.poses(frames), path, options.dt, gif=False
        ),
        action_range=model.actuator_ctrlrange.T,
    )


# --- options ---

SIGNED = ("forward_reward_weight", "healthy_reward")  # may be negative; other weights are of costs


def kinds(task: str) -> dict[str, Kind]:
    """What the options of a task may be."""

    def kind(option, default):
        if isinstance(default, tuple):
            return RANGE
        if isinstance(default, bool):
            return FLAG
        if isinstance(default, int):
            return COUNT
        return NUMBER if option in SIGNED else SIZE

    defaults = TASKS[task].options
    return {option: kind(option, x)._replace(default=x) for option, x in defaults.items()}


# --- start states ---


def uniform(key, qpos0, nv, o):
    """Positions and velocities uniformly around the model's pose at rest."""
    noise = o.reset_noise_scale * jax.random.uniform(key, (len(qpos0) + nv,), minval=-1.0)
    return qpos0 + noise[: len(qpos0)], noise[len(qpos0) :]


def uniform_normal(key, qpos0, nv, o):
    """Positions uniform, velocities normal."""
    key_position, key_velocity = jax.random.split(key)
    qpos, _ = uniform(key_position, qpos0, nv, o)
    return qpos, o.reset_noise_scale * jax.random.normal(key_velocity, (nv,))


def reacher_start(key, qpos0, nv, o):
    """The arm near zero, the target uniform in a disc of radius 0.2, at rest."""
    keys = jax.random.split(key, 4)
    arm = qpos0[:2] + jax.random.uniform(keys[0], (2,), minval=-0.1, maxval=0.1)
    radius = 0.2 * jnp.sqrt(jax.random.uniform(keys[1]))
    angle = jax.random.uniform(keys[2], maxval=2 * jnp.pi)
    target = radius * jnp.array([jnp.cos(angle), jnp.sin(angle)])
    speed = jax.random.uniform(keys[3], (2,), minval=-0.005, maxval=0.005)
    return jnp.concatenate([arm, target]), jnp.concatenate([speed, jnp.zeros(2)])


def pusher_start(key, qpos0, nv, o):
    """The object uniform in a rectangle, but farther than 0.17 from the goal; both at rest.

    The first of 64 draws that is far enough; the probability that none is: 1e-27.
    """
    key_object, key_speed = jax.random.split(key)
    low, high = jnp.array([-0.3, -0.2]), jnp.array([0.0, 0.2])
    places = jax.random.uniform(key_object, (64, 2), minval=low, maxval=high)
    place = places[jnp.argmax(jnp.linalg.norm(places, axis=1) > 0.17)]
    speed = jax.random.uniform(key_speed, (nv - 4,), minval=-0.005, maxval=0.005)
    qpos = jnp.concatenate([qpos0[:-4], place, jnp.zeros(2)])
    return qpos, jnp.concatenate([speed, jnp.zeros(4)])


# --- rules: xp, data, memory, options -> memory, Outcome ---


def ant(xp, data, memory, o):
    """Walk along x. Observation [105]: positions without x and y, velocities, contact forces."""
    x, z = data.xpos[..., 1, 0], data.qpos[..., 2]
    forces = xp.clip(data.cfrc_ext, *o.contact_force_range)
    finite = xp.all(xp.isfinite(data.qpos), -1) & xp.all(xp.isfinite(data.qvel), -1)
    healthy = finite & (o.healthy_z_range[0] <= z) & (z <= o.healthy_z_range[1])
    parts = [positions(data, 2, o), data.qvel]
    if o.include_cfrc_ext_in_observation:
        parts.append(flat(forces[..., 1:, :]))
    reward = (
        o.forward_reward_weight * (x - memory[..., 0]) / o.dt
        + o.healthy_reward * healthy
        - o.ctrl_cost_weight * squares(xp, data.ctrl)
        - o.contact_cost_weight * squares(xp, flat(forces))
    )
    terminated = ~healthy & o.terminate_when_unhealthy
    return x[..., None], Outcome(xp.concatenate(parts, -1), reward, terminated)


def half_cheetah(xp, data, memory, o):
    """Run along x. Observation [17]: positions without x, velocities."""
    return move(xp, data, memory, 1, o)


def swimmer(xp, data, memory, o):
    """Swim along x. Observation [8]: positions without x and y, velocities."""
    return move(xp, data, memory, 2, o)


def move(xp, data, memory, hidden, o):
    """What half_cheetah and swimmer share: no pose ends an episode."""
    x = data.qpos[..., 0]
    obs = xp.concatenate([positions(data, hidden, o), data.qvel], -1)
    forward = o.forward_reward_weight * (x - memory[..., 0]) / o.dt
    reward = forward - o.ctrl_cost_weight * squares(xp, data.ctrl)
    return x[..., None], Outcome(obs, reward, xp.zeros(x.shape, bool))


def hopper(xp, data, memory, o):
    """Hop along x. Observation [11]: positions without x, velocities clipped to 10."""
    x, z, angle = data.qpos[..., 0], data.qpos[..., 1], data.qpos[..., 2]
    others = xp.concatenate([data.qpos[..., 2:], data.qvel], -1)
    healthy = xp.all(within(others, o.healthy_state_range), -1)
    healthy = healthy & within(z, o.healthy_z_range) & within(angle, o.healthy_angle_range)
    return walk(xp, data, memory, x, healthy, o)


def walker2d(xp, data, memory, o):
    """Walk along x. Observation [17]: positions without x, velocities clipped to 10."""
    x, z, angle = data.qpos[..., 0], data.qpos[..., 1], data.qpos[..., 2]
    healthy = within(z, o.healthy_z_range) & within(angle, o.healthy_angle_range)
    return walk(xp, data, memory, x, healthy, o)


def walk(xp, data, memory, x, healthy, o):
    """What hopper and walker2d share."""
    obs = xp.concatenate([positions(data, 1, o), xp.clip(data.qvel, -10.0, 10.0)], -1)
    reward = (
        o.forward_reward_weight * (x - memory[..., 0]) / o.dt
        + o.healthy_reward * healthy
        - o.ctrl_cost_weight * squares(xp, data.ctrl)
    )
    return x[..., None], Outcome(obs, reward, ~healthy & o.terminate_when_unhealthy)


def humanoid(xp, data, memory, o):
    """Walk along x. Observation [348]: see humanoid_obs."""
    x = xp.sum(o.body_mass * data.xipos[..., 0], -1) / o.body_mass.sum()  # of the centre of mass
    healthy = within(data.qpos[..., 2], o.healthy_z_range)
    contact_cost = o.contact_cost_weight * squares(xp, flat(data.cfrc_ext))
    reward = (
        o.forward_reward_weight * (x - memory[..., 0]) / o.dt
        + o.healthy_reward * healthy
        - o.ctrl_cost_weight * squares(xp, data.ctrl)
        - xp.clip(contact_cost, *o.contact_cost_range)
    )
    terminated = ~healthy & o.terminate_when_unhealthy
    return x[..., None], Outcome(humanoid_obs(xp, data, o), reward, terminated)


def humanoid_standup(xp, data, memory, o):
    """Stand up from lying: height over the time of a physics step. Observation: humanoid_obs."""
    z = data.qpos[..., 2]
    impact_cost = o.impact_cost_weight * squares(xp, flat(data.cfrc_ext))
    reward = (
        z / o.timestep
        + 1.0
        - o.ctrl_cost_weight * squares(xp, data.ctrl)
        - xp.clip(impact_cost, *o.impact_cost_range)
    )
    return memory, Outcome(humanoid_obs(xp, data, o), reward, xp.zeros(z.shape, bool))


def humanoid_obs(xp, data, o):
    """Positions without x and y, velocities, then inertias, velocities, and forces of bodies."""
    parts = [positions(data, 2, o), data.qvel]
    if o.include_cinert_in_observation:
        parts.append(flat(data.cinert[..., 1:, :]))
    if o.include_cvel_in_observation:
        parts.append(flat(data.cvel[..., 1:, :]))
    if o.include_qfrc_actuator_in_observation:
        parts.append(data.qfrc_actuator[..., 6:])
    if o.include_cfrc_ext_in_observation:
        parts.append(flat(data.cfrc_ext[..., 1:, :]))
    return xp.concatenate(parts, -1)


def reacher(xp, data, memory, o):
    """Touch a target with two links. Observation [10].

    Cosines and sines of the joints, target, speeds of the joints, x and y from target to fingertip.
    """
    joints, target = data.qpos[..., :2], data.qpos[..., 2:]
    fingertip, goal = data.xpos[..., 3, :], data.xpos[..., 4, :]
    offset = fingertip - goal
    parts = [xp.cos(joints), xp.sin(joints), target, data.qvel[..., :2], offset[..., :2]]
    reward = -o.reward_dist_weight * distance(xp, offset)
    reward = reward - o.reward_control_weight * squares(xp, data.ctrl)
    return memory, Outcome(xp.concatenate(parts, -1), reward, xp.zeros(reward.shape, bool))


def pusher(xp, data, memory, o):
    """Push an object to a goal with an arm of seven joints. Observation [23].

    Joints and their speeds, then the places of fingertip, object and goal.
    """
    tip, target, goal = (data.xpos[..., body, :] for body in (10, 11, 12))
    obs = xp.concatenate([data.qpos[..., :7], data.qvel[..., :7], tip, target, goal], -1)
    reward = (
        -o.reward_near_weight * distance(xp, target - tip)
        - o.reward_dist_weight * distance(xp, target - goal)
        - o.reward_control_weight * squares(xp, data.ctrl)
    )
    return memory, Outcome(obs, reward, xp.zeros(reward.shape, bool))


def inverted_pendulum(xp, data, memory, o):
    """Hold a pole upright on a cart. Observation [4]: positions, velocities."""
    obs = xp.concatenate([data.qpos, data.qvel], -1)
    terminated = ~xp.all(xp.isfinite(obs), -1) | (xp.abs(data.qpos[..., 1]) > 0.2)
    return memory, Outcome(obs, 1.0 - terminated, terminated)


def inverted_double_pendulum(xp, data, memory, o):
    """Hold two poles upright on a cart. Observation [9].

    Cart, sines and cosines of the hinges, velocities and the force of the cart's limit, clipped.
    """
    x, height = data.site_xpos[..., 0, 0], data.site_xpos[..., 0, 2]  # of the tip
    hinges, velocities = data.qpos[..., 1:], data.qvel
    limit = data.qfrc_constraint[..., :1]
    parts = [data.qpos[..., :1], xp.sin(hinges), xp.cos(hinges)]
    parts += [xp.clip(velocities, -10.0, 10.0), xp.clip(limit, -10.0, 10.0)]
    terminated = height <= 1.0
    reward = (
        o.healthy_reward * ~terminated
        - 0.01 * x**2
        - (height - 2.0) ** 2
        - 0.001 * velocities[..., 1] ** 2
        - 0.005 * velocities[..., 2] ** 2
    )
    return memory, Outcome(xp.concatenate(parts, -1), reward, terminated)


def positions(data, hidden, o):
    """Generalised positions, without the first `hidden` if the option says so."""
    return data.qpos[..., hidden * o.exclude_current_positions_from_observation :]


def flat(matrix):
    """[..., n, m] as [..., n * m]."""
    return matrix.reshape(*matrix.shape[:-2], -1)


def squares(xp, vector):
    """Sum of squares over the last axis."""
    return xp.sum(xp.square(vector), -1)


def distance(xp, vector):
    """Length along the last axis."""
    return xp.sqrt(squares(xp, vector))


def within(value, interval):
    """Whether low < value < high."""
    return (interval[0] < value) & (value < interval[1])


# --- tasks: their names are also in envs.TASKS ---

INFINITY = float("inf")
MOVING = {
    "forward_reward_weight": 1.0,
    "reset_noise_scale": 0.1,
    "exclude_current_positions_from_observation": True,
}
WALKING = MOVING | {
    "frame_skip": 4,
    "ctrl_cost_weight": 1e-3,
    "healthy_reward": 1.0,
    "terminate_when_unhealthy": True,
    "reset_noise_scale": 5e-3,
}
HUMANOID = {
    "frame_skip": 5,
    "ctrl_cost_weight": 0.1,
    "reset_noise_scale": 1e-2,
    "exclude_current_positions_from_observation": True,
    "include_cinert_in_observation": True,
    "include_cvel_in_observation": True,
    "include_qfrc_actuator_in_observation": True,
    "include_cfrc_ext_in_observation": True,
}

TASKS = {
    "Ant-v5": Task(
        xml="ant.xml",
        rule=ant,
        start=uniform_normal,
        reads=("xpos", "cfrc_ext"),
        options=MOVING
        | {
            "frame_skip": 5,
            "ctrl_cost_weight": 0.5,
            "contact_cost_weight": 5e-4,
            "contact_force_range": (-1.0, 1.0),
            "healthy_reward": 1.0,
            "healthy_z_range": (0.2, 1.0),
            "terminate_when_unhealthy": True,
            "include_cfrc_ext_in_observation": True,
        },
    ),
    "HalfCheetah-v5": Task(
        xml="half_cheetah.xml",
        rule=half_cheetah,
        start=uniform_normal,
        reads=(),
        options=MOVING | {"frame_skip": 5, "ctrl_cost_weight": 0.1},
    ),
    "Hopper-v5": Task(
        xml="hopper.xml",
        rule=hopper,
        start=uniform,
        reads=(),
        options=WALKING
        | {
            "healthy_state_range": (-100.0, 100.0),
            "healthy_z_range": (0.7, INFINITY),
            "healthy_angle_range": (-0.2, 0.2),
        },
    ),
    "Walker2d-v5": Task(
        xml="walker2d_v5.xml",
        rule=walker2d,
        start=uniform,
        reads=(),
        options=WALKING | {"healthy_z_range": (0.8, 2.0), "healthy_angle_range": (-1.0, 1.0)},
    ),
    "Humanoid-v5": Task(
        xml="humanoid.xml",
        rule=humanoid,
        start=uniform,
        reads=("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
        options=HUMANOID
        | {
            "forward_reward_weight": 1.25,
            "contact_cost_weight": 5e-7,
            "contact_cost_range": (-INFINITY, 10.0),
            "healthy_reward": 5.0,
            "healthy_z_range": (1.0, 2.0),
            "terminate_when_unhealthy": True,
        },
    ),
    "HumanoidStandup-v5": Task(
        xml="humanoidstandup.xml",
        rule=humanoid_standup,
        start=uniform,
        reads=("cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
        options=HUMANOID | {"impact_cost_weight": 5e-7, "impact_cost_range": (-INFINITY, 10.0)},
    ),
    "Swimmer-v5": Task(
        xml="swimmer.xml",
        rule=swimmer,
        start=uniform,
        reads=(),
        options=MOVING | {"frame_skip": 4, "ctrl_cost_weight": 1e-4},
    ),
    "Reacher-v5": Task(
        xml="reacher.xml",
        rule=reacher,
        start=reacher_start,
        reads=("xpos",),
        options={"frame_skip": 2, "reward_dist_weight": 1.0, "reward_control_weight": 1.0},
        max_steps=50,
    ),
    "Pusher-v5": Task(
        xml="pusher_v5.xml",
        rule=pusher,
        start=pusher_start,
        reads=("xpos",),
        options={
            "frame_skip": 5,
            "reward_near_weight": 0.5,
            "reward_dist_weight": 1.0,
            "reward_control_weight": 0.1,
        },
        max_steps=100,
    ),
    "InvertedPendulum-v5": Task(
        xml="inverted_pendulum.xml",
        rule=inverted_pendulum,
        start=uniform,
        reads=(),
        options={"frame_skip": 2, "reset_noise_scale": 0.01},
    ),
    "InvertedDoublePendulum-v5": Task(
        xml="inverted_double_pendulum.xml",
        rule=inverted_double_pendulum,
        start=uniform_normal,
        reads=("site_xpos", "qfrc_constraint"),
        options={"frame_skip": 5, "healthy_reward": 10.0, "reset_noise_scale": 0.1},
    ),
}
