"""Proximal policy optimisation: estimator, losses, distributions, exploration, optimiser."""

import dataclasses
import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy import stats
from tiny import FAST_COMPILE, assert_close, config_of

import envs
from algos import ppo
from envs.wrappers import RawEnv, raw_state

T, N = 7, 3


def close(actual, desired, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


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
    close(actual, expected, atol=1e-4)


def test_discounted_return_starts_again_after_an_episode():
    reward = jnp.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    done = jnp.array([[False, True], [False, False], [True, False]])
    carry, returns = ppo.discounted_return(jnp.array([10.0, 20.0]), reward, done, 0.5)
    close(returns, [[6.0, 11.0], [5.0, 2.0], [6.5, 5.0]])
    close(carry, [0.0, 5.0])


# --- losses ---

RATIO = np.array([0.5, 0.9, 1.1, 1.5, 0.5, 0.9, 1.1, 1.5], np.float32)
ADVANTAGE = np.array([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0], np.float32)
OLD = np.linspace(-2, 1, 8).astype(np.float32)


def test_policy_loss_by_hand():
    loss, aux = ppo.policy_loss(OLD + np.log(RATIO), OLD, ADVANTAGE, 0.2)
    surrogate = [1.0, 1.8, 2.2, 2.4, -1.6, -1.8, -2.2, -3.0]
    close(loss, -np.mean(surrogate))
    close(aux["losses/clip_fraction"], 0.5)
    close(aux["losses/approx_kl"], np.mean(RATIO - 1 - np.log(RATIO)))


def test_policy_loss_gradient():
    loss = lambda log_prob: ppo.policy_loss(log_prob, OLD, ADVANTAGE, 0.2)[0]
    log_prob = OLD + np.log(RATIO)
    check_grads(loss, (log_prob,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-3)
    grad = jax.grad(loss)(log_prob)
    expected = -RATIO * ADVANTAGE / 8
    expected[[3, 4]] = 0.0  # past the range in the direction that the advantage asks for
    close(grad, expected)


def test_value_loss_is_a_plain_mean_square():
    value, target = jnp.array([1.0, 2.0]), jnp.array([4.0, 2.0])
    close(ppo.value_loss(value, target), 4.5)
    close(jax.grad(ppo.value_loss)(value, target), [-3.0, 0.0])


# --- distributions ---


def test_categorical():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) * 3
    action = np.array([0, 2, 1, 2])
    policy = ppo.Categorical(jnp.asarray(logits))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    close(policy.log_prob(action), np.log(probs[np.arange(4), action]))
    close(policy.entropy(), stats.entropy(probs, axis=-1))
    np.testing.assert_array_equal(policy.mode(), probs.argmax(-1))
    noise = jax.random.gumbel(jax.random.key(0), (20_000, 4, 3))
    frequency = jax.nn.one_hot(policy.sample(noise), 3).mean(0)
    close(frequency, probs, atol=0.015)


def test_gaussian():
    rng = np.random.default_rng(0)
    mean, log_std, action = rng.normal(size=(3, 4, 2)).astype(np.float32)
    policy = ppo.Gaussian(jnp.asarray(mean), jnp.asarray(log_std))
    reference = stats.norm(mean, np.exp(log_std))
    close(policy.log_prob(action), reference.logpdf(action).sum(-1), rtol=1e-4)
    close(policy.entropy(), reference.entropy().sum(-1), rtol=1e-4)
    close(policy.mode(), mean)
    noise = rng.normal(size=(4, 2)).astype(np.float32)
    close(policy.sample(noise), mean + np.exp(log_std) * noise)


def gsde_policy(obs):
    config = dataclasses.replace(ppo.Config(), hidden=(6,), exploration="gsde", log_std_init=-0.5)
    actor = ppo.Actor(config, 2, discrete=False)
    params = actor.init(jax.random.key(1), obs)
    return actor, params


def test_gsde_log_std_is_the_deviation_of_its_samples():
    obs = jax.random.normal(jax.random.key(0), (3, 4))
    actor, params = gsde_policy(obs)
    policy = actor.apply(params, obs)
    noise = jax.random.normal(jax.random.key(2), (50_000, 3, 6, 2))
    action = policy.sample(noise)  # [50000, 3, 2]
    close(action.std(0), jnp.exp(policy.log_std), rtol=0.02)
    close(action.mean(0), policy.mean, atol=0.02)
    assert jnp.ptp(policy.log_std[:, 0]) > 0.05  # it depends on the state


def test_gsde_noise_does_not_bend_the_features():
    obs = jax.random.normal(jax.random.key(0), (3, 4))
    actor, params = gsde_policy(obs)
    grads = jax.grad(lambda params: actor.apply(params, obs).entropy().sum())(params)["params"]
    assert jnp.abs(grads["log_std"]).min() > 0
    assert all(jnp.all(x == 0) for x in jax.tree.leaves(grads["Torso_0"]))


# --- exploration in a rollout ---


def recorder():
    """Remembers the actions of its first 16 steps; never ends."""

    def reset(key):
        return jnp.ones(1), (jnp.int32(0), jnp.zeros((16, 2)))

    def step(key, state, action):
        t, history = state
        return jnp.ones(1), (t + 1, history.at[t].set(action)), 0.0, False, {}

    return RawEnv("recorder", reset, step, 1, (1,), 2, False, 10_000, "cached")


def run_update(config, change=lambda state: state):
    algo = ppo.build(config)
    state = change(algo.init(jax.random.key(0)))
    update = jax.jit(algo.update, compiler_options=FAST_COMPILE)
    return state, *update(state)


@pytest.mark.parametrize(
    ("exploration", "interval", "held"),
    [("iid", 4, 1), ("sticky", 3, 3), ("sticky", -1, 8), ("gsde", 3, 3), ("gsde", -1, 8)],
)
def test_noise_is_held(exploration, interval, held):
    config = config_of(
        "ppo",
        env="test_ppo:recorder",
        exploration=exploration,
        noise_interval=interval,
        policy_gain=0.0,
        num_epochs=1,
        num_minibatches=1,
    )
    _, state, _ = run_update(config)
    _, action = raw_state(state.env_state)  # [N, 16, 2]
    action = np.asarray(action[:, :8])
    block = np.arange(8) // held
    for t in range(1, 8):
        same = action[:, t] == action[:, t - 1]
        assert same.all() if block[t] == block[t - 1] else not same.any()
    assert np.unique(action[:, 0, 0]).size == len(action)  # each environment has its own noise


def test_actions_are_stored_and_scored_unclipped():
    # The environment clips to [-1, 1]; with a deviation of e^2 nearly every action is outside.
    config = config_of("ppo", env="pendulum", log_std_init=2.0, num_epochs=1, num_minibatches=1)
    _, _, metrics = run_update(dataclasses.replace(config, clip_eps=1e-5))
    assert metrics["losses/clip_fraction"] == 0
    config = dataclasses.replace(config, env="test_ppo:recorder")
    _, state, _ = run_update(config)
    assert np.abs(raw_state(state.env_state)[1]).max() > 2


# --- optimisation ---


def test_step_size_follows_progress_and_ends_at_zero():
    config = config_of("ppo", total_timesteps=4 * 32 - 5)  # rounded up to 4 updates
    train = jax.jit(ppo.make_train(config), compiler_options=FAST_COMPILE)
    metrics = train(jax.random.key(0))["metrics"]
    close(metrics["charts/learning_rate"], config.learning_rate * np.array([1, 0.75, 0.5, 0.25]))


def test_clip_range_follows_progress():
    """Half-way through the run the annealed range is half of the first one."""
    at_half = lambda state: state._replace(update=jnp.int32(2))
    common = {"total_timesteps": 4 * 32, "anneal_lr": False, "learning_rate": 0.02, "num_epochs": 4}
    config = config_of("ppo", anneal_clip=True, clip_eps=0.2, **common)
    _, annealed, metrics = run_update(config, at_half)
    config = config_of("ppo", anneal_clip=False, clip_eps=0.1, **common)
    _, constant, _ = run_update(config, at_half)
    assert_close(annealed.params, constant.params)
    assert metrics["losses/clip_fraction"] > 0.1


def test_each_network_is_clipped_by_its_own_norm():
    # With an epsilon this large a step of Adam is proportional to the clipped gradient.
    config = config_of(
        "ppo",
        num_epochs=1,
        num_minibatches=1,
        anneal_lr=False,
        learning_rate=1e3,
        adam_eps=1e3,
        max_grad_norm=1e-3,
    )
    before, after, metrics = run_update(config)
    assert metrics["losses/grad_norm"] > 1e-2  # of both before clipping
    for name in ("actor", "critic"):
        step = jax.tree.map(jnp.subtract, after.params[name], before.params[name])
        norm = math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(step)))
        close(norm, 1e-3, rtol=1e-2)


