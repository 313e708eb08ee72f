"""Adapter for MuJoCo Playground: DeepMind Control and the joystick tasks of humanoid robots.

Tasks are Playground's own code, on an engine of ours (envs/engines.py) in place of MJX. Its time
limit, auto-reset and vmap wrappers are not used, and nothing is ever downloaded. Its environments
keep a random key in their state; here they get the key of the step, and none is kept.
"""

import copy
import inspect
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs import engines, viewer
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


class Data(NamedTuple):
    """What a task sees of an mjx.Data: the fields that it reads, and `replace`."""

    simulation: Any  # state of the engine
    fields: dict[str, Any]  # and "unstable"

    def __getattr__(self, field):
        if field in self.fields:
            return self.fields[field]
        raise AttributeError(field)

    def replace(self, **changes):
        """With other values, some of which are inputs of the next step."""
        return self._replace(fields=self.fields | changes)


class PlaygroundState(NamedTuple):
    """What a step reads: physics, last observation and the task's own notes."""

    data: Data  # with the fields of the integration state alone
    obs: Any
    info: dict


def make(
    task: str,
    engine: str | None = None,
    iterations: int | None = None,
    ls_iterations: int | None = None,
) -> RawEnv:
    """Build a Playground task; the critic's observation, if any, follows the policy's."""
    _require_assets(task)
    env = registry.load(task, config_overrides={"impl": "jax"})
    model = copy.copy(env.mj_model)
    model.opt.iterations = iterations or model.opt.iterations
    model.opt.ls_iterations = ls_iterations or model.opt.ls_iterations
    return adapt(task, env, model, env._config.episode_length, engine)


def adapt(task: str, env, model, max_steps: int, engine: str | None = None) -> RawEnv:
    """RawEnv of a Playground object."""
    simulation, kept = replace_physics(task, env, model, engine)
    sizes = jax.eval_shape(lambda key: env.reset(key).obs, jax.random.key(0))

    def flat(obs):
        if not isinstance(obs, dict):
            return obs
        return jnp.concatenate([obs["state"], obs.get("privileged_state", obs["state"][:0])])

    obs_size = jax.eval_shape(flat, sizes).shape[0]
    privileged_size = obs_size - sizes["state"].shape[0] if isinstance(sizes, dict) else 0

    def pack(state):
        data = state.data._replace(fields={field: state.data.fields[field] for field in kept})
        info = {field: value for field, value in state.info.items() if field != "rng"}
        return PlaygroundState(data, state.obs, info)

    def reset(key):
        state = env.reset(key)
        return flat(state.obs), pack(state)

    def step(key, state, action):
        zero = jnp.zeros(())
        # metrics are written by step and never read, so an empty dict will do
        info = {**state.info, "rng": key}
        state = env.step(State(state.data, state.obs, zero, zero, metrics={}, info=info), action)
        info = {"env_nan": state.data.unstable}
        return flat(state.obs), pack(state), state.reward, state.done > 0.5, info

    def frame(state):
        # a target that the task has just placed is not in the simulation yet
        mocap = {field: state.data.fields[field] for field in MOCAP if field in kept}
        return simulation.frame(state.data.simulation), mocap

    return RawEnv(
        reset=reset,
        step=step,
        obs_size=obs_size,
        obs_shape=(obs_size,),
        action_size=env.action_size,
        discrete=False,
        max_steps=max_steps,
        reset_mode="refreshed",
        privileged_size=privileged_size,
        frame=frame,
        render=lambda frames, path: viewer.render(
            model, {**simulation.poses(frames[0]), **frames[1]}, path, float(env.dt), gif=True
        ),
    )


# --- Playground's code on an engine ---

MOCAP = ("mocap_pos", "mocap_quat")


def replace_physics(task: str, env, model, engine: str | None):
    """Let a Playground object simulate with an engine; also the fields that its states keep."""
    read, inputs = trace_fields(env)

    def rule(xp, data, memory):
        return memory, {field: like_mjx(field, getattr(data, field)) for field in read}

    physics = engines.Physics(
        name=f"playground/{task}",
        model=model,
        frame_skip=env.n_substeps,
        reads=read,
        rule=rule,
        memory_size=0,
        inputs=inputs,
    )
    simulation = engines.make(engine, physics)
    fresh = mujoco.MjData(model)
    start = {field: jnp.float32(np.array(getattr(fresh, field))) for field in read}

    def make_data(model, **given):
        return Data(None, start | only_state(given))

    def forward(model, data):
        given = [data.fields[field] for field in inputs]  # beside qpos and qvel
        state, fields = simulation.reset(data.qpos, data.qvel, *given)
        return Data(state, fields | {"unstable": jnp.bool_(False)})

    def advance(data, ctrl):
        given = [data.replace(ctrl=ctrl).fields[field] for field in inputs]
        state, fields, unstable = simulation.step(data.simulation, *given)
        return Data(state, fields | {"unstable": unstable})

    def step(model, data, ctrl, n_substeps=1):
        if n_substeps % env.n_substeps:
            raise ValueError(f"{n_substeps} substeps are no multiple of {env.n_substeps}")
        data = advance(data, ctrl)
        more = n_substeps // env.n_substeps - 1  # some tasks settle in their reset
        return jax.lax.fori_loop(0, more, lambda _, x: advance(x, ctrl), data) if more else data

    substitute(env, make_data, forward, step)
    return simulation, [field for field in read if field in engines.INTEGRATION_STATE]


def trace_fields(env) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fields of an mjx.Data that a task reads, and those that it gives to a step."""
    fresh, read, given = mujoco.MjData(env.mj_model), {"qpos", "qvel"}, {"ctrl"}

    class Recorder:
        def __getattr__(self, field):
            if not hasattr(fresh, field):
                raise AttributeError(field)
            read.add(field)
            return like_mjx(field, jnp.float32(np.array(getattr(fresh, field))))

        def replace(self, **changes):
            given.update(only_state(changes))
            return self

    def play(key):
        state = env.step(env.reset(key), jnp.zeros(env.action_size))
        return state.obs, state.reward

    own = env.reset, env.step
    substitute(
        env,
        make_data=lambda model, qpos=None, qvel=None, **fields: Recorder().replace(**fields),
        forward=lambda model, data: data,
        step=lambda model, data, ctrl, n_substeps=1: data,
    )
    jax.eval_shape(play, jax.random.key(0))
    env.reset, env.step = own
    return tuple(sorted(read | given)), tuple(sorted(given))


def substitute(env, make_data, forward, step):
    """Let reset and step of a Playground object call these in place of mjx_env and mjx."""
    own = SimpleNamespace(**{**vars(mjx_env), "make_data": make_data, "step": step})
    names = {"mjx_env": own, "mjx": SimpleNamespace(forward=forward)}
    for name in ("reset", "step"):
        function = inspect.unwrap(getattr(env, name)).__func__
        copied = FunctionType(
            function.__code__,
            {**function.__globals__, **names},
            name,
            function.__defaults__,
            function.__closure__,
        )
        setattr(env, name, MethodType(copied, env))


def only_state(fields: dict) -> dict:
    """Those of the integration state, as arrays; mjx.make_data has other arguments besides."""
    return {
        field: jnp.asarray(value, jnp.float32)
        for field, value in fields.items()
        if field in engines.INTEGRATION_STATE
    }


def like_mjx(field: str, value):
    """Rotation matrices are rows of 9 in C and [3, 3] in MJX."""
    if field.endswith("mat") and value.shape[-1] == 9:
        return value.reshape(*value.shape[:-1], 3, 3)
    return value


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
