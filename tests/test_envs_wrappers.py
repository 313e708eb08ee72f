"""The wrapper stack, on an environment simple enough to follow by hand, and the names of `make`."""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import envs
from envs import wrappers
from envs.wrappers import RawEnv


def counter(max_steps=5, reset_mode="fresh", ends_at=1000, nan_at=1000, hidden_nan_at=1000):
    """Observation [start, t, 64 action]: a random start, the step, the last action."""

    def observe(state, action):
        return jnp.array([state["start"], state["t"], action], jnp.float32)

    def reset(key):
        state = {"start": jax.random.uniform(key), "t": 0}  # t is weakly typed on purpose
        return observe(state, 0.0), state

    def step(key, state, action):
        state = {"start": state["start"], "t": state["t"] + 1}
        obs = observe(state, 64.0 * action[0])
        obs = jnp.where(state["t"] == nan_at, obs.at[1].set(jnp.nan), obs)
        reward = jnp.where(state["t"] == nan_at, jnp.inf, 2.0)
        info = {"env_nan": state["t"] == hidden_nan_at}
        return obs, state, reward, state["t"] == ends_at, info

    return RawEnv(reset, step, 3, (3,), 1, False, max_steps, reset_mode)


def run(raw, num_steps, num_envs=4, stagger=False, refresh_every=0):
    """Everything that step returns, [T, N, ...], with action t / 64 at step t."""
    env = wrappers.wrap(raw, "counter", num_envs, stagger)
    step = jax.jit(env.step)
    obs, state = jax.jit(env.reset)(jax.random.key(0))
    rows = []
    for t in range(num_steps):
        key_step, key_refresh = jax.random.split(jax.random.key(t + 1))
        previous = obs
        action = jnp.full((num_envs, 1), t / 64, jnp.float32)
        obs, state, reward, terminated, truncated, info = step(key_step, state, action)
        rows.append(
            {
                "obs": previous,
                "next": obs,
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                **info,
            }
        )
        if refresh_every and (t + 1) % refresh_every == 0:
            state = env.refresh(key_refresh, state)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


# --- time limit and final observation ---


def test_time_limit_truncates_and_keeps_the_final_observation():
    out = run(counter(max_steps=5), 12)
    assert out["truncated"].all(axis=1).tolist() == 2 * (4 * [False] + [True]) + 2 * [False]
    assert not out["terminated"].any()
    # the true successor on every step, also where the next observation is already a reset one
    t = np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2])
    np.testing.assert_array_equal(out["final_observation"][:, 0, 1], t)
    np.testing.assert_array_equal(out["next"][:, 0, 1], t % 5)
    np.testing.assert_array_equal(
        out["final_observation"][..., 2], np.tile(np.arange(12), (4, 1)).T
    )
    np.testing.assert_array_equal(out["final_observation"][..., 0], out["obs"][..., 0])


def test_terminating_on_the_last_step_is_not_truncation():
    out = run(counter(max_steps=5, ends_at=5), 5)
    assert out["terminated"][4].all()
    assert not out["truncated"].any()
    assert out["returned"][4].all()


def test_terminated_and_truncated_never_coincide():
    out = run(counter(max_steps=5, ends_at=3), 40, num_envs=64, stagger=True)
    assert out["truncated"].any()
    assert out["terminated"].any()
    assert not (out["terminated"] & out["truncated"]).any()


# --- auto-reset ---


def starts(out):
    """Starts of all episodes that an auto-reset began, [episodes, N]."""
    return out["next"][out["returned"][:, 0], :, 0]


def test_fresh_draws_a_new_start_every_time():
    drawn = starts(run(counter(), 20))
    assert len(np.unique(drawn)) == drawn.size == 16


def test_cached_always_begins_in_the_same_start():
    out = run(counter(reset_mode="cached"), 20, refresh_every=5)
    np.testing.assert_array_equal(starts(out), np.tile(out["obs"][0, :, 0], (4, 1)))
    assert len(np.unique(out["obs"][0, :, 0])) == 4  # one per environment