def test_one_minibatch_of_rows_is_one_of_transitions():
    config = config_of("ppo", num_epochs=1, num_minibatches=1, learning_rate=0.02)
    _, rows, _ = run_update(dataclasses.replace(config, shuffle="rows"))
    _, transitions, _ = run_update(dataclasses.replace(config, shuffle="transitions"))
    assert_close(rows.params, transitions.params, atol=1e-4)


@pytest.mark.parametrize("shuffle", ["rows", "transitions"])
def test_an_epoch_sees_every_transition_once(shuffle):
    """With a step proportional to the mean gradient, the minibatches add up to the whole batch."""
    common = {
        "shuffle": shuffle,
        "num_epochs": 1,
        "anneal_lr": False,
        "learning_rate": 1e-1,
        "adam_eps": 1e6,
        "max_grad_norm": 1e9,
        "normalize_advantage": False,
    }
    before, whole, _ = run_update(config_of("ppo", num_minibatches=1, **common))
    _, halves, _ = run_update(config_of("ppo", num_minibatches=4, **common))
    bias = lambda state: state.opt_state["critic"][1].mu["params"]["Dense_0"]["bias"]
    # Adam's moving average weighs the four minibatches 0.9^3 .. 0.9^0, so take the weights out by
    # the mean over them: all four gradients of the output bias are near each other only if each
    # minibatch is a fair quarter, and their sum is that of the batch.
    weights = 0.1 * 0.9 ** np.arange(3, -1, -1)
    assert jnp.isfinite(bias(halves)).all()
    assert abs(bias(halves)[0] / weights.sum() - bias(whole)[0] / 0.1) < 1.0


