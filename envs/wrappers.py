"""What happens between an adapter and an algorithm, and at the end of an episode.

Stack from the inside: raw adapter - privileged entries hidden - action clip - NaN guard - time
limit - auto-reset - staggered start - episode log - vmap. Each layer takes and returns the pure
functions `reset` and `step` of one environment; its state, if any, is a frozen dataclass that holds
the inner state. No layer stores a key: whatever is random comes from the key of the call.

terminated: the task ended, the value after it is zero. truncated: the time limit ended the episode,
bootstrap from info["final_observation"]. Never both.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

RESET_MODES = ("fresh", "cached", "refreshed")


class Goals(NamedTuple):
    """How to read and replace the goal in an observation, and the reward under another goal."""

    achieved_goal: Callable  # obs [..., obs_size] -> [..., A], whose first G entries are a goal
    desired_goal: Callable  # obs [..., obs_size] -> [..., G]
    with_goal: Callable  # obs, goal -> obs
    compute_reward: Callable  # achieved, goal, kind -> [..., m]
    kinds: tuple[str, ...]  # of rewards
    moving: bool  # the goal changes within an episode


class RawEnv(NamedTuple):
    """One environment without auto-reset, time limit or vmap: what an adapter returns."""

    reset: Callable  # key -> obs [obs_size], state
    step: Callable  # key, state, action -> obs, state, reward, terminated, info
    obs_size: int
    obs_shape: tuple[int, ...]  # before flattening; (obs_size,) for vectors
    action_size: int  # number of actions if discrete, else their dimension
    discrete: bool  # continuous actions are in [-1, 1]: the stack clips, the adapter rescales
    max_steps: int  # time limit of the task, in steps
    reset_mode: str  # default auto-reset: "fresh" | "cached" | "refreshed"
    privileged_size: int = 0  # trailing entries of obs that only a critic may see
    frame: Callable | None = None  # state -> small pytree, all that drawing it needs
    # frames (leaves [T, ...], numpy), path without suffix in a folder that exists -> path written
    render: Callable | None = None
    goals: Goals | None = None
    action_range: Any = None  # [2, action_size], to which the adapter scales; None: it does not


class Env(NamedTuple):
    """`num_envs` environments (N) with the whole stack.

    step's info has, on every step: "final_observation" [N, obs_size], the true successor, before
    any reset; "returned" [N] bool, an episode ended (in Atari a game); "episode_return" and
    "episode_length" [N] of the running episode with this step, to be read where returned;
    "env_nan" [N] bool, the physics broke on this step: nothing may be learned from it.
    """

    name: str
    num_envs: int
    reset: Callable  # key -> obs [N, obs_size], state
    step: Callable  # key, state, action -> obs, state, reward, terminated, truncated, info
    refresh: Callable  # key, state -> state: re-draw cached start states; once per rollout
    obs_size: int
    obs_shape: tuple[int, ...]
    action_size: int
    discrete: bool
    max_steps: int
    privileged_size: int = 0
    frame: Callable | None = None  # raw state of one environment -> small pytree
    render: Callable | None = None
    goals: Goals | None = None
    action_range: Any = None
    stateful: bool = False  # part of its state is outside the program: one row, no resume


@struct.dataclass
class TimeLimitState:
    """Steps since the last reset, plus the staggered start of the first episode."""

    inner: Any
    elapsed: jax.Array  # int32


@struct.dataclass
class AutoResetState:
    """`start`: cached (obs, TimeLimitState) of the next episode; None in fresh mode."""

    inner: TimeLimitState
    start: Any


@struct.dataclass
class EpisodeState:
    """Return and true length of the running episode."""

    inner: AutoResetState
    episode_return: jax.Array  # float32
    episode_length: jax.Array  # int32


def wrap(raw: RawEnv, name: str, num_envs: int, stagger: bool, privileged: bool = False) -> Env:
    """Put the whole stack around one raw environment, which gets this name."""
    reset, step = raw.reset, raw.step
    if raw.privileged_size and not privileged:
        size = raw.obs_size - raw.privileged_size
        reset, step = _hide_privileged(reset, step, size)
        raw = raw._replace(obs_size=size, obs_shape=(size,), privileged_size=0)
    if not raw.discrete:
        step = _clip_actions(step)
    reset, step = _nan_guard(reset, step)
    reset, step = _time_limit(reset, step, raw.max_steps)
    reset, step, refresh = _auto_reset(reset, step, raw.reset_mode)
    if stagger:
        reset = _stagger(reset, raw.max_steps)
    reset, step, refresh = _episode_log(reset, step, refresh)

    def reset_all(key):
        return jax.vmap(reset)(jax.random.split(key, num_envs))

    def step_all(key, state, action):
        return jax.vmap(step)(jax.random.split(key, num_envs), state, action)

    def refresh_all(key, state):
        if raw.reset_mode != "refreshed":
            return state
        return jax.vmap(refresh)(jax.random.split(key, num_envs), state)

    return Env(
        name=name,
        num_envs=num_envs,
        reset=reset_all,
        step=step_all,
        refresh=refresh_all,
        obs_size=raw.obs_size,
        obs_shape=raw.obs_shape,
        action_size=raw.action_size,
        discrete=raw.discrete,
        max_steps=raw.max_steps,
        privileged_size=raw.privileged_size,
        frame=raw.frame,
        render=raw.render,
        goals=raw.goals,
        action_range=raw.action_range,
    )


def check(raw: RawEnv, name: str) -> None:
    """Check once what a user's factory promises, from shapes and dtypes alone.

    Raises ValueError in one line that names the field, what it is and what is wanted.
    """

    def require(fine: bool, field: str, found: Any, wanted: str) -> None:
        if not fine:
            raise ValueError(f"{name}: {field} is {describe(found)}, and {wanted} is wanted")

    def like(x: Any, shape: tuple, *kinds: Any) -> bool:
        fits = getattr(x, "shape", None) == shape
        return fits and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)

    def arrays_of(function: Callable, field: str) -> Callable:
        def checked(*args):
            result = function(*args)
            for path, x in jax.tree_util.tree_flatten_with_path(result)[0]:
                numeric = isinstance(x, (bool, int, float, complex)) or hasattr(x, "dtype")
                where = f"what {field} returns at {jax.tree_util.keystr(path)}"
                require(numeric, where, x, "a number or an array")
            return result

        return checked

    for field in ("obs_size", "action_size", "max_steps"):
        value = getattr(raw, field)
        require(countable(value), field, value, "an int from 1 to 2**31 - 1")
    modes = ", ".join(RESET_MODES)
    require(raw.reset_mode in RESET_MODES, "reset_mode", raw.reset_mode, f"one of {modes}")
    require(isinstance(raw.discrete, bool), "discrete", raw.discrete, "True or False")
    shape, size = raw.obs_shape, raw.obs_size
    fine = isinstance(shape, tuple) and all(map(countable, shape)) and math.prod(shape) == size
    require(fine, "obs_shape", shape, f"a tuple of ints with the product {size}")
    fine = isinstance(raw.privileged_size, int) and 0 <= raw.privileged_size < size
    require(fine, "privileged_size", raw.privileged_size, f"an integer from 0 to {size - 1}")
    fine = raw.action_range is None or ranges(raw.action_range, raw.action_size)
    wanted = f"None or finite numbers [2, {raw.action_size}], the smaller ones first,"
    require(fine, "action_range", raw.action_range, wanted)
    for field in ("reset", "step"):
        value = getattr(raw, field)
        require(callable(value), field, value, "a function")
    for field in ("frame", "render"):
        value = getattr(raw, field)
        require(value is None or callable(value), field, value, "None or a function")
    fine = raw.goals is None or isinstance(raw.goals, Goals)
    require(fine, "goals", raw.goals, "None or envs.Goals")

    key = jax.eval_shape(lambda: jax.random.key(0))
    start = jax.eval_shape(arrays_of(raw.reset, "reset"), key)
    require(
        isinstance(start, tuple) and len(start) == 2, "what reset returns", start, "(obs, state)"
    )
    obs, state = jax.eval_shape(strong, start)
    shape, real = (raw.obs_size,), (jnp.floating, jnp.integer)
    fine = like(obs, shape, *real, jnp.bool_)
    require(fine, "the observation of reset", obs, f"an array {[*shape]}")

    action = jnp.zeros(()) if raw.discrete else jnp.zeros(raw.action_size)
    action = action.astype(jnp.int32 if raw.discrete else jnp.float32)
    result = jax.eval_shape(arrays_of(raw.step, "step"), key, state, action)
    fine = isinstance(result, tuple) and len(result) == 5
    require(fine, "what step returns", result, "(obs, state, reward, terminated, info)")
    new_obs, new_state, reward, terminated, info = jax.eval_shape(strong, result)
    require(like(new_obs, shape, obs.dtype), "the observation of step", new_obs, describe(obs))
    same = jax.tree.structure(new_state) == jax.tree.structure(state)  # type: ignore[operator]
    require(same, "the state of step", new_state, describe(state))
    for (path, new), old in zip(
        jax.tree_util.tree_flatten_with_path(new_state)[0], jax.tree.leaves(state), strict=True
    ):
        leaf = f"state{jax.tree_util.keystr(path)} of step"
        require(like(new, old.shape, old.dtype), leaf, new, f"{describe(old)} as after reset")
        require(storable(old), leaf, new, "a type of numpy, bfloat16 or a threefry2x32 key")
    require(like(reward, (), *real), "the reward", reward, "a number without axes")
    require(like(terminated, (), jnp.bool_), "terminated", terminated, "a bool without axes")
    fine = isinstance(info, dict) and all(isinstance(x, str) for x in info)
    require(fine, "info", info, "a dict with names")
    nan = info.get("env_nan", terminated)
    require(like(nan, (), jnp.bool_), "info['env_nan']", nan, "a bool without axes")


def countable(x: Any) -> bool:
    """True for a positive integer that fits into 32 bits."""
    return isinstance(x, int) and not isinstance(x, bool) and 0 < x < 2**31


def ranges(x: Any, size: int) -> bool:
    """True for finite numbers [2, size], each of the first row below that of the second."""
    try:
        x = np.asarray(x, np.float64)
    except (ValueError, TypeError):  # rows of different lengths, or no numbers
        return False
    return x.shape == (2, size) and bool(np.isfinite(x).all() and (x[0] < x[1]).all())


def describe(tree: Any) -> str:
    """A value in words: dtype and shape of an array, else what it is."""
    if isinstance(tree, np.generic):
        return repr(tree)
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}{list(tree.shape)}"
    if all(isinstance(x, (int, float, str)) for x in jax.tree.leaves(tree)):
        return repr(tree)
    if jax.tree_util.all_leaves([tree]):
        return f"a {type(tree).__name__}"
    return str(jax.tree.map(describe, tree))


def storable(x: Any) -> bool:
    """True for what a checkpoint can hold: numpy's types, bfloat16, and keys of one kind."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x.dtype == jax.random.key(0, impl="threefry2x32").dtype
    return x.dtype == jnp.bfloat16 or x.dtype.kind in "biufc"