def test_refreshed_changes_with_refresh_and_only_then():
    out = run(counter(reset_mode="refreshed"), 30, refresh_every=10)
    drawn = starts(out)  # ends at 5, 10 | 15, 20 | 25, 30; refreshed after 10 and 20
    np.testing.assert_array_equal(drawn[0], out["obs"][0, :, 0])
    np.testing.assert_array_equal(drawn[0::2], drawn[1::2])
    assert len(np.unique(drawn[0::2])) == 12


def test_refresh_leaves_the_running_episode_alone():
    env = wrappers.wrap(counter(reset_mode="refreshed"), "counter", 4, stagger=True)
    _, state = env.reset(jax.random.key(0))
    refreshed = env.refresh(jax.random.key(1), state)
    for before, after in zip(
        jax.tree.leaves(state.replace(inner=state.inner.replace(start=None))),
        jax.tree.leaves(refreshed.replace(inner=refreshed.inner.replace(start=None))),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("mode", ["fresh", "cached"])
def test_refresh_is_the_identity_in_other_modes(mode):
    env = wrappers.wrap(counter(reset_mode=mode), "counter", 4, stagger=False)
    _, state = env.reset(jax.random.key(0))
    assert env.refresh(jax.random.key(1), state) is state


# --- staggering and the episode log ---


def test_stagger_spreads_the_first_time_outs_uniformly():
    out = run(counter(max_steps=8), 8, num_envs=4000, stagger=True)
    first = out["truncated"].argmax(axis=0)
    counts = np.bincount(first, minlength=8)
    assert out["truncated"].any(axis=0).all()
    np.testing.assert_allclose(counts, 500, atol=5 * np.sqrt(500))


def test_episode_log_counts_real_steps():
    out = run(counter(max_steps=5), 10, num_envs=64, stagger=True)
    length = np.zeros(64)
    for t in range(10):
        length += 1
        np.testing.assert_array_equal(out["episode_length"][t], length)
        np.testing.assert_array_equal(out["episode_return"][t], 2 * length)
        length *= ~out["returned"][t]
    np.testing.assert_array_equal(out["returned"], out["terminated"] | out["truncated"])
    assert (out["episode_length"][out["returned"]] < 5).any()  # cut short by staggering


# --- NaN ---


def test_nan_terminates_with_zero_reward_and_a_finite_observation():
    out = run(counter(max_steps=100, nan_at=3), 9)
    np.testing.assert_array_equal(out["env_nan"][:, 0], 3 * ([False, False, True]))
    np.testing.assert_array_equal(out["terminated"], out["env_nan"])
    assert not out["truncated"].any()
    np.testing.assert_array_equal(out["reward"][:, 0], 3 * [2.0, 2.0, 0.0])
    np.testing.assert_array_equal(out["final_observation"][:, 0, 1], 3 * [1.0, 2.0, 0.0])
    np.testing.assert_array_equal(out["final_observation"][2], 0.0)
    np.testing.assert_array_equal(out["next"][:, 0, 1], 3 * [1.0, 2.0, 0.0])  # really reset
    np.testing.assert_array_equal(out["episode_return"][out["returned"]], 4.0)


@pytest.mark.parametrize("mode", wrappers.RESET_MODES)
def test_nan_that_an_adapter_reports_is_reset_in_every_mode(mode):
    out = run(counter(max_steps=100, hidden_nan_at=3, reset_mode=mode), 6)
    assert out["terminated"].all(axis=1).tolist() == 2 * [False, False, True]
    np.testing.assert_array_equal(out["next"][:, 0, 1], 2 * [1.0, 2.0, 0.0])


# --- types and keys ---


@pytest.mark.parametrize("mode", wrappers.RESET_MODES)
def test_state_is_a_stable_carry_without_keys_or_weak_types(mode):
    env = wrappers.wrap(counter(reset_mode=mode), "counter", 4, stagger=True)
    obs, state = jax.eval_shape(env.reset, jax.random.key(0))
    action = jax.ShapeDtypeStruct((4, 1), jnp.float32)
    after = jax.eval_shape(env.step, jax.random.key(0), state, action)
    assert jax.tree.structure(after[1]) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(after[:2]), jax.tree.leaves((obs, state)), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, False)
        assert not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_no_key_is_used_twice():
    """An environment that shows the keys it is given: all of them differ."""

    def show(key):
        return jax.random.uniform(key, (1,))

    def step(key, state, action):
        return show(key), state, 0.0, True, {}

    shown = []
    for mode in wrappers.RESET_MODES:
        raw = RawEnv(lambda key: (show(key), 0), step, 1, (1,), 1, False, 1000, mode)
        env = wrappers.wrap(raw, "keys", 3, stagger=False)
        key_reset, *keys = jax.random.split(jax.random.key(len(mode)), 5)
        obs, state = env.reset(key_reset)
        shown.append(obs)
        for key in keys:
            key_step, key_refresh = jax.random.split(key)
            obs, state, *_, info = env.step(key_step, state, jnp.zeros((3, 1)))
            state = env.refresh(key_refresh, state)
            shown.append(info["final_observation"])
            if mode == "fresh":
                shown.append(obs)
            if mode == "refreshed":
                shown.append(state.inner.start[0])
    assert len(np.unique(shown)) == np.size(shown)