def test_entropy_bonus_raises_entropy():
    config = config_of("ppo", env="pendulum", learning_rate=1e-2, anneal_lr=False)
    log_std = lambda state: state.params["actor"]["params"]["log_std"].mean()
    _, plain, _ = run_update(dataclasses.replace(config, vf_coef=0.0))
    _, bonus, _ = run_update(dataclasses.replace(config, ent_coef=1.0))
    assert log_std(bonus) > log_std(plain) + 0.01


# --- configuration ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 3}, r"num_minibatches=3 .* 32 transitions .*num_envs=4, num_steps=8"),
        ({"num_minibatches": 16, "shuffle": "rows"}, r"num_minibatches=16 .* 8 rows"),
    ],
)
def test_a_batch_that_does_not_divide_names_its_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        ppo.build(config_of("ppo", **changes))
    with pytest.raises(ValueError, match=message):
        ppo.make_train(config_of("ppo", **changes))


def test_updates_are_rounded_up():
    assert config_of("ppo", total_timesteps=33).num_updates == 2
    assert config_of("ppo", total_timesteps=32).num_updates == 1


def test_initialisers():
    for kernel_init, check in (("orthogonal", 1.0), ("lecun_normal", None)):
        config = dataclasses.replace(
            ppo.Config(), kernel_init=kernel_init, hidden=(64,), policy_gain=0.1
        )
        params = ppo.Actor(config, 4, discrete=True).init(jax.random.key(0), jnp.ones((1, 64)))
        torso = params["params"]["Torso_0"]["Dense_0"]["kernel"]
        head = params["params"]["Dense_0"]["kernel"]
        if check:
            close(torso.T @ torso, np.eye(64))
            close(head.T @ head, 0.01 * np.eye(4))
        else:
            close(torso.std(), 1 / 8, rtol=0.1)
            close(head.std(), 0.1 / 8, rtol=0.2)


def test_observations_are_normalised_by_one_snapshot():
    """The statistics of an update are those of the rollouts before it, for acting and learning."""
    env = envs.make("cartpole", 4)
    config = config_of("ppo", learning_rate=0.0, clip_eps=1e-5)
    algo = ppo.build(config)
    update = jax.jit(algo.update, compiler_options=FAST_COMPILE)
    state = algo.init(jax.random.key(0))
    for i in range(3):
        state, metrics = update(state)
        assert state.obs_stats.count == (i + 1) * 32
        assert metrics["losses/clip_fraction"] == 0
    assert env.obs_size == len(state.obs_stats.mean)
    assert (state.obs_stats.var < 1).any()