def raw_state(state: EpisodeState):
    """The adapter's own state inside the stack: what `frame` takes."""
    return state.inner.inner.inner


def select(condition, on_true, on_false):
    """Leaf-wise jnp.where over two trees of the same structure; condition is a scalar."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), on_true, on_false)


def strong(tree):
    """The same tree without weak types: a stable scan carry, and nothing compiles twice."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


# --- layers, from the inside ---


def _hide_privileged(reset, step, size):
    """Only the first `size` entries of an observation, which a policy may see."""

    def hidden_reset(key):
        obs, state = reset(key)
        return obs[:size], state

    def hidden_step(key, state, action):
        obs, *rest = step(key, state, action)
        return obs[:size], *rest

    return hidden_reset, hidden_step


def _clip_actions(step):
    """Continuous actions in [-1, 1], whatever a policy draws."""
    return lambda key, state, action: step(key, state, jnp.clip(action, -1.0, 1.0))


def _nan_guard(reset, step):
    """A non-finite step terminates: reward and final observation are 0, `env_nan` is true."""

    def guarded_reset(key):
        return strong(reset(key))

    def guarded_step(key, state, action):
        obs, state, reward, terminated, info = strong(step(key, state, action))
        reward = reward.astype(jnp.float32)
        # an adapter may know of trouble that its observation hides, such as a clipped velocity
        nan = ~jnp.isfinite(obs).all() | ~jnp.isfinite(reward) | info.get("env_nan", False)
        obs = jnp.where(nan, jnp.zeros_like(obs), obs)
        info = {**info, "env_nan": nan}
        return obs, state, jnp.where(nan, 0.0, reward), terminated | nan, info

    return guarded_reset, guarded_step