# --- names ---


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("ant", "brax/ant"),
        ("brax/ant?backend=mjx", "brax/ant"),
        ("ant?ls_iterations=6&backend=mjx", "brax/ant?ls_iterations=6"),
        ("hopper?ls_iterations=6&iterations=2", "brax/hopper?iterations=2&ls_iterations=6"),
        ("brax/hopper?backend=spring", "brax/hopper?backend=spring"),
        ("swimmer?backend=generalized", "brax/swimmer"),
        ("cartpole", "gymnax/CartPole-v1"),
        ("breakout", "gymnax/Breakout-MinAtar"),
        ("CheetahRun", "playground/CheetahRun"),
        ("G1JoystickFlatTerrain", "playground/G1JoystickFlatTerrain"),
        ("probe/truncation", "probe/truncation"),
        ("my.module:factory", "my.module:factory"),
    ],
)
def test_canonical(name, full):
    assert envs.canonical(name) == full
    assert envs.canonical(full) == full


def test_every_alias_is_a_known_task():
    for alias, full in envs.ALIASES.items():
        assert envs.canonical(alias) == full


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("antt", "ant"),
        ("cheetahrun", "CheetahRun"),
        ("brax/Hopper", "brax/hopper"),
        ("gymnax/CartPole", "gymnax/CartPole-v1"),
        ("probe/trunc", "probe/truncation"),
        ("nosuch/ant", "ant"),
        ("arm/reacher", "arm/reacher-moving"),
    ],
)
def test_unknown_name_lists_the_nearest(name, expected):
    with pytest.raises(ValueError, match=f"unknown environment '{name}'.*\\b{expected}\\b"):
        envs.make(name, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hopper?backend=mjxx", "backend='mjxx' must be one of mjx, generalized"),
        ("hopper?sparse=1", "unknown option 'sparse'; brax has: backend"),
        ("cartpole?x=1", "gymnax has: max_steps"),
        ("cartpole?max_steps=0", "max_steps='0' must be a positive integer"),
        ("hopper?ls_iterations=0", "positive integer"),
        ("hopper?iterations=four", "positive integer"),
        ("CheetahRun?iterations=2147483648", "iterations='2147483648' must be .* below"),
        ("hopper?iterations=2&iterations=3", "iterations is given twice"),
        ("CheetahRun?privileged=1", "unknown option 'privileged'"),
        ("swimmer?backend=mjx", "generalized only"),
        ("swimmer?engine=c", "generalized only, which takes no other option than max_steps"),
        ("hopper?backend=spring&engine=c", "backend=mjx: leave them out"),
    ],
)
def test_bad_options_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        envs.make(name, 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_envs": 0},
        {"num_envs": 2.0},
        {"num_envs": "2"},
        {"max_steps": 0},
        {"max_steps": 2.5},
        {"max_steps": 2**31},
        {"max_steps": True},
        {"reset_mode": "always"},
    ],
    ids=str,
)
def test_bad_arguments_are_named(bad):
    (field, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        envs.make("probe/value", **{"num_envs": 1, **bad})


def test_overrides_reach_the_environment():
    env = envs.make("probe/truncation", 2, stagger=False, max_steps=3, reset_mode="cached")
    assert env.max_steps == 3
    _, state = env.reset(jax.random.key(0))
    assert state.inner.start is not None  # the next start state is cached
    for t in range(3):
        _, state, _, _, truncated, _ = env.step(jax.random.key(t), state, jnp.zeros(2, jnp.int32))
        assert truncated.all() == (t == 2)
    assert envs.make("probe/truncation", 2).max_steps == 8


@pytest.mark.parametrize("task", ["probe/truncation", "cartpole", "gym/Reacher-v5", "reacher"])
def test_a_name_may_hold_the_time_limit(task):
    assert envs.make(f"{task}?max_steps=7", 2).max_steps == 7
    assert envs.make(f"{task}?max_steps=7", 2, max_steps=5).max_steps == 5


# --- a user's own environment ---


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("user_module")
    module.factory = counter
    module.number = lambda: 3
    module.of_a_size = lambda size: counter()
    module.broken = lambda: jnp.no_such_function
    module.mixed = lambda: 1 + "1"
    module.partial = lambda: envs.RawEnv(obs_size=3)
    monkeypatch.setitem(sys.modules, "user_module", module)


def test_a_users_factory_gets_the_whole_stack(user_module):
    env = envs.make("user_module:factory", 2)
    assert env.name == "user_module:factory"
    _, state = env.reset(jax.random.key(0))
    info = env.step(jax.random.key(1), state, jnp.zeros((2, 1)))[-1]
    assert set(info) == {
        "final_observation", "returned", "episode_return", "episode_length", "env_nan"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_module:nothing", "no such function"),
        ("no_such_module:factory", "no such function"),
        (":factory", "no such function"),
        ("user_module:nothing?max_steps=5", "a function of your own takes no options"),
        (len, "a string is wanted, module:function for one of your own"),
        ("envs.nothing.more:factory", "no such function"),
        ("__main__", "A function of your module is __main__:FUNCTION"),
        ("..user_module:factory", "no such function"),
        ("user_module:__name__", "no such function"),
        ("user_module:number", "must return envs.RawEnv"),
        ("user_module:of_a_size", "must need no arguments .*'size'"),
        ("user_module:partial", "user_module:partial: .*missing .* 'max_steps'"),
    ],
)
def test_a_wrong_factory_is_named(user_module, name, message):
    with pytest.raises(ValueError, match=message):
        envs.make(name, 2)


