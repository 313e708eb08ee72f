"""Adapter for Brax's environments on its four physics backends; no other file imports brax.

Brax's own time limit, auto-reset and vmap wrappers are not used. Its mjx backend is replaced by an
engine of ours (envs/engines.py), and the line search of MuJoCo's solver is capped per model, see
LS_ITERATIONS.
"""

import copy
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco

from envs import engines, viewer
from envs.wrappers import RawEnv

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Brax System, piplines", category=UserWarning)
    from brax import envs as brax_envs
    from brax import fluid
    from brax.base import Motion, Transform


class _OldNumpy:
    """jax.numpy with clip's old argument names, for brax.fluid, which only swimmer uses."""

    def __getattr__(self, name):
        return getattr(jnp, name)

    def clip(self, x, a_min=None, a_max=None):
        return jnp.clip(x, a_min, a_max)


fluid.jp = _OldNumpy()

MAX_STEPS = 1000  # Brax's default episode_length; its environments hold no limit of their own

# MJX runs the line search for its full count whether or not it has converged, and Brax leaves
# MuJoCo's 50 in most models. These caps give nearly the same trajectories (docs/environments.md has
# the agreement). C stops when it has converged: it keeps the model's own number.
LS_ITERATIONS = {
    "halfcheetah": 4,
    "hopper": 4,
    "humanoidstandup": 4,
    "inverted_double_pendulum": 4,
    "inverted_pendulum": 4,
    "pusher": 4,
    "reacher": 4,
    "walker2d": 4,
}


# Options of MuJoCo's solver that some tasks change after they load their model.
SOLVER = ("solver", "iterations", "ls_iterations", "disableflags")


class Pipeline(NamedTuple):
    """Backend mjx: the engine's state, and what Brax's tasks read of a pipeline state."""

    simulation: Any
    q: jax.Array  # generalised positions
    qd: jax.Array  # generalised velocities
    x: Transform  # of bodies, in the world
    xd: Motion  # of bodies, in the world
    unstable: Any  # [] bool


class BraxState(NamedTuple):
    """What a step reads."""

    pipeline: Any
    info: dict


def make(
    task: str,
    backend: str,
    engine: str | None = None,
    iterations: int | None = None,
    ls_iterations: int | None = None,
) -> RawEnv:
    """Build a Brax task; engine and the solver options are for backend mjx only."""
    if backend != "mjx" and (engine or iterations or ls_iterations):
        raise ValueError(
            f"brax/{task}?backend={backend}: engine, iterations and ls_iterations need "
            "backend=mjx: leave them out, or change the backend"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Brax System, piplines", category=UserWarning)
        env = brax_envs.get_environment(task, backend=backend)
    frame, poses = lambda pipeline: {"qpos": pipeline.q}, lambda frames: frames
    if backend == "mjx":
        model = copy.copy(env.sys.mj_model)
        for option in SOLVER:
            setattr(model.opt, option, int(getattr(env.sys.opt, option)))
        model.opt.iterations = iterations or model.opt.iterations
        own = model.opt.ls_iterations
        cap = own if engines.chosen(engine) == "c" else LS_ITERATIONS.get(task, own)
        model.opt.ls_iterations = ls_iterations or cap
        simulation = engines.make(engine, physics_of(task, model, env._n_frames))
        replace_pipeline(env, model, simulation)
        frame, poses = lambda pipeline: simulation.frame(pipeline.simulation), simulation.poses
    sizes = jax.eval_shape(env.reset, jax.random.key(0))

    def reset(key):
        state = env.reset(key)
        return state.obs, BraxState(state.pipeline_state, state.info)

    def step(key, state, action):
        zero = jnp.zeros(())
        # metrics are written and never read, so an empty dict will do; step may write into info
        before = brax_envs.State(state.pipeline, None, zero, zero, metrics={}, info={**state.info})
        after = env.step(before, action)
        pipeline = after.pipeline_state
        if backend == "mjx":
            unstable = pipeline.unstable
        else:
            unstable = ~engines.bounded((pipeline.q, pipeline.qd))
        state = BraxState(pipeline, after.info)
        return after.obs, state, after.reward, after.done > 0.5, {"env_nan": unstable}

    return RawEnv(
        reset=reset,
        step=step,
        obs_size=sizes.obs.shape[0],
        obs_shape=sizes.obs.shape,
        action_size=env.action_size,
        discrete=False,
        max_steps=MAX_STEPS,
        reset_mode="refreshed",
        frame=lambda state: frame(state.pipeline),
        render=lambda frames, path: viewer.render(
            env.sys.mj_model, poses(frames), path, float(env.dt), gif=False
        ),
    )


def physics_of(task: str, model, frame_skip: int) -> engines.Physics:
    """The simulation of a task, whose outputs are the fields of a Pipeline."""
    root = model.body_rootid[1:]

    def rule(xp, data, memory):
        # MuJoCo's velocities are those at the centre of mass of the whole tree
        offset = data.xpos[..., 1:, :] - data.subtree_com[..., root, :]
        angular = data.cvel[..., 1:, :3]
        linear = data.cvel[..., 1:, 3:] - xp.cross(offset, angular)
        x = Transform(pos=data.xpos[..., 1:, :], rot=data.xquat[..., 1:, :])
        return memory, (data.qpos, data.qvel, x, Motion(vel=linear, ang=angular))

    reads = ("xpos", "xquat", "cvel", "subtree_com")
    return engines.Physics(f"brax/{task}", model, frame_skip, reads, rule, memory_size=0)


def replace_pipeline(env, model, simulation: engines.Engine):
    """Let a Brax environment simulate with an engine."""
    free = model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]

    def pipeline_init(q, qd):
        for quaternion in (slice(start + 3, start + 7) for start in free):
            # MJX's forward does so, and tasks observe it
            q = q.at[quaternion].divide(jnp.linalg.norm(q[quaternion]))
        state, outputs = simulation.reset(q, qd)
        return Pipeline(state, *outputs, unstable=False)

    def pipeline_step(pipeline, ctrl):
        state, outputs, unstable = simulation.step(pipeline.simulation, ctrl)
        return Pipeline(state, *outputs, unstable)

    env.pipeline_init, env.pipeline_step = pipeline_init, pipeline_step