def _time_limit(reset, step, max_steps):
    """Truncate at max_steps; an episode that terminates on its last step is only terminated."""

    def limited_reset(key):
        obs, inner = reset(key)
        return obs, TimeLimitState(inner, jnp.int32(0))

    def limited_step(key, state, action):
        obs, inner, reward, terminated, info = step(key, state.inner, action)
        elapsed = state.elapsed + 1
        truncated = (elapsed >= max_steps) & ~terminated
        return obs, TimeLimitState(inner, elapsed), reward, terminated, truncated, info

    return limited_reset, limited_step


def _auto_reset(reset, step, mode):
    """Begin the next episode within the step that ends one, and keep the true successor in info.

    fresh: every step computes a reset. cached: always the environment's first start state.
    refreshed: cached, and re-drawn by `refresh`.
    """
    fresh = mode == "fresh"

    def auto_reset(key):
        start = reset(key)
        return start[0], AutoResetState(start[1], None if fresh else start)

    def auto_step(key, state, action):
        if fresh:
            key, key_reset = jax.random.split(key)
            start = reset(key_reset)
        else:
            start = state.start
        obs, inner, reward, terminated, truncated, info = step(key, state.inner, action)
        info = {**info, "final_observation": obs}
        obs, inner = select(terminated | truncated, start, (obs, inner))
        return obs, AutoResetState(inner, state.start), reward, terminated, truncated, info

    def refresh(key, state):
        return state.replace(start=reset(key))

    return auto_reset, auto_step, refresh