def test_an_error_in_a_factory_is_the_users_to_see(user_module):
    with pytest.raises(AttributeError, match="no_such_function"):
        envs.make("user_module:broken", 2)
    with pytest.raises(TypeError, match="unsupported operand"):
        envs.make("user_module:mixed", 2)


class Place:
    """A state that is no pytree."""

    def __init__(self, x):
        self.x = x


def spoiled(**changes):
    """`counter` with parts of what it returns replaced."""
    raw = counter()

    def reset(key):
        obs, state = raw.reset(key)
        if "extra" in changes:
            state |= {"extra": changes["extra"]()}
        return changes.get("first_obs", lambda x: x)(obs), state

    def step(key, state, action):
        names = "obs", "state", "reward", "terminated", "info"
        obs, new, *others = raw.step(key, state, action)
        if "extra" in changes:
            new |= {"extra": state["extra"]}
        results = zip(names, (obs, new, *others), strict=True)
        return tuple(changes.get(name, lambda x: x)(x) for name, x in results)

    fields = {k: v for k, v in changes.items() if k in raw._fields}
    return raw._replace(**({"reset": reset, "step": step} | fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_obs": jnp.sum}, r"the observation of reset is float32\[\], and an array \[3\]"),
        ({"first_obs": lambda x: {"x": x}}, r"the observation of reset is {'x': 'float32\[3\]'}"),
        ({"first_obs": lambda x: [x]}, r"the observation of reset is \['float32\[3\]'\]"),
        ({"first_obs": jnp.int32}, r"the observation of step is float32\[3\], and int32\[3\]"),
        ({"reward": lambda x: jnp.ones(1)}, r"the reward is float32\[1\], and a number without"),
        ({"terminated": jnp.float32}, r"terminated is float32\[\], and a bool without axes"),
        ({"terminated": jnp.int32}, r"terminated is int32\[\], and a bool without axes"),
        ({"info": lambda x: None}, r"info is None, and a dict"),
        ({"state": lambda x: (x, x)}, r"the state of step is .*, and "),
        (
            {"state": lambda x: x | {"t": 0.5 * x["t"]}},
            r"state\['t'\] of step is float32\[\], and int32",
        ),
        (
            {"extra": lambda: jax.random.key(0, impl="rbg")},
            r"state\['extra'\] of step is key<rbg>\[\], and a type of numpy, bfloat16 or a",
        ),
        (
            {"extra": lambda: jnp.zeros(2, jnp.float8_e4m3fn)},
            r"state\['extra'\] of step is float8_e4m3fn\[2\], and a type of numpy",
        ),
        ({"max_steps": None}, r"max_steps is None, and an int from 1 to 2\*\*31 - 1"),
        ({"max_steps": 0}, r"max_steps is 0"),
        ({"max_steps": 10**10}, r"max_steps is 10000000000"),
        ({"obs_size": np.prod((3,))}, r"obs_size is np.int64\(3\), and an int from 1"),
        ({"extra": lambda: Place(1.0)}, r"what reset returns at .* is a Place, and a number"),
        ({"action_size": 0}, r"action_size is 0"),
        (
            {"obs_shape": (2, 2)},
            r"obs_shape is \(2, 2\), and a tuple of .* product 3",
        ),
        ({"obs_shape": 3}, r"obs_shape is 3"),
        ({"privileged_size": 3}, r"privileged_size is 3, and an integer from 0 to 2"),
        ({"privileged_size": -1}, r"privileged_size is -1, and an integer from 0 to 2"),
        *(
            ({"action_range": x}, r"action_range is .*, and None or finite numbers \[2, 1\], the")
            for x in (
                (-1, 1),
                [[0.0], [1.0, 2.0]],
                [["a"], ["b"]],
                [[1.0], [1.0]],
                [[0], [np.inf]],
            )
        ),
        ({"render": 4}, "render is 4, and None or a function"),
        ({"goals": ()}, r"goals is \(\), and None or envs.Goals"),
        ({"discrete": None}, r"discrete is None, and True or False"),
        ({"step": None}, r"step is None, and a function"),
        ({"reward": lambda x: jnp.complex64(x)}, r"the reward is complex64\[\], and a number"),
        ({"info": lambda x: {"why": "fell"}}, r"what step returns at .*'why'.* is 'fell', and"),
        ({"info": lambda x: {"env_nan": 0.0}}, r"info\['env_nan'\] is float32\[\], and a bool"),
        ({"info": lambda x: {1: 0.0}}, r"info is .*, and a dict with names"),
        ({"reset_mode": "never"}, r"reset_mode is 'never', and one of fresh, cached, refreshed"),
        (
            {"reset": lambda key: jnp.zeros(1)},
            r"what reset returns is float32\[1\], and \(obs, state",
        ),
        (
            {"step": lambda key, state, action: (jnp.zeros(3), state, 0.0, False)},
            r"what step returns is \(.*\), and \(obs, state, reward, terminated, info\)",
        ),
    ],
)
def test_a_users_environment_is_checked_when_it_is_loaded(monkeypatch, changes, message):
    module = types.ModuleType("my_module")
    module.factory = lambda: spoiled(**changes)
    monkeypatch.setitem(sys.modules, "my_module", module)
    envs._load.cache_clear()
    with pytest.raises(ValueError, match=f"my_module:factory: {message}"):
        envs.make("my_module:factory", 2)


