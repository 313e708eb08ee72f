"""Relative entropy pathwise policy optimisation: its targets, losses and networks as functions."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import reppo
from algos.common import TanhGaussian
from algos.reppo import MAX_SAMPLE, Batch, Prediction, hl_gauss, kl_divergence

T, N = 6, 3
SUPPORT = (0.0, 150.0, 151)  # bins of width 1

assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


# --- the histogram of a target ---


def mean_of(code):
    return np.asarray(code, np.float64) @ np.linspace(*SUPPORT)


def test_code_of_a_target_has_its_mean():
    value = jax.random.uniform(jax.random.key(0), (1000,), minval=3.0, maxval=147.0)
    code = hl_gauss(value, *SUPPORT)
    assert_close(mean_of(code), value, rtol=0, atol=1e-4)
    assert_close(code.sum(-1), 1.0, rtol=0, atol=1e-6)
    assert (code >= 0).all()
    sure = np.abs(value - np.round(value)) < 0.49  # else two bins are equally near
    assert (code.argmax(-1) == np.round(value))[sure].all()


def test_code_at_the_ends_of_the_support():
    offset = jnp.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    bias = np.array([0.3688, 0.1548, 0.0470, 0.0096, 0.0013, 0.0001])
    assert_close(mean_of(hl_gauss(offset, *SUPPORT)) - offset, bias, rtol=0, atol=1e-4)
    assert_close(
        mean_of(hl_gauss(150.0 - offset, *SUPPORT)) - (150.0 - offset), -bias, rtol=0, atol=1e-4
    )
    assert_close(mean_of(hl_gauss(jnp.zeros(()), *SUPPORT)), 0.36879, rtol=0, atol=2e-5)
    outside = hl_gauss(jnp.array([-1e3, -0.1, 150.1, 1e6]), *SUPPORT)
    ends = hl_gauss(jnp.array([0.0, 0.0, 150.0, 150.0]), *SUPPORT)
    np.testing.assert_array_equal(outside, ends)


def test_code_moves_with_the_value():
    value = jnp.array([40.0, 40.3, 40.9])
    assert_close(hl_gauss(value + 1, *SUPPORT)[:, 1:], hl_gauss(value, *SUPPORT)[:, :-1], rtol=0)
    for y, entropy in ((75.0, 1.2003), (75.4, 1.2003), (0.0, 0.7447)):
        code = np.asarray(hl_gauss(jnp.float32(y), *SUPPORT), np.float64)
        code = code[code > 0]
        assert_close(-(code * np.log(code)).sum(), entropy, rtol=0, atol=1e-3)


def test_cross_entropy_is_least_at_the_code_itself():
    code = hl_gauss(jnp.float32(4.3), 0.0, 10.0, 11)
    loss = lambda logits: -(code * jax.nn.log_softmax(logits)).sum()
    assert_close(jax.grad(loss)(jnp.log(code + 1e-12)), jnp.zeros(11), atol=1e-6)
    descend = lambda logits, _: (logits - 2.0 * jax.grad(loss)(logits), None)
    logits = jax.lax.scan(descend, jnp.zeros(11), length=5000)[0]
    assert_close(jax.nn.softmax(logits), code, atol=2e-3)


# --- soft TD(lambda) ---


def episode(seed=0, **changes):
    rng = np.random.default_rng(seed)
    names = ("reward", "bonus", "next_value")
    data = {name: rng.normal(size=(T, N)).astype(np.float32) for name in names}
    data |= {name: np.zeros((T, N), bool) for name in ("terminated", "truncated")}
    return data | {"weight": np.ones((T, N), np.float32)} | changes


def targets(data, gamma=0.9, lam=0.8, mode="aligned"):
    data = {k: jnp.asarray(v) for k, v in data.items()}
    return np.asarray(reppo.soft_td_lambda(**data, gamma=gamma, lam=lam, mode=mode))


def reference(data, gamma, lam, mode):
    """Both recursions, element by element."""
    r, b, v, term, trunc, w = (np.asarray(x, np.float64) for x in data.values())
    out = np.zeros((T, N))
    for n in range(N):
        nxt, nxt_trunc, nxt_w = v[-1, n], 1.0, 1.0
        for t in reversed(range(T)):
            if mode == "aligned":
                c = 0.0 if trunc[t, n] or t == T - 1 else lam * nxt_w
                mix = b[t, n] + gamma * (c * nxt + (1 - c) * v[t, n])
                out[t, n] = r[t, n] + (1 - term[t, n]) * mix
            else:
                c = lam * nxt_w
                done = max(term[t, n], trunc[t, n])
                mix = (1 - done) * (c * nxt + (1 - c) * v[t, n])
                out[t, n] = r[t, n] + b[t, n] + gamma * (v[t, n] if nxt_trunc else mix)
            nxt, nxt_trunc, nxt_w = out[t, n], trunc[t, n], w[t, n]
    return out


@pytest.mark.parametrize("mode", ["aligned", "shifted"])
@pytest.mark.parametrize("seed", range(5))
def test_targets_are_the_double_loop(mode, seed):
    rng = np.random.default_rng(seed + 100)
    done = rng.random((T, N)) < 0.5
    terminated = done & (rng.random((T, N)) < 0.5)
    weight = rng.uniform(0.5, 1, (T, N)).astype(np.float32)
    data = episode(seed, terminated=terminated, truncated=done & ~terminated, weight=weight)
    assert_close(targets(data, 0.9, 0.7, mode), reference(data, 0.9, 0.7, mode))


@pytest.mark.parametrize("mode", ["aligned", "shifted"])
def test_limits_of_lambda(mode):
    data = episode()
    soft = data["reward"] + data["bonus"]
    assert_close(targets(data, lam=0.0, mode=mode), soft + 0.9 * data["next_value"])
    data["next_value"][-1] = 0.0
    discount = 0.9 ** np.arange(T)[:, None]
    assert_close(targets(data, lam=1.0, mode=mode)[0], (discount * soft).sum(0))
    ones = np.ones((T, N), np.float32)
    data = episode(reward=2 * ones, bonus=0 * ones, next_value=20 * ones)
    for lam in (0.0, 0.5, 1.0):
        assert_close(targets(data, lam=lam, mode=mode), 20.0)


def test_nothing_comes_after_a_termination():
    terminated = np.zeros((T, N), bool)
    terminated[2] = True
    data = episode(terminated=terminated)
    before = targets(data)
    assert_close(before[2], data["reward"][2])
    for name in ("reward", "bonus", "next_value"):
        data[name][3:] += 5.0
    for name in ("bonus", "next_value"):
        data[name][2] += 5.0
    after = targets(data)
    assert_close(after[:3], before[:3])
    assert (after[3:] != before[3:]).all()


def test_a_truncated_step_takes_its_bootstrap():
    truncated = np.zeros((T, N), bool)
    truncated[2] = True
    data = episode(truncated=truncated)
    before = targets(data)
    assert_close(before[2], data["reward"][2] + data["bonus"][2] + 0.9 * data["next_value"][2])
    data["reward"][3:] += 5.0
    assert_close(targets(data)[:3], before[:3])


def test_shifted_targets_look_one_step_ahead():
    truncated = np.zeros((T, N), bool)
    truncated[3] = True
    terminated = np.zeros((T, N), bool)
    terminated[-1] = True
    data = episode(truncated=truncated, terminated=terminated)
    before = targets(data, mode="shifted")
    one_step = data["reward"] + data["bonus"] + 0.9 * data["next_value"]
    assert_close(before[2], one_step[2])
    assert_close(before[-1], one_step[-1])  # whatever `terminated` says
    data["reward"][3] += 5.0
    kept = ~truncated
    assert_close(targets(data, mode="shifted")[kept], before[kept])


@pytest.mark.parametrize("mode", ["aligned", "shifted"])
def test_weights_on_the_trace(mode):
    zeros = np.zeros((T, N), np.float32)
    assert_close(targets(episode(weight=zeros), mode=mode), targets(episode(), lam=0.0, mode=mode))


def test_trace_weights_are_the_bounded_ratio():
    policy = TanhGaussian(jnp.zeros((1000, 2)), jnp.full((1000, 2), 0.5))
    noise = 3.0 * jax.random.normal(jax.random.key(0), (1000, 2))
    u = policy.sample(noise)
    assert_close(reppo.trace_weight(policy, policy, u, 0.5), 1.0, rtol=1e-6)
    wide = policy._replace(std=2.0 * policy.std)
    weight = reppo.trace_weight(policy, wide, u, 0.5)
    assert (weight >= 0.5).all()
    assert (weight <= 1.0).all()
    small = np.abs(u).max(1) < 3  # not clipped by the environment
    ratio = np.exp(policy.log_prob(u) - wide.log_prob(u))
    assert_close(weight[small], np.clip(ratio, 0.5, 1.0)[small])
    broken = policy._replace(mean=policy.mean * jnp.nan)
    assert_close(reppo.trace_weight(broken, wide, u, 0.5), 0.5)


# --- the squashed Gaussian ---


def test_density_of_the_squashed_gaussian():
    policy = TanhGaussian(jnp.array([0.3]), jnp.array([0.7]))
    action = np.tanh(policy.sample(jax.random.normal(jax.random.key(0), (1_000_000, 1))))[:, 0]
    edges = np.linspace(-0.95, 0.95, 20)
    density = np.histogram(action, edges)[0] / len(action) / 0.1
    inside = edges[:-1, None] + 0.1 * (np.arange(20) + 0.5) / 20  # the mean density of a bin
    exact = np.exp(policy.log_prob(jnp.arctanh(jnp.asarray(inside))[..., None])).mean(1)
    assert_close(density[exact > 0.3], exact[exact > 0.3], rtol=0.02)
    u = np.linspace(-6, 6, 20_001)
    mass = np.exp(policy.log_prob(jnp.asarray(u)[:, None])) * (1 - np.tanh(u) ** 2)
    assert_close(np.trapezoid(mass, u), 1.0, atol=1e-3)


def test_log_prob_from_the_sample_is_that_of_the_action():
    policy = TanhGaussian(jnp.array([0.3, -1.0]), jnp.array([0.7, 1.5]))
    u = jax.random.uniform(jax.random.key(1), (500, 2), minval=-4, maxval=4)
    z = (np.asarray(u, np.float64) - policy.mean) / policy.std
    normal = -0.5 * z**2 - np.log(policy.std) - 0.5 * np.log(2 * np.pi)
    slope = np.log1p(-(np.tanh(np.asarray(u, np.float64)) ** 2))
    assert_close(policy.log_prob(u), (normal - slope).sum(-1), rtol=1e-4, atol=1e-4)
    again = jnp.arctanh(jnp.tanh(u))
    assert_close(policy.log_prob(again), policy.log_prob(u), rtol=5e-3, atol=5e-3)
    assert np.isfinite(policy.log_prob(jnp.array([[50.0, -50.0]]))).all()


OLD = TanhGaussian(jnp.array([0.2, -0.1]), jnp.array([0.5, 0.4]))
NEW = TanhGaussian(jnp.array([0.3, 0.1]), jnp.array([0.6, 0.3]))


@pytest.mark.parametrize("estimator", ["sampled", "unclipped", "exact"])
def test_equal_policies_have_no_kl(estimator):
    noise = jax.random.normal(jax.random.key(0), (16, 2))
    assert kl_divergence(OLD, OLD, noise, estimator) == 0


@pytest.mark.parametrize("estimator", ["sampled", "unclipped"])
@pytest.mark.parametrize(("p", "q"), [(OLD, NEW), (NEW, OLD)], ids=["forward", "reverse"])
def test_mean_of_the_estimates_is_the_exact_kl(estimator, p, q):
    noise = jax.random.normal(jax.random.key(0), (16, 20_000, 2))
    wide = lambda x: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (20_000, 2)), x)
    kl = np.asarray(kl_divergence(wide(p), wide(q), noise, estimator), np.float64)
    exact = float(kl_divergence(p, q, None, "exact"))
    so, sn = np.asarray(p.std), np.asarray(q.std)
    by_hand = np.log(sn / so) + (so**2 + np.asarray(p.mean - q.mean) ** 2) / (2 * sn**2) - 0.5
    assert_close(exact, by_hand.sum())
    assert abs(kl.mean() - exact) < 3 * kl.std() / math.sqrt(len(kl))


def test_spread_of_the_estimates_under_a_shift():
    one = jnp.ones((20_000, 1))
    old, new = TanhGaussian(0 * one, 0.5 * one), TanhGaussian(0.2 * one, 0.5 * one)
    noise = jax.random.normal(jax.random.key(0), (16, 20_000, 1))
    kl = kl_divergence(old, new, noise, "sampled")
    assert_close(kl.std(), math.sqrt(2 * 0.08 / 16), rtol=0.03)


def test_saturated_policies_show_the_published_clipping():
    policy = TanhGaussian(jnp.array([4.0]), jnp.array([1.0]))
    noise = jax.random.normal(jax.random.key(0), (20_000, 1))
    z, tail = np.linspace(MAX_SAMPLE - 4, 10, 100_001), MAX_SAMPLE - 4
    excess = -0.5 * (z**2 - tail**2) + 2 * (z - tail)  # of the log-density, where tanh is flat
    expected = np.trapezoid(excess * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi), z)
    assert_close(kl_divergence(policy, policy, noise, "sampled"), expected, rtol=0, atol=5e-3)
    assert expected > 0.05
    assert kl_divergence(policy, policy, noise, "unclipped") == 0
    assert kl_divergence(policy, policy, noise, "exact") == 0


# --- the actor's loss ---

VALUE, LOG_PROB = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, -0.5, 1.0])
KL = jnp.array([0.05, 0.1, 0.3])


def actor_loss(mode, bound=0.1, value=VALUE):
    return reppo.policy_loss(value, LOG_PROB, KL, 0.2, 0.5, bound, mode)


def test_gate_is_closed_at_the_bound():
    loss, gated = actor_loss("clipped")
    assert gated.tolist() == [False, True, True]
    assert_close(loss, [0.2 * 0.5 - 1.0, 0.05, 0.15])
    assert reppo.policy_loss(VALUE, LOG_PROB, KL * jnp.nan, 0.2, 0.5, 0.1, "clipped")[1].all()


def test_limits_of_the_gate():
    assert_close(actor_loss("clipped", jnp.inf)[0], actor_loss("value")[0])
    assert_close(actor_loss("full")[0] - actor_loss("value")[0], 0.5 * KL)
    grad = jax.grad(lambda value: actor_loss("clipped", -jnp.inf, value)[0].sum())(VALUE)
    assert_close(grad, 0.0)
    assert_close(actor_loss("clipped", -jnp.inf, VALUE + 7)[0], actor_loss("clipped", -jnp.inf)[0])


@pytest.mark.parametrize(("entropy", "kl"), [(-1.0, 0.3), (1.0, 0.02)])
def test_multipliers_follow_their_constraints(entropy, kl):
    target_entropy, bound = -0.5, 0.1

    def loss(duals, entropy, kl):
        alpha, beta = jnp.exp(duals)
        return sum(reppo.dual_losses(alpha, beta, entropy - target_entropy, bound - kl))

    duals = jnp.log(jnp.array([0.2, 0.7]))
    grad, *forces = jax.grad(loss, (0, 1, 2))(duals, entropy, kl)
    assert_close(grad, [0.2 * (entropy + 0.5), -0.7 * (kl - 0.1)])
    assert_close(forces, 0.0)  # on the policy
    alpha_rises, beta_rises = grad < 0
    assert alpha_rises == (entropy < target_entropy)
    assert beta_rises == (kl > bound)


def test_multipliers_have_no_gradient_from_the_policy_loss():
    def loss(duals):
        return reppo.policy_loss(VALUE, LOG_PROB, KL, *duals, 0.1, "full")[0].sum()

    assert_close(jax.grad(loss)(jnp.array([0.2, 0.5])), 0.0)


def test_gradient_goes_through_the_action():
    """Q = g a with a fixed deviation and no entropy: the gradient of the mean is -g E[1 - a^2]."""
    g, std = jnp.array([1.5, -0.5]), jnp.array([0.3, 0.8])
    noise = jax.random.normal(jax.random.key(0), (200_000, 2))

    def loss(mean):
        policy = TanhGaussian(mean, std)
        u = policy.sample(noise)
        value, zero = jnp.tanh(u) @ g, jnp.zeros(len(noise))
        return reppo.policy_loss(value, policy.log_prob(u), zero, 0.0, 1.0, 0.1, "clipped")[
            0
        ].mean()

    mean = jnp.array([0.4, -0.7])
    z = np.linspace(-8, 8, 4001)[:, None]
    slope = 1 - np.tanh(np.asarray(mean) + np.asarray(std) * z) ** 2
    expected = -g * np.trapezoid(
        slope * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi), z[:, 0], axis=0
    )
    assert_close(jax.grad(loss)(mean), expected, atol=5e-3)


# --- what the critic learns from ---

B, H = 4, 3


def critic_batch(**changes):
    batch = Batch(
        obs=jnp.zeros((B, 2)),
        action=jnp.zeros((B, 1)),
        policy=TanhGaussian(jnp.zeros((B, 1)), jnp.ones((B, 1))),
        reward=jnp.arange(B) / 4,
        terminated=jnp.zeros(B, bool),
        valid=jnp.ones(B, bool),
        has_target=jnp.ones(B, bool),
        target=jnp.array([1.0, 2.0, 3.0, 4.0]),
        next_features=jax.random.normal(jax.random.key(1), (B, H)),
    )
    return batch._replace(**changes)


def prediction():
    keys = jax.random.split(jax.random.key(2))
    logits = jax.random.normal(keys[0], (B, 11))
    value = jax.nn.softmax(logits) @ jnp.linspace(0.0, 10.0, 11)
    return Prediction(value, logits, jnp.zeros((B, H)), jax.random.normal(keys[1], (B, 1 + H)))


def critic_error(batch, mult=1.0, prediction=prediction):
    return reppo.critic_loss(prediction(), batch, 0.0, 10.0, mult)[0]


def test_masked_samples_teach_nothing():
    batch = critic_batch(has_target=jnp.array([True, False, True, True]))
    loss = lambda p: reppo.critic_loss(p, batch, 0.0, 10.0, 1.0)[0]
    grads = jax.grad(loss)(prediction())
    assert not grads.logits[1].any()
    assert not grads.predicted[1].any()
    assert grads.logits[2].any()
    assert grads.predicted[2].any()
    other = batch._replace(target=batch.target.at[1].add(5.0))
    assert_close(critic_error(other), critic_error(batch))
    # the mean is over the whole minibatch
    full = [critic_error(critic_batch(has_target=jnp.arange(B) == i)) for i in range(B)]
    assert_close(sum(full), critic_error(critic_batch()))


def test_critic_loss_by_hand():
    batch, p = critic_batch(), prediction()
    code = np.asarray(hl_gauss(batch.target, 0.0, 10.0, 11))
    cross = -(code * np.asarray(jax.nn.log_softmax(p.logits))).sum(-1)
    wanted = np.concatenate([np.asarray(batch.reward)[:, None], batch.next_features], 1)
    auxiliary = ((np.asarray(p.predicted) - wanted) ** 2).sum(1) / (H + 1)
    assert_close(critic_error(batch, 0.0), cross.mean())
    assert_close(critic_error(batch, 2.0), (cross + 2 * auxiliary).mean())
    alone = lambda: p._replace(predicted=None)
    assert_close(critic_error(batch._replace(next_features=None), 0.0, alone), cross.mean())


def test_nothing_is_predicted_past_the_end_of_an_episode():
    terminated = jnp.array([True, False, False, False])
    batch = critic_batch(terminated=terminated)
    other = batch._replace(next_features=batch.next_features.at[0].add(9.0))
    assert_close(critic_error(other), critic_error(batch))
    other = batch._replace(next_features=batch.next_features.at[1].add(9.0))
    assert critic_error(other) > critic_error(batch) + 1


def test_scalar_critic_is_a_plain_mean_square():
    scalar = lambda: Prediction(jnp.array([1.0, 2.0, 3.0, 0.0]), None, None, None)
    assert_close(critic_error(critic_batch(next_features=None), 0.0, scalar), 16 / 4)
    config = dataclasses.replace(reppo.Config(), critic_loss="mse", critic_width=8)
    critic = reppo.Critic(config)
    params = critic.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)))
    assert critic.apply(params, jnp.zeros((5, 3)), jnp.zeros((5, 2))).value.shape == (5,)


# --- networks ---


@pytest.mark.parametrize(("vmin", "vmax"), [(0.0, 150.0), (-10.0, 10.0)])
def test_initial_value(vmin, vmax):
    obs, action = jax.random.normal(jax.random.key(0), (100, 17)), jnp.zeros((100, 6))
    for zero_init in (True, False):
        config = dataclasses.replace(reppo.Config(), vmin=vmin, vmax=vmax, zero_init=zero_init)
        critic = reppo.Critic(config)
        value = critic.apply(critic.init(jax.random.key(1), obs[:1], action[:1]), obs, action).value
        if zero_init:
            assert jnp.abs(value).max() < 1e-4 * (vmax - vmin)
        else:
            assert_close(value.mean(), (vmin + vmax) / 2, rtol=0, atol=0.02 * (vmax - vmin))


@pytest.mark.parametrize(
    ("obs_size", "action_size", "actor", "critic"),
    [(5, 1, 267_780, 1_133_871), (17, 6, 279_054, 1_142_575), (67, 21, 320_044, 1_175_855)],
)
def test_published_sizes_of_the_networks(obs_size, action_size, actor, critic):
    config = reppo.Config()
    obs, action = jnp.zeros((1, obs_size)), jnp.zeros((1, action_size))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    net = reppo.Actor(config, obs_size, action_size)
    multipliers = 2
    assert count(jax.eval_shape(net.init, jax.random.key(0), obs)) + multipliers == actor
    assert (
        count(jax.eval_shape(reppo.Critic(config).init, jax.random.key(0), obs, action)) == critic
    )


def test_smallest_deviation_is_passed_on():
    obs = jnp.ones((1, 3))
    for min_std in (0.0, 0.1):
        net = reppo.Actor(dataclasses.replace(reppo.Config(), hidden=(4,), min_std=min_std), 3, 2)
        params = net.init(jax.random.key(0), obs)
        params = jax.tree.map(jnp.zeros_like, params)
        params["params"]["Dense_0"]["bias"] = jnp.array([0.0, 0.0, -50.0, -50.0])
        assert_close(net.apply(params, obs).std, min_std, atol=1e-8)
