"""Adapter for Brax's environments on its four physics backends; no other file imports brax.

Brax's own time limit, auto-reset and vmap wrappers are not used. On the mjx backend the line search
of MuJoCo's solver is capped per model, see LS_ITERATIONS.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from envs import mjx, viewer
from envs.wrappers import RawEnv

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Brax System, piplines", category=UserWarning)
    from brax import envs as brax_envs
    from brax import fluid


class _OldNumpy:
    """jax.numpy with clip's old argument names, for brax.fluid, which only swimmer uses."""

    def __getattr__(self, name):
        return getattr(jnp, name)

    def clip(self, x, a_min=None, a_max=None):
        return jnp.clip(x, a_min, a_max)


fluid.jp = _OldNumpy()

MAX_STEPS = 1000  # Brax's default episode_length; its environments hold no limit of their own

# What tasks read of the state before they step, beside MuJoCo's integration state.
READ = ("q", "qd", "x", "xd")

# MJX runs the line search for its full count whether or not it has converged, and Brax leaves
# MuJoCo's 50 in most models. These caps give the same trajectories as the model's own settings
# (docs/environments.md has the agreement).
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


class BraxState(NamedTuple):
    """What a step reads: on mjx the integration state, else the whole pipeline state."""

    pipeline: Any
    info: dict


def make(
    task: str, backend: str, iterations: int | None = None, ls_iterations: int | None = None
) -> RawEnv:
    """Build a Brax task; the solver options are for backend mjx only."""
    if backend != "mjx" and (iterations or ls_iterations):
        raise ValueError(f"brax/{task}: iterations and ls_iterations need backend=mjx")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Brax System, piplines", category=UserWarning)
        env = brax_envs.get_environment(task, backend=backend)
    if backend == "mjx":
        env.sys = mjx.set_solver(env.sys, iterations, ls_iterations or LS_ITERATIONS.get(task))
    sizes = jax.eval_shape(env.reset, jax.random.key(0))

    def pack(state):
        pipeline = state.pipeline_state
        if backend == "mjx":
            pipeline = mjx.pack(pipeline, READ)
        return BraxState(pipeline, state.info)

    def unpack(state):
        pipeline = state.pipeline
        if backend == "mjx":
            pipeline = mjx.unpack(pipeline, sizes.pipeline_state)
        zero = jnp.zeros(())
        # metrics are written and never read, so an empty dict will do; step may write into info
        return brax_envs.State(pipeline, None, zero, zero, metrics={}, info=dict(state.info))

    def reset(key):
        state = env.reset(key)
        return state.obs, pack(state)

    def step(key, state, action):
        state = env.step(unpack(state), jnp.clip(action, -1.0, 1.0))
        physics = (state.pipeline_state.q, state.pipeline_state.qd)
        info = {"env_nan": ~mjx.all_finite(physics)}
        return state.obs, pack(state), state.reward, state.done > 0.5, info

    def frame(state):
        return viewer.frame(state.pipeline) if backend == "mjx" else {"qpos": state.pipeline.q}

    return RawEnv(
        name=f"brax/{task}",
        reset=reset,
        step=step,
        obs_size=sizes.obs.shape[0],
        obs_shape=sizes.obs.shape,
        action_size=env.action_size,
        discrete=False,
        max_steps=MAX_STEPS,
        reset_mode="refreshed",
        frame=frame,
        render=lambda frames, path: viewer.render(
            env.sys.mj_model, frames, path, float(env.dt), gif=False
        ),
    )