def test_continuous_actions_are_clipped_for_every_environment(monkeypatch):
    """A task that pays the action itself; nothing of its own clips."""
    module = types.ModuleType("my_module")
    module.factory = lambda: spoiled()._replace(
        step=lambda key, state, action: (jnp.zeros(3), state, action[0], False, {})
    )
    monkeypatch.setitem(sys.modules, "my_module", module)
    envs._load.cache_clear()
    env = envs.make("my_module:factory", 3)
    _, state = env.reset(jax.random.key(0))
    actions = jnp.array([[18.97], [0.5], [-3.0]])
    _, _, reward, *_ = env.step(jax.random.key(1), state, actions)
    np.testing.assert_array_equal(reward, [1.0, 0.5, -1.0])


def test_a_factory_that_is_edited_is_called_again(monkeypatch):
    """As in a notebook, whose functions are in __main__; until then it is called once."""
    module, calls = types.ModuleType("my_module"), []
    monkeypatch.setitem(sys.modules, "my_module", module)

    def define(reward):
        def factory():
            calls.append(reward)
            return spoiled(reward=lambda x: jnp.full_like(x, reward))

        module.factory = factory

    for reward in (1.0, 5.0):
        define(reward)
        for _ in range(2):
            env = envs.make("my_module:factory", 2)
        _, state = env.reset(jax.random.key(0))
        paid = env.step(jax.random.key(1), state, jnp.zeros((2, 1)))[2]
        np.testing.assert_array_equal(paid, reward)
    assert calls == [1.0, 5.0]


