"""Adapter for Atari games: ale-py's emulators, stepped from inside the compiled program.

The emulators are a pool of threads outside the program, reached by XLA's foreign calls on the CPU.
So there is one pool per program (one seed at a time) and its state is in no checkpoint.

Preprocessing (Mnih et al. 2015, as in the usual benchmarks): 1 to 30 no-ops at the start of a game,
every 4th frame, the maximum of the last two, grey and 84 x 84, 4 frames stacked; a lost life
terminates. In games that have FIRE, the first action of each life is FIRE in place of the policy's.
Actions are the game's own and do not stick. Rewards are clipped to their sign; the logged return is
the score of the whole game.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.wrappers import Env, strong

try:
    from ale_py import roms
    from ale_py.vector_env import AtariVectorEnv
    from gymnasium.vector import AutoresetMode
except ImportError as error:
    raise ImportError('Atari games need ale-py: pip install -e ".[atari]"') from error

FIRE = 1  # in the list of all actions
FRAMES = 108_000  # of a game at most, 30 minutes
SKIP = 4


class AtariState(NamedTuple):
    """What a step reads besides the emulators."""

    handle: jax.Array  # [8] uint8, address of the pool
    obs: jax.Array  # [N, obs_size] uint8
    frame: jax.Array  # [N] int32, frames since the start of the game
    fire: jax.Array  # [N] bool, a life has just begun
    episode_return: jax.Array  # [N] float32, score so far
    episode_length: jax.Array  # [N] int32, decisions so far


class Pool(NamedTuple):
    """The emulators of N games, and pure functions that call them."""

    emulators: Any  # keeps them alive
    reset: Callable  # seeds [N] -> handle, obs, frame
    step: Callable  # handle, actions [N] -> handle, obs, reward, terminated, truncated, frame
    num_actions: int
    fire: int | None  # the action, if the game has it


def make(task: str, num_envs: int, purpose: str) -> Env:
    """`num_envs` games of ALE by the name without underscores, "MsPacman".

    Environments of the same game, number and `purpose` share their emulators: give training and
    evaluation different ones.
    """
    pool = _pool(task, num_envs, purpose)

    def reset(key):
        seeds = jax.random.randint(key, (num_envs,), 0, 2**31 - 1)
        handle, obs, frame = pool.reset(seeds)
        zeros = lambda kind: jnp.zeros(num_envs, kind)
        state = AtariState(handle, flat(obs), frame, zeros(bool), zeros(float), zeros(int))
        return state.obs, strong(state)

    def step(key, state, action):
        action = action.astype(jnp.int32)
        if pool.fire is not None:
            action = jnp.where(state.fire, pool.fire, action)
        handle, obs, score, terminated, truncated, frame = pool.step(state.handle, action)
        obs, truncated = flat(obs), truncated & ~terminated
        returned = frame <= state.frame  # a new game has begun
        episode_return = state.episode_return + score
        episode_length = state.episode_length + 1
        info = {
            # The last frame of a game is lost: the one before is the nearest.
            "final_observation": jnp.where(returned[:, None], state.obs, obs),
            "returned": returned,
            "episode_return": episode_return,
            "episode_length": episode_length,
            "env_nan": jnp.zeros(num_envs, bool),
        }
        state = AtariState(
            handle=handle,
            obs=obs,
            frame=frame,
            fire=terminated & ~returned,
            episode_return=jnp.where(returned, 0.0, episode_return),
            episode_length=jnp.where(returned, 0, episode_length),
        )
        return obs, state, jnp.sign(score).astype(jnp.float32), terminated, truncated, info

    return Env(
        name=f"atari/{task}",
        num_envs=num_envs,
        reset=reset,
        step=step,
        refresh=lambda key, state: state,
        obs_size=84 * 84 * 4,
        obs_shape=(84, 84, 4),
        action_size=pool.num_actions,
        discrete=True,
        max_steps=FRAMES // SKIP,
        stateful=True,
    )


def flat(obs):
    """[N, 4, 84, 84] -> [N, 84 * 84 * 4], channels last."""
    return jnp.moveaxis(obs, 1, -1).reshape(obs.shape[0], -1)


@functools.lru_cache(maxsize=8)
def _pool(task: str, num_envs: int, purpose: str) -> Pool:
    """Start the emulators; ValueError if this version of ale-py does not know the game."""
    known = {"".join(x.capitalize() for x in rom.split("_")): rom for rom in roms.get_all_rom_ids()}
    if task not in known:
        raise ValueError(f"atari/{task}: not among the games of the installed ale-py")
    # `life_loss_info` reports a lost life without a new game, which `episodic_life` would begin.
    emulators = AtariVectorEnv(
        known[task],
        num_envs,
        frameskip=SKIP,
        max_num_frames_per_episode=FRAMES,
        autoreset_mode=AutoresetMode.SAME_STEP,
        life_loss_info=True,
        reward_clipping=False,
    )
    # `xla` refuses other modes, but its functions work in both: the emulators keep SAME_STEP.
    emulators.autoreset_mode = AutoresetMode.NEXT_STEP
    handle, xla_reset, xla_step = emulators.xla()
    handle = np.asarray(handle)

    @one_row
    def reset(seeds):
        new_handle, (obs, info) = xla_reset(handle, seeds)
        return new_handle, obs, info["episode_frame_number"]

    @one_row
    def step(handle, action):
        handle, (obs, score, terminated, truncated, info) = xla_step(handle, action)
        return handle, obs, score, terminated, truncated, info["episode_frame_number"]

    actions = [x.value for x in emulators.ale.get_action_set()]
    fire = actions.index(FIRE) if FIRE in actions else None
    return Pool(emulators, reset, step, len(actions), fire)


def one_row(function):
    """`function` that works under a `vmap` of one row and refuses several: a pool has one user."""
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def rule(axis_size, in_batched, *args):
        if axis_size != 1:
            raise ValueError(f"Atari games run one seed in a program, not {axis_size}")
        args = [x[0] if batched else x for x, batched in zip(args, in_batched, strict=True)]
        out = jax.tree.map(lambda x: x[None], function(*args))
        return out, jax.tree.map(lambda _: True, out)

    return function
