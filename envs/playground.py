"""Adapter for MuJoCo Playground: DeepMind Control and the joystick tasks of humanoid robots.

Playground's own time limit, auto-reset and vmap wrappers are not used, and nothing is ever
downloaded. Its environments keep a random key in their state; here they get the key of the step,
and none is kept.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from envs import mjx, viewer
from envs.wrappers import RawEnv

try:
    from mujoco_playground import State, registry
    from mujoco_playground._src import mjx_env
except ImportError as error:
    raise ImportError(
        'playground environments need MuJoCo Playground: pip install -e ".[playground]"'
    ) from error

# Robots whose models Playground takes from MuJoCo Menagerie, by the beginning of the task's name.
MENAGERIE = {
    "Apollo": "apptronik_apollo",
    "BerkeleyHumanoid": "berkeley_humanoid",
    "G1": "unitree_g1",
    "H1": "unitree_h1",
    "Op3": "robotis_op3",
    "T1": "booster_t1",
}


class PlaygroundState(NamedTuple):
    """What a step reads: integration state, last observation and the task's own notes."""

    physics: dict
    obs: Any
    info: dict


def make(task: str, iterations: int | None = None, ls_iterations: int | None = None) -> RawEnv:
    """Build a Playground task; the critic's observation, if any, follows the policy's."""
    _require_assets(task)
    env = registry.load(task, config_overrides={"impl": "jax"})
    env._mjx_model = mjx.set_solver(env.mjx_model, iterations, ls_iterations)
    return adapt(task, env, env._config.episode_length)


def adapt(task: str, env, max_steps: int) -> RawEnv:
    """RawEnv of a Playground object."""
    sizes = jax.eval_shape(env.reset, jax.random.key(0))

    def flat(obs):
        if not isinstance(obs, dict):
            return obs
        return jnp.concatenate([obs["state"], obs.get("privileged_state", obs["state"][:0])])

    obs_size = jax.eval_shape(flat, sizes.obs).shape[0]
    privileged_size = obs_size - sizes.obs["state"].shape[0] if isinstance(sizes.obs, dict) else 0

    def pack(state):
        info = {field: value for field, value in state.info.items() if field != "rng"}
        return PlaygroundState(mjx.pack(state.data), state.obs, info)

    def reset(key):
        state = env.reset(key)
        return flat(state.obs), pack(state)

    def step(key, state, action):
        data = mjx.unpack(state.physics, sizes.data)
        zero = jnp.zeros(())
        # metrics are written by step and never read, so an empty dict will do
        state = State(data, state.obs, zero, zero, metrics={}, info={**state.info, "rng": key})
        state = env.step(state, jnp.clip(action, -1.0, 1.0))
        info = {"env_nan": ~mjx.all_finite((state.data.qpos, state.data.qvel))}
        return flat(state.obs), pack(state), state.reward, state.done > 0.5, info

    return RawEnv(
        name=f"playground/{task}",
        reset=reset,
        step=step,
        obs_size=obs_size,
        obs_shape=(obs_size,),
        action_size=env.action_size,
        discrete=False,
        max_steps=max_steps,
        reset_mode="refreshed",
        privileged_size=privileged_size,
        frame=lambda state: viewer.frame(state.physics),
        render=lambda frames, path: viewer.render(
            env.mj_model, frames, path, float(env.dt), gif=True
        ),
    )


def _require_assets(task: str):
    """Refuse a task whose robot model is not on disk: Playground would start to download it."""
    robot = next((folder for start, folder in MENAGERIE.items() if task.startswith(start)), None)
    if robot is None or (mjx_env.MENAGERIE_PATH / robot).exists():
        return
    raise ValueError(
        f"playground/{task} needs the model {robot!r} of MuJoCo Menagerie, which is not "
        "installed and is not downloaded for you: put a checkout of "
        "https://github.com/google-deepmind/mujoco_menagerie at commit "
        f"{mjx_env.MENAGERIE_COMMIT_SHA} in {mjx_env.MENAGERIE_PATH}"
    )
