"""A step of broken physics teaches nothing, neither by itself nor through the steps before it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from envs.wrappers import RawEnv

ONLINE = ("ppo", "bpo", "p3o", "reppo", "reppo_discrete")


def crash(discrete=False):
    """Pays -1 for a step; the next one breaks. The observation never changes."""

    def step(key, t, action):
        return jnp.ones(1), t + 1, jnp.where(t % 2, jnp.nan, -1.0), False, {}

    reset = lambda key: (jnp.ones(1), jnp.int32(0))
    return RawEnv(reset, step, 1, (1,), 2, discrete, 100, "cached")


def crash_discrete():
    return crash(discrete=True)


def breakable():
    """The best action is -0.5, every step costs more than 1, and actions above 0.5 break it."""

    def step(key, t, action):
        reward = -1.0 - (action[0] + 0.5) ** 2
        return jnp.where(action[0] > 0.5, jnp.nan, jnp.ones(1)), t + 1, reward, False, {}

    return RawEnv(lambda key: (jnp.ones(1), jnp.int32(0)), step, 1, (1,), 1, False, 100, "cached")


def always_broken():
    """Every step breaks."""
    raw = crash()

    def step(key, t, action):
        obs, t, _, terminated, info = raw.step(key, t, action)
        return obs, t, jnp.nan, terminated, info

    return raw._replace(step=step)


def config_of(name, env, **changes):
    changes |= {"normalize_obs": False, "normalize_reward": False, "anneal_lr": False}
    changes |= {"reward_scale": 1.0, "critic_loss": "mse", "temperature_init": 1e-6}
    changes |= {"dual_lr_mult": 0.0, "vmin": -8.0, "vmax": 8.0}  # the temperature stays near 0
    config = tiny.config_of(name)
    known = {field.name for field in dataclasses.fields(config)}
    known -= {"critic_loss"} if name == "reppo_discrete" else set()
    changes = {k: v for k, v in changes.items() if k in known}
    return dataclasses.replace(config, env=f"test_broken_physics:{env}", **changes)


def learned_value(name, config, state):
    """Value of the only observation there is, in the units of rewards."""
    module, obs = tiny.module_of(name), jnp.ones((1, 1))
    if name == "p3o":
        network = module.ActorCritic(config, (1,), 2, False)
        return network.apply(state.params, obs)[1]
    if name == "reppo":
        return module.Critic(config).apply(state.params["critic"], obs, jnp.zeros((1, 2))).value
    if name == "reppo_discrete":
        return module.Critic(config, 2).apply(state.params["critic"], obs).value.mean(-1)
    return module.Critic(config, (1,)).apply(state.params["critic"], obs)


@pytest.mark.parametrize("name", ONLINE)
def test_the_step_before_it_is_bootstrapped(name):
    """V = -1 + 0.5 V. Were the break an end that pays 0, V would be between -1.1 and -0.6."""
    env = "crash_discrete" if name == "reppo_discrete" else "crash"
    config = config_of(name, env, gamma=0.5, learning_rate=1e-2, num_steps=16)
    algo = tiny.build(name, config)
    step = lambda state, _: (algo.update(state)[0], None)
    state = jax.jit(lambda key: jax.lax.scan(step, algo.init(key), length=300)[0])(
        jax.random.key(0)
    )
    assert learned_value(name, config, state) == pytest.approx(-2.0, abs=0.1)


@pytest.mark.parametrize("name", ["ppo", "bpo", "p3o"])
def test_where_every_step_costs_breaking_the_physics_is_not_learned(name):
    config = config_of(name, "breakable", learning_rate=3e-3, num_envs=8, num_steps=32)
    algo = tiny.build(name, config)

    def step(state, _):
        state, metrics = algo.update(state)
        return state, metrics["health/env_nan"] / 256  # share of the steps

    run = lambda key: jax.lax.scan(step, algo.init(key), length=60)[1]
    broken = jax.jit(jax.vmap(run))(jax.vmap(jax.random.key)(jnp.arange(3)))
    assert (broken[:, -5:].mean(1) < 0.2).all()  # all of them, if their advantage is 0


@pytest.mark.parametrize("name", ["ppo", "bpo", "p3o"])  # for REPPO see its own tests
def test_by_itself_it_changes_nothing(name):
    config = config_of(name, "always_broken", ent_coef=0.0, adam_eps=1.0)  # keeps rounding small
    algo = tiny.build(name, config)
    run = jax.jit(lambda key: (state := algo.init(key), *algo.update(state)))
    before, after, metrics = run(jax.random.key(0))
    assert metrics["health/env_nan"] == 32
    learned = {k: v for k, v in after.params.items() if k != "mu"}  # mu follows pi
    tiny.assert_close(learned, {k: before.params[k] for k in learned}, atol=1e-6)
