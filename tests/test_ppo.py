"""Proximal policy optimisation: estimator, losses, distributions, exploration, optimiser."""

import dataclasses
import functools
import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from tiny import assert_allclose, assert_close

import envs
from algos import bpo, common, ppo
from envs.wrappers import RawEnv, raw_state

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_ppo")

T, N = 7, 3


def config_of(**changes):
    return tiny.config_of("ppo", **({"env": "probe/both"} | changes))


# --- targets ---


@lru_cache
def compiled_gae():
    return jax.jit(ppo.gae)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_loop(seed, gamma, lam, chance):
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, T, N)).astype(np.float32)
    done = rng.random((T, N)) < chance
    terminated = done & (rng.random((T, N)) < 0.5)
    expected = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                bootstrap = 0.0 if terminated[k, n] else next_value[k, n]
                expected[t, n] += weight * (reward[k, n] + gamma * bootstrap - value[k, n])
                if done[k, n]:
                    break
                weight *= gamma * lam
    actual = compiled_gae()(reward, value, next_value, terminated, done, gamma, lam)
    assert_allclose(actual, expected, atol=1e-4)


# --- losses ---

RATIO = np.array([0.5, 0.9, 1.1, 1.5, 0.5, 0.9, 1.1, 1.5], np.float32)
ADVANTAGE = np.array([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0], np.float32)
OLD = np.linspace(-2, 1, 8).astype(np.float32)


def test_policy_loss_by_hand():
    loss, aux = ppo.policy_loss(OLD + np.log(RATIO), OLD, ADVANTAGE, 0.2)
    surrogate = [1.0, 1.8, 2.2, 2.4, -1.6, -1.8, -2.2, -3.0]
    assert_allclose(loss, -np.mean(surrogate))
    assert_allclose(aux["losses/clip_fraction"], 0.5)
    assert_allclose(aux["losses/approx_kl"], np.mean(RATIO - 1 - np.log(RATIO)))


def test_policy_loss_gradient():
    loss = lambda log_prob: ppo.policy_loss(log_prob, OLD, ADVANTAGE, 0.2)[0]
    log_prob = OLD + np.log(RATIO)
    check_grads(loss, (log_prob,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-3)
    grad = jax.grad(loss)(log_prob)
    expected = -RATIO * ADVANTAGE / 8
    expected[[3, 4]] = 0.0  # past the range in the direction that the advantage asks for
    assert_allclose(grad, expected)


@pytest.mark.parametrize("module", [ppo, bpo])
@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_an_action_that_the_other_policy_hardly_takes_is_no_danger(module, log_ratio, advantage):
    loss = lambda x: module.policy_loss(x, jnp.zeros(1), jnp.array([advantage]), 0.2)[0]
    assert jnp.isfinite(jax.grad(loss)(jnp.array([log_ratio]))).all()


def test_value_loss_is_a_plain_mean_square():
    value, target = jnp.array([1.0, 2.0]), jnp.array([4.0, 2.0])
    assert_allclose(ppo.value_loss(value, target), 4.5)
    assert_allclose(jax.grad(ppo.value_loss)(value, target), [-3.0, 0.0])


# --- exploration in a rollout ---


def recorder():
    """Remembers the actions of its first 16 steps; never ends."""

    def reset(key):
        return jnp.ones(1), (jnp.int32(0), jnp.zeros((16, 2)))

    def step(key, state, action):
        t, history = state
        return jnp.ones(1), (t + 1, history.at[t].set(action)), 0.0, False, {}

    return RawEnv(reset, step, 1, (1,), 2, False, 10_000, "cached")


def run_update(config, change=lambda state: state):
    """State before and after one update, and its metrics."""
    algo = tiny.build("ppo", config)

    def run(key):
        state = change(algo.init(key))
        return state, *algo.update(state)

    return jax.jit(run)(jax.random.key(0))


@pytest.mark.parametrize(("noise_interval", "held"), [(1, 1), (3, 3), (100, 8)])
def test_noise_is_held(noise_interval, held):
    """A policy whose mean is 0 in all states, so that an action is the std times its noise."""
    config = config_of(
        env="test_ppo:recorder",
        noise_interval=noise_interval,
        log_std_init=-2.0,
        policy_gain=0.0,
    )
    _, state, _ = run_update(config)
    _, action = raw_state(state.env_state)  # [N, 16, 2]
    action = np.asarray(action[:, :8])
    block = np.arange(8) // held
    for t in range(1, 8):
        same = action[:, t] == action[:, t - 1]
        assert same.all() if block[t] == block[t - 1] else not same.any()
    assert np.unique(action[:, 0, 0]).size == len(action)  # each environment has its own noise


def test_actions_are_stored_as_drawn_and_the_environment_clips_them():
    """With a std of 7 nearly all are clipped, and yet the first ratio is 1 to 1e-5."""
    config = config_of(
        env="test_ppo:recorder",
        log_std_init=2.0,
        num_epochs=1,
        num_minibatches=1,
        clip_eps=1e-5,
    )
    _, state, metrics = run_update(config)
    action = np.asarray(raw_state(state.env_state)[1][:, :8])
    assert (np.abs(action) == 1.0).mean() > 0.7
    assert metrics["losses/clip_fraction"] == 0


# --- optimisation ---


def test_step_size_follows_progress_and_ends_at_zero():
    config = config_of(total_timesteps=4 * 32 - 5)  # rounded up to 4 updates
    train = jax.jit(ppo.make_train(config))
    metrics = train(jax.random.key(0))["metrics"]
    assert_allclose(
        metrics["charts/learning_rate"], config.learning_rate * np.array([1, 0.75, 0.5, 0.25])
    )


def test_clip_range_follows_progress():
    """Half-way through the run the annealed range is half of the first one."""
    at_half = lambda state: state._replace(update=jnp.int32(2))
    common = {"total_timesteps": 4 * 32, "anneal_lr": False, "learning_rate": 0.02, "num_epochs": 4}
    config = config_of(anneal_clip=True, clip_eps=0.2, **common)
    _, annealed, metrics = run_update(config, at_half)
    config = config_of(anneal_clip=False, clip_eps=0.1, **common)
    _, constant, _ = run_update(config, at_half)
    assert_close(annealed.params, constant.params)
    assert metrics["losses/clip_fraction"] > 0.1


def test_each_network_is_clipped_by_its_own_norm():
    # With an epsilon this large a step of Adam is proportional to the clipped gradient.
    config = config_of(
        num_epochs=1,
        num_minibatches=1,
        anneal_lr=False,
        learning_rate=1e3,
        adam_eps=1e3,
        max_grad_norm=1e-3,
    )
    before, after, metrics = run_update(config)
    for name in ("actor", "critic"):
        assert metrics[f"losses/{name}_grad_norm"] > 1e-2  # before clipping
        step = jax.tree.map(jnp.subtract, after.params[name], before.params[name])
        norm = math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(step)))
        assert_allclose(norm, 1e-3, rtol=1e-2)
    alone = run_update(dataclasses.replace(config, vf_coef=0.0))[2]
    assert alone["losses/critic_grad_norm"] == 0.0 < alone["losses/actor_grad_norm"]