def test_physics_is_compiled_in_full_precision(monkeypatch):
    raw, seen = spoiled(), []

    def step(*args):
        seen.append(jax.config.jax_default_matmul_precision)
        return raw.step(*args)

    module = types.ModuleType("my_module")
    module.factory = lambda: raw._replace(step=step)
    monkeypatch.setitem(sys.modules, "my_module", module)
    with jax.default_matmul_precision("bfloat16"):
        env = envs.make("my_module:factory", 2)
        key = jax.random.key(0)
        seen.clear()  # the check of its shapes
        jax.eval_shape(env.step, key, env.reset(key)[1], jnp.zeros((2, 1)))
    assert seen == ["highest"]


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "environments.md").read_text()
    usage, example, change = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(usage, "usage", "exec"), {})
    (tmp_path / "line_walk.py").write_text(example)
    (tmp_path / "easy_hopper.py").write_text(change)
    monkeypatch.syspath_prepend(tmp_path)
    hopper = envs.make("easy_hopper:sparse", 2)
    _, state = hopper.reset(jax.random.key(0))
    assert not hopper.step(jax.random.key(1), state, jnp.zeros((2, 3)))[2].any()  # it stands still
    env = envs.make("line_walk:factory", 8)
    with Image.open(env.render(np.array([-1.0, 0.0, 1.0]), tmp_path / "walk")) as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 3)
    step = jax.jit(env.step)
    _, state = env.reset(jax.random.key(0))
    for t in range(15):
        _, state, reward, terminated, *_ = step(jax.random.key(t), state, jnp.ones((8, 1)))
        np.testing.assert_array_equal(reward, terminated)
        if terminated.any():
            return
    pytest.fail("nobody arrived")


def test_the_docs_name_every_task():
    text = (Path(__file__).parents[1] / "docs" / "environments.md").read_text()
    for source, tasks in envs.TASKS.items():
        if source == "atari":  # the page says how many, and where their names are from
            assert f"{len(tasks) - 2} games that ale-py ships besides" in text
            continue
        for task in tasks:
            name = f"probe/{task.removesuffix('-continuous')}" if source == "probe" else f"`{task}`"
            assert name in text, f"{source}/{task}"


def test_a_broken_step_pays_nothing_though_its_reward_is_a_number():
    out = run(counter(max_steps=100, hidden_nan_at=3), 6)
    np.testing.assert_array_equal(out["reward"][:, 0], 2 * [2.0, 2.0, 0.0])


def test_a_reward_that_is_not_finite_ends_the_episode():
    """Also where the observation is finite."""
    raw = counter(max_steps=100)

    def step(key, state, action):
        obs, state, reward, terminated, info = raw.step(key, state, action)
        return obs, state, jnp.where(state["t"] == 3, jnp.inf, reward), terminated, info

    out = run(raw._replace(step=step), 6)
    assert out["env_nan"][:, 0].tolist() == 2 * [False, False, True]
    assert np.isfinite(out["reward"]).all()