def _stagger(reset, max_steps):
    """Draw the elapsed time of the first episode: environments are not truncated together."""

    def staggered_reset(key):
        key_reset, key_elapsed = jax.random.split(key)
        obs, state = reset(key_reset)
        elapsed = jax.random.randint(key_elapsed, (), 0, max_steps)
        return obs, state.replace(inner=state.inner.replace(elapsed=elapsed))

    return staggered_reset


def _episode_log(reset, step, refresh):
    """Running return and length; staggering does not change the length."""

    def logged_reset(key):
        obs, inner = reset(key)
        return obs, EpisodeState(inner, jnp.float32(0), jnp.int32(0))

    def logged_step(key, state, action):
        obs, inner, reward, terminated, truncated, info = step(key, state.inner, action)
        done = terminated | truncated
        episode_return = state.episode_return + reward
        episode_length = state.episode_length + 1
        info = {
            **info,
            "returned": done,
            "episode_return": episode_return,
            "episode_length": episode_length,
        }
        state = EpisodeState(
            inner, jnp.where(done, 0.0, episode_return), jnp.where(done, 0, episode_length)
        )
        return obs, state, reward, terminated, truncated, info

    def logged_refresh(key, state):
        return state.replace(inner=refresh(key, state.inner))

    return logged_reset, logged_step, logged_refresh