def test_an_epoch_sees_every_transition_once():
    """Without learning, the mean over minibatches is that over the batch."""
    whole = run_update(config_of(num_minibatches=1, shuffle="transitions", learning_rate=0.0))[2]
    for shuffle in ("rows", "transitions"):
        cut = run_update(config_of(num_minibatches=4, shuffle=shuffle, learning_rate=0.0))[2]
        for name in ("losses/value_loss", "losses/entropy"):
            assert_allclose(cut[name], whole[name])


def test_entropy_bonus_raises_entropy():
    config = config_of(
        env="probe/value-continuous", ent_coef=10.0, learning_rate=0.01, anneal_lr=False
    )
    before, after, _ = run_update(config)
    log_std = lambda state: state.params["actor"]["params"]["log_std"]
    assert (log_std(after) > log_std(before) + 0.02).all()


def test_observations_are_normalised_by_one_snapshot():
    """The statistics of an update are those of the rollouts before it, for acting and learning."""
    config = config_of(env="cartpole", learning_rate=0.0, clip_eps=1e-5)
    algo = tiny.build("ppo", config)
    update = jax.jit(algo.update)
    state = jax.jit(algo.init)(jax.random.key(0))
    for i in range(3):
        state, metrics = update(state)
        assert state.obs_stats.count == (i + 1) * 32
        assert metrics["losses/clip_fraction"] == 0
    assert (state.obs_stats.var < 1).any()


