"""P3O: effective sample size, losses, replay, schedule."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import assert_allclose

from algos import common, launch, p3o
from algos.common import Categorical, Gaussian

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_p3o")

ess = lambda weight: p3o.effective_sample_size(jnp.log(jnp.float32(weight)))


def config_of(**changes):
    return tiny.config_of("p3o", **changes)


# --- effective sample size ---


@pytest.mark.parametrize("n", [1, 7, 1536])
@pytest.mark.parametrize("k", [1e-3, 1.0, 3.0])
def test_ess_of_equal_weights_is_one(n, k):
    assert_allclose(ess(np.full(n, k)), 1.0, atol=1e-6)


def test_ess_by_hand():
    one_hot = np.zeros(16)
    one_hot[3] = 2.0
    weights = {0.0625: one_hot, 0.9: [1, 2], 0.5: [1, 1, 0, 0], 100 / 120: [1, 2, 3, 4]}
    for expected, weight in weights.items():
        assert_allclose(ess(weight), expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 5, 30]))
def test_ess_is_the_ratio_of_moments(seed, n):
    rng = np.random.default_rng(seed)
    weight = np.exp(rng.normal(size=n))
    actual = ess(weight)
    assert_allclose(actual, weight.sum() ** 2 / (weight**2).sum() / n)
    assert_allclose(actual, 1 / (1 + weight.var() / weight.mean() ** 2))
    assert_allclose(ess(7.0 * weight), actual)
    assert_allclose(ess(rng.permutation(weight)), actual)
    assert 1 / n - 1e-6 <= actual <= 1.0


def test_ess_does_not_overflow():
    assert_allclose(p3o.effective_sample_size(jnp.full((3, 5), 200.0)), 1.0)
    assert_allclose(p3o.effective_sample_size(jnp.full((3, 5), -200.0)), 1.0)


def test_ess_of_log_normal_weights():
    z = jax.random.normal(jax.random.key(0), (1_000_000,))
    expected = math.exp(-0.25)
    assert_allclose(p3o.effective_sample_size(0.5 * z - 0.125), expected, atol=0.005)
    # two unit Gaussians half a deviation apart
    beta, pi = Gaussian(jnp.zeros(1), jnp.zeros(1)), Gaussian(jnp.full(1, 0.5), jnp.zeros(1))
    log_weight = pi.log_prob(z[:, None]) - beta.log_prob(z[:, None])
    assert_allclose(p3o.effective_sample_size(log_weight), expected, atol=0.005)
    assert_allclose(p3o.kl_divergence(pi, beta), 0.125)
    pi = Gaussian(jnp.full(1, 0.3), jnp.log(jnp.full(1, 0.9)))
    log_weight = pi.log_prob(z[:, None]) - beta.log_prob(z[:, None])
    assert_allclose((jnp.exp(log_weight) ** 2).mean(), 1.098575, atol=0.005)
    assert_allclose(p3o.effective_sample_size(log_weight), 0.910270, atol=0.005)
    assert_allclose(p3o.kl_divergence(pi, beta), 0.0553605)


def test_kl_is_bounded_by_the_population_ess():
    rng = np.random.default_rng(0)
    pi, beta = rng.normal(size=(2, 50, 4)).astype(np.float32)
    kl = p3o.kl_divergence(Categorical(pi), Categorical(beta))
    p, q = (np.asarray(jax.nn.softmax(x)) for x in (pi, beta))
    assert_allclose(kl, (p * np.log(p / q)).sum(-1), atol=1e-6)
    population = 1 / (p**2 / q).sum(-1)
    assert (kl <= -np.log(population) + 1e-6).all()
    beta = Gaussian(jnp.zeros(17), jnp.full(17, 0.3))
    pi = Gaussian(jnp.full(17, 0.25 * math.exp(0.3)), beta.log_std)
    assert_allclose(p3o.kl_divergence(pi, beta), 0.53125)
    assert_allclose(jnp.exp(-2 * p3o.kl_divergence(pi, beta)), 0.3456, atol=1e-4)


# --- returns ---


def test_lambda_return_by_hand():
    reward, value = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 1.0, 1.0, 2.0]])
    done = np.array([[False, True, False]])
    returns = partial(p3o.lambda_return, reward, done=done, gamma=0.5)
    assert_allclose(returns(value, lam=0.5), [[1.75, 2.0, 4.0]])
    assert_allclose(returns(value, lam=1.0), [[2.0, 2.0, 4.0]])
    value[0, 3] = 5.0
    assert_allclose(returns(value, lam=0.5), [[1.75, 2.0, 5.5]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_lambda_return_is_gae_plus_value(seed, gamma, lam, chance):
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(2, 5)), rng.normal(size=(2, 6))
    done = rng.random((2, 5)) < chance
    expected = np.zeros((2, 5))
    for b in range(2):
        for t in range(5):
            expected[b, t], weight = value[b, t], 1.0
            for k in range(t, 5):
                next_value = 0.0 if done[b, k] else value[b, k + 1]
                expected[b, t] += weight * (reward[b, k] + gamma * next_value - value[b, k])
                if done[b, k]:
                    break
                weight *= gamma * lam
    actual = jax.jit(p3o.lambda_return)(reward, value, done, gamma, lam)
    assert_allclose(actual, expected, atol=1e-4)


# --- losses ---


def random_batch(seed=0, b=4, t=5, actions=3):
    """Logits and values [B, T + 1] of a network, and segments of another policy."""
    rng = np.random.default_rng(seed)
    logits, beta = rng.normal(size=(2, b, t + 1, actions)).astype(np.float32)
    value = rng.normal(size=(b, t + 1)).astype(np.float32)
    segments = p3o.Segments(
        obs=np.zeros((b, t + 1, 1), np.float32),
        action=rng.integers(actions, size=(b, t)),
        policy=Categorical(beta[:, :-1]),
        reward=rng.normal(size=(b, t)).astype(np.float32),
        done=rng.random((b, t)) < 0.3,
    )
    return logits, value, segments


def on_policy(logits, segments):
    """The same segments, as if this policy had acted."""
    return segments._replace(policy=Categorical(logits[:, :-1]))


def rows(loss, logits, value, segments, config):
    """A loss, and its gradients for the logits and the values."""
    function = lambda logits, value: loss(Categorical(logits), value, segments, config)[0]
    return jax.value_and_grad(function, (0, 1))(logits, value)


def test_replaying_the_present_policy_is_the_on_policy_step():
    config = config_of(ent_coef=0.0)
    logits, value, segments = random_batch()
    segments = on_policy(logits, segments)
    aux = p3o.replay_loss(Categorical(logits), value, segments, config)[1]
    assert_allclose(aux["replay/kl_coef"], 0.0, atol=1e-6)
    assert_allclose(aux["replay/max_ratio"], 1.0, atol=1e-6)
    assert_allclose(aux["replay/kl"], 0.0, atol=1e-6)
    fresh, replayed = (
        rows(loss, logits, value, segments, config) for loss in (p3o.fresh_loss, p3o.replay_loss)
    )
    tiny.assert_close(fresh, replayed, rtol=1e-5, atol=1e-6)


def test_entropy_is_the_difference_to_the_on_policy_loss():
    config = config_of(ent_coef=0.3)
    logits, value, segments = random_batch()
    segments = on_policy(logits, segments)
    fresh, replayed = (
        rows(loss, logits, value, segments, config) for loss in (p3o.fresh_loss, p3o.replay_loss)
    )
    p = jax.nn.softmax(logits[:, :-1])
    entropy = -(p * jnp.log(p)).sum(-1)
    assert_allclose(fresh[0] - replayed[0], -0.3 * entropy.mean(), atol=1e-6)
    expected = 0.3 / entropy.size * p * (jnp.log(p) + entropy[..., None])
    assert_allclose((fresh[1][0] - replayed[1][0])[:, :-1], expected, atol=1e-6)
    config = dataclasses.replace(config, off_policy_entropy=True)
    replayed = rows(p3o.replay_loss, logits, value, segments, config)
    tiny.assert_close(fresh, replayed, rtol=1e-5, atol=1e-6)


HAND = {  # direction, reduction -> gradient of the loss for the logits of both rows
    ("pi_beta", "mean"): [(-0.0588510, 0.0588510), (0.1746784, -0.1746784)],
    ("pi_beta", "sum"): [(-0.0441726, 0.0441726), (0.1893568, -0.1893568)],
    ("beta_pi", "sum"): [(-0.0338235, 0.0338235), (0.1997059, -0.1997059)],
}


@pytest.mark.parametrize(("direction", "reduction"), HAND)
def test_two_actions_by_hand(direction, reduction):
    """Advantages 1, beta (.5, .5), pi (.8, .2), both actions taken once."""
    config = config_of(vf_coef=0.0, kl_direction=direction, kl_reduction=reduction)
    logits = jnp.log(jnp.tile(jnp.array([0.8, 0.2]), (1, 3, 1)))
    segments = p3o.Segments(
        obs=jnp.zeros((1, 3, 1)),
        action=jnp.array([[0, 1]]),
        policy=Categorical(jnp.log(jnp.full((1, 2, 2), 0.5))),
        reward=jnp.ones((1, 2)),
        done=jnp.ones((1, 2), bool),
    )
    value = jnp.zeros((1, 3))
    aux = p3o.replay_loss(Categorical(logits), value, segments, config)[1]
    kl = 0.1927448 if direction == "pi_beta" else 0.2231436
    expected = {
        "ess": 0.7352941,
        "max_ratio": 0.7352941,
        "kl_coef": 0.2647059,
        "kl": kl,
        "policy_loss": 0.4039257,
        "mean_ratio": 1.0,
        "largest_ratio": 1.6,
        "clip_fraction": 0.5,
    }
    for name, wanted in expected.items():
        assert_allclose(aux[f"replay/{name}"], wanted, atol=1e-6)
    loss, (grad, _) = rows(p3o.replay_loss, logits, value, segments, config)
    assert_allclose(grad[0, :2], HAND[direction, reduction], atol=1e-6)
    scale = 2 if reduction == "mean" else 1
    assert_allclose(loss, 0.4039257 + 0.2647059 * kl / scale, atol=1e-6)


@pytest.mark.parametrize("ess_clip", [True, False])
@pytest.mark.parametrize("adaptive_kl", [True, False])
def test_gradient_of_the_replay_loss(ess_clip, adaptive_kl):
    """-rho A (onehot - pi) / M + lambda / (M K) pi (log(pi / beta) - KL), and nothing else."""
    config = config_of(ess_clip=ess_clip, adaptive_kl=adaptive_kl, max_ratio=0.8, kl_coef=0.7)
    logits, value, segments = random_batch(1)
    _, (grad, value_grad) = rows(p3o.replay_loss, logits, value, segments, config)
    p, q = (np.asarray(jax.nn.softmax(x)) for x in (logits[:, :-1], segments.policy.logits))
    taken = np.eye(3)[segments.action]
    weight = (taken * p / q).sum(-1)
    ess = weight.sum() ** 2 / (weight**2).sum() / weight.size
    rho = np.minimum(weight, ess if ess_clip else 0.8)
    assert (rho < weight).any()
    kl_coef = 1 - ess if adaptive_kl else 0.7
    target = p3o.lambda_return(
        segments.reward, value, segments.done, config.gamma, config.gae_lambda
    )
    advantage = np.asarray(target) - value[:, :-1]
    log_ratio = np.log(p / q)
    kl = (p * log_ratio).sum(-1, keepdims=True)
    expected = -(rho * advantage)[..., None] * (taken - p) + kl_coef / 3 * p * (log_ratio - kl)
    assert_allclose(grad[:, :-1], expected / weight.size, atol=1e-6)
    # The last value is a bootstrap: no gradient. The others are regressed, without any weight.
    assert_allclose(grad[:, -1], 0.0)
    assert_allclose(value_grad[:, -1], 0.0)
    assert_allclose(value_grad[:, :-1], -2 * config.vf_coef * advantage / weight.size, atol=1e-6)


def test_value_gradient_by_hand():
    segments = p3o.Segments(
        obs=jnp.zeros((1, 4, 1)),
        action=jnp.zeros((1, 3), int),
        policy=Categorical(jnp.zeros((1, 3, 2))),
        reward=jnp.array([[1.0, 2.0, 3.0]]),
        done=jnp.array([[False, True, False]]),
    )
    value, logits = jnp.array([[1.0, 1.0, 1.0, 2.0]]), jnp.zeros((1, 4, 2)) + jnp.arange(2.0)
    config = config_of(gamma=0.5, gae_lambda=0.5, vf_coef=0.5)
    for loss in (p3o.fresh_loss, p3o.replay_loss):
        _, (_, grad) = rows(loss, logits, value, segments, config)
        assert_allclose(grad, [[-0.25, -1 / 3, -1, 0]], atol=1e-6)


def test_only_the_penalty_depends_on_beta():
    logits, value, segments = random_batch(2)

    def loss(beta):
        replayed = segments._replace(policy=Categorical(beta))
        return p3o.replay_loss(Categorical(logits), value, replayed, config)[0]

    config = config_of(adaptive_kl=False, kl_coef=0.0)
    assert_allclose(jax.grad(loss)(segments.policy.logits), 0.0)


def test_parts_of_the_fresh_loss():
    config = config_of(ent_coef=0.2, vf_coef=0.7)
    logits, value, segments = random_batch(4)
    loss, aux = p3o.fresh_loss(Categorical(logits), value, segments, config)
    target = np.asarray(
        p3o.lambda_return(segments.reward, value, segments.done, config.gamma, config.gae_lambda)
    )
    p = np.asarray(jax.nn.softmax(logits[:, :-1]))
    log_prob = np.log((np.eye(3)[segments.action] * p).sum(-1))
    advantage = target - value[:, :-1]
    expected = {
        "policy_loss": -(advantage * log_prob).mean(),
        "value_loss": (advantage**2).mean(),
        "entropy": -(p * np.log(p)).sum(-1).mean(),
        "explained_variance": 1 - advantage.var() / target.var(),
    }
    for name, wanted in expected.items():
        assert_allclose(aux[f"losses/{name}"], wanted, atol=1e-5)
    assert_allclose(
        loss,
        expected["policy_loss"] + 0.7 * expected["value_loss"] - 0.2 * expected["entropy"],
        atol=1e-5,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_replay_loss_of_a_gaussian(reduction):
    """Ratios of densities, and the plain KL whatever the reduction."""
    rng = np.random.default_rng(5)
    mean, beta_mean, action = rng.normal(size=(3, 2, 4, 2)).astype(np.float32)
    log_std, beta_log_std = (np.full((2, 4, 2), x, np.float32) for x in (-0.2, 0.1))
    segments = p3o.Segments(
        obs=np.zeros((2, 4, 1)),
        action=action[:, :-1],
        policy=Gaussian(beta_mean[:, :-1], beta_log_std[:, :-1]),
        reward=np.ones((2, 3)),
        done=np.ones((2, 3), bool),
    )
    config = config_of(kl_reduction=reduction, vf_coef=0.0)
    value = np.zeros((2, 4))
    loss, aux = p3o.replay_loss(Gaussian(mean, log_std), value, segments, config)
    density = lambda m, s: stats.norm.logpdf(action, m, np.exp(s)).sum(-1)[:, :-1]
    log_pi = density(mean, log_std)
    weight = np.exp(log_pi - density(beta_mean, beta_log_std))
    ess = weight.sum() ** 2 / (weight**2).sum() / 6
    std, beta_std = np.exp(log_std), np.exp(beta_log_std)
    kl = np.log(beta_std / std) + (std**2 + (mean - beta_mean) ** 2) / (2 * beta_std**2) - 0.5
    kl = kl.sum(-1)[:, :-1].mean()
    assert_allclose(aux["replay/kl"], kl, atol=1e-4)
    assert_allclose(aux["replay/ess"], ess, atol=1e-4)
    expected = -(np.minimum(weight, ess) * log_pi).mean() + (1 - ess) * kl
    assert_allclose(loss, expected, rtol=1e-4)


def test_huge_ratios_stay_finite():
    logits, value, segments = random_batch(6)
    beta = np.where(np.eye(3)[segments.action] > 0, -200.0, 0.0).astype(np.float32)
    segments = segments._replace(policy=Categorical(beta))
    loss, (grad, _) = rows(p3o.replay_loss, logits, value, segments, config_of())
    aux = p3o.replay_loss(Categorical(logits), value, segments, config_of())[1]
    assert common.all_finite((loss, grad, aux))
    assert_allclose(aux["replay/largest_ratio"], math.exp(20), rtol=1e-4)


def test_importance_weights_correct_the_policy_gradient():
    """Actions enumerated with beta's probabilities give pi's gradient, if nothing is clipped."""
    rng = np.random.default_rng(3)
    logits, beta, advantage = jnp.float32(rng.normal(size=(3, 4)))
    pi, beta = Categorical(logits), Categorical(beta)

    @jax.vmap
    def gradient(action, weight):
        loss = lambda x: p3o.policy_loss(Categorical(x).log_prob(action), advantage[action], weight)
        return jax.grad(loss)(logits)

    actions = jnp.arange(4)
    p, q = (jnp.exp(jax.vmap(policy.log_prob)(actions)) for policy in (pi, beta))
    assert_allclose(q @ gradient(actions, p / q), p @ gradient(actions, jnp.ones(4)), atol=1e-6)


# --- replay ---


@pytest.mark.parametrize("mean", [2.0, 0.5])
def test_replay_counts_are_poisson_numbers(mean):
    config = config_of(total_timesteps=10_029 * 32, replay_ratio=mean, replay_fraction=0.01)
    assert (config.num_slots, config.warmup_slots) == (100, 30)
    counts = p3o.replay_counts(config)
    assert counts.shape == (10_029,)
    assert not counts[:29].any()
    counts = counts[29:]
    error = 4 * math.sqrt(mean / len(counts))
    assert abs(counts.mean() - mean) < error
    assert abs(counts.var() - mean) < 3 * error
    assert abs((counts == 0).mean() - math.exp(-mean)) < 4 * 0.005
    assert (counts > 8).mean() < 1e-3


def test_warm_up_waits_for_two_rollouts():
    slots = {0.17: 1, 0.34: 2, 0.5: 2, 1.0: 2}
    for fraction, warmup_slots in slots.items():
        assert config_of(replay_fraction=fraction).warmup_slots == warmup_slots


def test_sampled_segments():
    """Row i is of environment i mod N; filled rollouts have equal chances, the others none."""
    slots, num_envs, filled, mult = 5, 3, 4, 2
    slot, column = jnp.divmod(jnp.arange(slots * num_envs), num_envs)
    keys = jax.random.split(jax.random.key(0), 500)
    sample = lambda key: p3o.sample_segments((slot, column), key, filled, num_envs, mult)
    drawn, columns = jax.jit(jax.vmap(sample))(keys)
    np.testing.assert_array_equal(columns, [list(range(num_envs)) * mult] * 500)
    for i in range(mult * num_envs):
        counts = np.bincount(drawn[:, i], minlength=slots)
        assert counts[filled:].sum() == 0
        assert stats.chisquare(counts[:filled]).pvalue > 1e-3
    assert (drawn[:, 0] != drawn[:, num_envs]).any()


def states_of(config, num_updates, change=lambda state: state):
    """States after 0 to `num_updates` updates from seed 0, and the metrics of each update."""
    algo = p3o.build(config)
    state = change(jax.jit(algo.init)(jax.random.key(0)))
    update = jax.jit(algo.update)
    states, metrics = [state], []
    for _ in range(num_updates):
        state, measured = update(state)
        states.append(state)
        metrics.append(measured)
    return states, metrics


COUNTER = {"env": "tiny:counter_discrete", "normalize_obs": False, "normalize_reward": False}


def test_replay_is_a_ring_of_rollouts():
    config = config_of(**COUNTER, replay_fraction=0.5, sample_mult=2)
    states, _ = states_of(config, 5)
    N, T = config.num_envs, config.num_steps
    assert config.num_slots == 3

    def slot(update, i):
        return jax.tree.map(lambda x: x[i * N : (i + 1) * N], states[update].replay)

    rollouts = [slot(update + 1, update % 3) for update in range(5)]
    for i, update in enumerate((3, 4, 2)):
        tiny.assert_same(slot(5, i), rollouts[update])
    assert not np.asarray(states[1].replay.obs[N:]).any()
    for k, rollout in enumerate(rollouts):
        obs, done = np.asarray(rollout.obs), np.asarray(rollout.done)
        assert obs.shape == (N, T + 1, 2)
        # time passes within a row, and a new episode begins after an end
        np.testing.assert_array_equal(obs[:, 1:, 0], np.where(done, 0, obs[:, :-1, 0] + 1))
        if k + 1 < len(rollouts):
            np.testing.assert_array_equal(obs[:, -1], rollouts[k + 1].obs[:, 0])
    np.testing.assert_array_equal(states[5].obs, rollouts[4].obs[:, -1])


def test_segments_are_what_the_agent_saw():
    """beta is the policy that acted, at what it saw; only a time limit is bootstrapped."""
    config = config_of(**COUNTER, gamma=0.9)
    (before, after), _ = states_of(config, 1)
    N = config.num_envs
    segments = jax.tree.map(lambda x: x[:N], after.replay)
    network = p3o.ActorCritic(config, (2,), 2, True)
    policy, value = network.apply(before.params, segments.obs)
    assert_allclose(segments.policy.logits, policy.logits[:, :-1])
    true_successor = segments.obs[:, :-1] + jnp.array([1.0, -1.0])
    _, value = network.apply(before.params, true_successor)
    assert segments.done.any()
    assert (abs(value) > 0.01).all()
    assert_allclose(segments.reward, np.where(segments.done, 1 + 0.9 * value, 1.0))


def test_a_failure_is_not_bootstrapped():
    config = config_of(**COUNTER | {"env": "probe/value"})
    after = states_of(config, 1)[0][1]
    segments = jax.tree.map(lambda x: x[: config.num_envs], after.replay)
    assert segments.done.all()
    assert_allclose(segments.reward, np.ones_like(segments.reward))


def test_normalised_segments():
    """Observations and rewards are stored as the statistics of their time scale them."""
    config = config_of(env="tiny:counter_discrete", replay_fraction=0.5)
    plain = config_of(**COUNTER, replay_fraction=0.5)
    N = config.num_envs
    states, raw_states = (states_of(c, 2)[0] for c in (config, plain))
    first, raw, seen = (
        jax.tree.map(lambda x: x[i * N : (i + 1) * N], run[2].replay)  # noqa: B023
        for i, run in ((0, raw_states), (1, raw_states), (1, states))
    )
    stats, scale = states[1].obs_stats, states[1].reward_scale
    rows = first.obs[:, :-1].reshape(-1, 2)
    assert_allclose(stats.mean, rows.mean(0))
    assert_allclose(stats.var, rows.var(0))
    assert_allclose(seen.obs, stats.normalize(raw.obs))
    factor = scale.factor()
    assert abs(factor - 1) > 0.05
    network = p3o.ActorCritic(config, (2,), 2, True)
    successor = stats.normalize(raw.obs[:, :-1] + jnp.array([1.0, -1.0]))
    value = config.gamma * network.apply(states[1].params, successor)[1]
    assert seen.done.any()
    assert_allclose(seen.reward, factor + np.where(seen.done, value, 0.0))


def test_what_is_not_written_yet_is_never_replayed():
    """Of a replay full of NaN only rollouts that were written are used."""
    spoil = lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
    change = lambda state: state._replace(replay=jax.tree.map(spoil, state.replay))
    config = config_of(
        **COUNTER, replay_fraction=1.0, warmup_fraction=0.3, replay_ratio=20.0, anneal_lr=False
    )
    states, metrics = states_of(config, 4, change)
    assert metrics[1]["replay/count"] > 5
    assert common.all_finite((states[4].params, metrics))
    assert_allclose([m["charts/learning_rate"] for m in metrics], [config.learning_rate] * 4)


# --- updates ---


def test_update_by_hand():
    """One step on the rollout, then `count` steps on it again: the replay holds nothing else.

    RMSprop as PyTorch has it: the mean square starts at 0 and epsilon is added to its root.
    """
    config = config_of(
        **COUNTER, replay_fraction=1 / 6, sample_mult=1, replay_ratio=3.0, ent_coef=0.1
    )
    assert config.num_slots == config.warmup_slots == 1
    (before, after), (metrics,) = states_of(config, 1)
    network = p3o.ActorCritic(config, (2,), 2, True)
    params, count = before.params, int(metrics["replay/count"])
    assert count > 0
    sums = {}
    square = jax.tree.map(jnp.zeros_like, params)
    rate = config.learning_rate * 6 / 7
    for i in range(1 + count):
        loss = p3o.replay_loss if i else p3o.fresh_loss
        loss_fn = lambda p: loss(*network.apply(p, after.replay.obs), after.replay, config)  # noqa: B023
        grads, aux = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
        norm = math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * min(1.0, 0.5 / norm), grads)  # noqa: B023
        square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, square, grads)
        params = jax.tree.map(
            lambda p, v, g: p - rate * g / (jnp.sqrt(v) + 1e-5), params, square, grads
        )
        assert norm > 0.5 or i
        aux["replay/grad_norm" if i else "losses/grad_norm"] = norm
        sums |= {name: sums.get(name, 0.0) + x for name, x in aux.items()}
    tiny.assert_close(after.params, params, rtol=1e-3, atol=1e-5)
    for name, total in sums.items():
        assert_allclose(metrics[name], total, rtol=1e-3, atol=1e-4)


def test_first_step_of_the_optimiser():
    """The mean square starts at 0, so the step is about ten times the step size, as in PyTorch."""
    (before, after), (metrics,) = states_of(config_of(**COUNTER, replay_ratio=0.0), 1)
    square = after.opt_state[1].nu
    rate = float(metrics["charts/learning_rate"])
    step = jax.tree.map(lambda x, y: abs(x - y), before.params, after.params)
    wanted = jax.tree.map(lambda v: rate * 10 * jnp.sqrt(v) / (jnp.sqrt(v) + 1e-5), square)
    tiny.assert_close(step, wanted, rtol=1e-2, atol=1e-6)
    assert metrics["losses/grad_norm"] > 0.5
    assert_allclose(100 * sum(x.sum() for x in jax.tree.leaves(square)), 0.25, atol=1e-5)


def test_schedule_follows_updates():
    config = config_of(learning_rate=1.0, total_timesteps=100 * 32)
    algo = p3o.build(config)
    update = jax.jit(algo.update)
    state = jax.jit(algo.init)(jax.random.key(0))
    rates = [
        update(state._replace(update=jnp.int32(u)))[1]["charts/learning_rate"] for u in (0, 49, 99)
    ]
    assert_allclose(rates, [100 / 101, 51 / 101, 1 / 101])


def test_nothing_is_replayed_before_the_warm_up_ends():
    """Until then the run is that of A2C; afterwards it is not."""
    config = config_of(replay_fraction=1.0, warmup_fraction=0.6, sample_mult=2)
    assert (config.num_slots, config.warmup_slots) == (6, 4)
    states, metrics = states_of(config, 6)
    counts = np.array([m["replay/count"] for m in metrics])
    np.testing.assert_array_equal(counts, p3o.replay_counts(config))
    np.testing.assert_array_equal([m["charts/replay_steps"] for m in metrics], counts)
    assert not counts[:3].any()
    assert counts.any()
    plain, measured = states_of(dataclasses.replace(config, replay_ratio=0.0), 6)
    assert plain[0].replay is None
    assert not any(name.startswith("replay/") for name in measured[0])
    for update in range(4):
        tiny.assert_close(states[update].params, plain[update].params)
    kernels = [state[6].params["params"]["actor"]["kernel"] for state in (states, plain)]
    assert (kernels[0] != kernels[1]).any()


# --- networks and configuration ---


def test_atari_network_has_the_published_size():
    config = config_of(torso="atari", hidden=(512,), activation="relu")
    network = p3o.ActorCritic(config, (84, 84, 4), 4, True)
    obs = jnp.zeros((2, 84 * 84 * 4), jnp.uint8)
    params = jax.eval_shape(network.init, jax.random.key(0), obs)
    assert sum(x.size for x in jax.tree.leaves(params)) == 865_413


@pytest.mark.slow
def test_image_network():
    """Any leading axes; one torso; the step on breakout changes every layer."""
    config = config_of(env="breakout", torso="minatar", hidden=(8,), activation="relu")
    (before, after), _ = states_of(dataclasses.replace(config, normalize_obs=False), 1)
    assert after.replay.obs.dtype == bool
    network = p3o.ActorCritic(config, (10, 10, 4), 3, True)
    obs = after.replay.obs
    policy, value = network.apply(after.params, obs)
    assert policy.logits.shape == (*obs.shape[:2], 3)
    assert value.shape == obs.shape[:2]
    single = network.apply(after.params, obs[1, 2])
    assert_allclose(single[1], value[1, 2])
    assert_allclose(single[0].logits, policy.logits[1, 2])
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), before.params, after.params)
    assert all(jax.tree.leaves(changed))


def test_first_convolution_sees_shares_of_255():
    network = p3o.ActorCritic(config_of(torso="atari", hidden=(4,)), (84, 84, 4), 4, True)
    obs = jax.random.randint(jax.random.key(1), (84 * 84 * 4,), 0, 256).astype(jnp.uint8)
    params = network.init(jax.random.key(0), obs)
    _, state = network.apply(params, obs, capture_intermediates=True)
    out = state["intermediates"]["torso"]["Dense_0"]["__call__"][0]
    kernel = params["params"]["torso"]["Dense_0"]["kernel"].reshape(8, 8, 4, 32)
    patch = obs.reshape(84, 84, 4)[4:12, 8:16] / 255.0
    assert_allclose(out[0, 1, 2], jnp.einsum("hwc,hwcf->f", patch, kernel), atol=1e-5)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (4, 2), (8, 4)])
def test_patches_times_a_matrix_are_a_convolution(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, 13, 11, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 5))
    layout = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    out = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", None, None, layout)
    assert_allclose(p3o.patches(x, size, stride) @ kernel.reshape(-1, 5), out, atol=1e-4)


@pytest.mark.parametrize("torso", ["mlp", "minatar"])
def test_initial_weights(torso):
    """Orthogonal: all singular values of a layer are its gain."""
    config = config_of(torso=torso, hidden=(8,))
    network = p3o.ActorCritic(config, (4, 4, 2), 3, True)
    layers = network.init(jax.random.key(0), jnp.zeros(32))["params"]
    shared = torso == "minatar"
    gains = {"actor": 0.01, "critic": 1.0 if shared else math.sqrt(2)}
    for name, gain in gains.items():
        assert_allclose(jnp.linalg.svd(layers[name]["kernel"])[1], gain)
    torsos = ["torso"] if shared else ["actor_torso", "critic_torso"]
    assert set(layers) == {*gains, *torsos}
    for name in torsos:
        for layer in layers[name].values():
            assert_allclose(jnp.linalg.svd(layer["kernel"])[1], math.sqrt(2), atol=1e-4)


@pytest.mark.parametrize("preset", ["a2c", "fixed_clip", "no_kl"])
def test_ablations_run(preset):
    algo = p3o.build(config_of(**p3o.PRESETS[preset]))
    state = jax.eval_shape(algo.init, jax.random.key(0))
    new_state, _ = jax.eval_shape(algo.update, state)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_bytes_of_the_replay():
    """3 rollouts of 4 environments: 9 observations, 8 actions, logits, rewards and ends."""
    state = jax.eval_shape(
        jax.vmap(p3o.build(config_of()).init), jax.random.split(jax.random.key(0))
    )
    assert launch.replay_bytes(state) == 3 * 4 * (9 * 4 * 4 + 8 * (4 + 2 * 4 + 4 + 1))
    assert launch.replay_bytes(state._replace(replay=None)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay_fraction": 0.01}, "replay_fraction=0.01 of 6 rollouts"),
        (
            {"replay_fraction": 1.0, "warmup_fraction": 1.0, "sample_mult": 1},
            "first used with 6 rollouts",
        ),
        ({"sample_mult": 7}, "sample_mult=7 .* lower it to 3"),
    ],
)
def test_impossible_replay_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes).validate()
    config_of(**changes, replay_ratio=0.0).validate()


def test_convolutions_need_images():
    with pytest.raises(ValueError, match=r"torso='minatar' needs images.*CartPole"):
        p3o.build(config_of(torso="minatar"))


# --- learning ---


@pytest.mark.slow
def test_replay_helps_on_cartpole():
    """Greedy return of the same few steps, with replay and without."""
    returns = {}
    for ratio in (2.0, 0.0):
        config = p3o.Config(total_timesteps=150_000, replay_ratio=ratio)
        rows = launch.Rows(np.arange(4), {}, [""] * 4)
        program = launch.make_program(config, tiny.LAUNCH, p3o.build, rows)
        state = program.init(*launch.row_inputs(rows))
        state, _ = program.train(state, {}, jnp.int32(config.num_updates))
        returns[ratio] = np.median(program.evaluate(state, jax.random.key(0))[0])
    assert returns[2.0] > 400
    assert returns[2.0] > returns[0.0] - 20