def test_what_an_update_is_made_of():
    """`counter` pays 1 a step and is cut after 4: all observations of 8 steps are known."""
    config = tiny.config_of(
        "ppo", env="tiny:counter_discrete", learning_rate=0.0, num_epochs=1, num_minibatches=1,
        gae_lambda=0.7,
    )  # fmt: skip
    assert config.normalize_obs
    assert config.normalize_reward
    algo = ppo.build(config, envs.make(config.env, 4, stagger=False))
    state = jax.jit(algo.init)(jax.random.key(0))
    seen = common.Stats(jnp.array([1.0, 3.0]), jnp.array([4.0, 0.25]), jnp.float32(64))
    paid = common.Stats(jnp.float32(0), jnp.float32(4), jnp.float32(64))  # rewards are halved
    scale = state.reward_scale._replace(stats=paid)
    state = state._replace(obs_stats=seen, reward_scale=scale)
    after, metrics = jax.jit(algo.update)(state)

    count = np.array([0, 1, 2, 3] * 2)
    obs = np.stack([count, 4 - count], -1).astype(np.float32)
    next_obs = obs + np.array([1, -1], np.float32)
    critic = ppo.Critic(config, (2,))
    value_of = lambda x: np.asarray(critic.apply(state.params["critic"], seen.normalize(x)))
    value, next_value = value_of(obs), value_of(next_obs)
    advantage, trace = np.zeros(8), 0.0
    for t in reversed(range(8)):
        trace = 0.0 if count[t] == 3 else trace  # cut: it bootstraps, and the trace ends
        trace = 0.5 + config.gamma * (next_value[t] + config.gae_lambda * trace) - value[t]
        advantage[t] = trace
    close = functools.partial(assert_allclose, rtol=1e-4, atol=1e-5)
    close(metrics["losses/value_loss"], (advantage**2).mean())
    explained = 1 - advantage.var() / (advantage + value).var()
    close(metrics["losses/explained_variance"], explained)
    close(metrics["losses/policy_loss"], 0.0)  # the ratio is 1, and advantages are standardised
    rows = np.tile(obs[:, None], (1, 4, 1))
    tiny.assert_close(after.obs_stats, seen.add(rows))
    expected = scale.add(jnp.ones((8, 4)), jnp.tile((count == 3)[:, None], 4), config.gamma)
    tiny.assert_close(after.reward_scale, expected)


# --- configuration ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 3}, r"num_minibatches=3 .* 32 transitions .*num_envs=4, num_steps=8"),
        ({"num_minibatches": 16, "shuffle": "rows"}, r"num_minibatches=16 .* 8 rows"),
        ({"num_minibatches": 32}, r"num_minibatches=32 makes minibatches of one transition"),
    ],
)
def test_a_batch_that_does_not_divide_names_its_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        ppo.make_train(config_of(**changes))


def test_updates_are_rounded_up():
    assert config_of(total_timesteps=33).num_updates == 2
    assert config_of(total_timesteps=32).num_updates == 1


def test_initialisers():
    for kernel_init, check in (("orthogonal", 1.0), ("lecun_normal", None)):
        config = dataclasses.replace(
            ppo.Config(), kernel_init=kernel_init, hidden=(64,), policy_gain=0.1
        )
        actor = ppo.Actor(config, (64,), 4, discrete=True)
        params = actor.init(jax.random.key(0), jnp.ones((1, 64)))
        torso = params["params"]["Torso_0"]["Dense_0"]["kernel"]
        head = params["params"]["Dense_0"]["kernel"]
        if check:
            assert_allclose(torso.T @ torso, np.eye(64))
            assert_allclose(head.T @ head, 0.01 * np.eye(4))
        else:
            assert_allclose(torso.std(), 1 / 8, rtol=0.1)
            assert_allclose(head.std(), 0.1 / 8, rtol=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 7.0}, "gamma=7.0: it should be less than or equal to 1"),
        ({"num_epochs": 0}, "num_epochs=0: it should be greater than 0"),
        ({"num_envs": 2.0}, "num_envs=2.0: it should be a valid integer"),
        ({"shuffle": "typo"}, "shuffle='typo': it should be 'transitions' or 'rows'"),
        ({"hidden": (64, 0)}, r"hidden=\(64, 0\): it should be greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan: it should be a finite number"),
    ],
)
def test_a_config_made_in_python_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        ppo.make_train(config_of(**changes))
    with pytest.raises(ValueError, match=message):
        ppo.config_for("cartpole", **changes)


def test_config_for_is_what_the_command_line_would_run():
    config = ppo.config_for("cartpole", "cartpole_ppo", gamma=0.5)
    values = ppo.PRESETS["cartpole"] | ppo.PRESETS["cartpole_ppo"] | {"gamma": 0.5}
    assert config == ppo.Config(env="cartpole", **values)
    with pytest.raises(ValueError, match="unknown preset 'cartpole_pp': did you mean cartpole_ppo"):
        ppo.config_for("cartpole", "cartpole_pp")
    with pytest.raises(ValueError, match="unknown field 'gama': did you mean gamma"):
        ppo.config_for("cartpole", gama=0.5)


# --- images ---


def test_images_pass_a_convolution():
    """A 3 x 3 convolution with 16 channels, as jax's own computes it, then the hidden layers."""
    config = dataclasses.replace(ppo.Config(), hidden=(5,), activation="relu")
    obs = jax.random.uniform(jax.random.key(0), (2, 4 * 5 * 3))
    torso = ppo.Torso(config, (4, 5, 3))
    params = torso.init(jax.random.key(1), obs)["params"]
    x = jax.lax.conv_general_dilated(
        obs.reshape(2, 4, 5, 3),
        params["Dense_0"]["kernel"].reshape(3, 3, 3, 16),
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x).reshape(2, -1) @ params["Dense_1"]["kernel"]
    assert_allclose(torso.apply({"params": params}, obs), jax.nn.relu(x))
