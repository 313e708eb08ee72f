"""Relative entropy pathwise policy optimisation: critic, targets, actor loss, multipliers."""

import dataclasses
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from algos import reppo
from algos.common import TanhGaussian
from algos.reppo import (
    MAX_SAMPLE,
    Batch,
    Prediction,
    hl_gauss,
    kl_divergence,
)
from envs.wrappers import RawEnv, raw_state

T, N = 6, 3
SUPPORT = (0.0, 150.0, 151)  # bins of width 1


# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_reppo")

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def config_of(**changes):
    return tiny.config_of("reppo", **({"reward_scale": 1.0, "anneal_lr": False} | changes))


def run_update(**changes):
    """State before and after one update, and its metrics."""
    return tiny.run_update("reppo", **({"reward_scale": 1.0, "anneal_lr": False} | changes))


# A single gradient step that climbs everywhere, whose diagnostics are exact.
ONE = {
    "num_epochs": 1,
    "num_minibatches": 1,
    "kl_mode": "value",
    "kl_estimator": "unclipped",
    "zero_init": False,
}


# --- the histogram of a target ---


def mean_of(code):
    return np.asarray(code, np.float64) @ np.linspace(*SUPPORT)


def test_code_of_a_target_has_its_mean():
    value = jax.random.uniform(jax.random.key(0), (1000,), minval=3.0, maxval=147.0)
    code = hl_gauss(value, *SUPPORT)
    close(mean_of(code), value, rtol=0, atol=1e-4)
    close(code.sum(-1), 1.0, rtol=0, atol=1e-6)
    assert (code >= 0).all()
    sure = np.abs(value - np.round(value)) < 0.49  # else two bins are equally near
    assert (code.argmax(-1) == np.round(value))[sure].all()


def test_code_at_the_ends_of_the_support():
    offset = jnp.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    bias = np.array([0.3688, 0.1548, 0.0470, 0.0096, 0.0013, 0.0001])
    close(mean_of(hl_gauss(offset, *SUPPORT)) - offset, bias, rtol=0, atol=1e-4)
    close(mean_of(hl_gauss(150.0 - offset, *SUPPORT)) - (150.0 - offset), -bias, rtol=0, atol=1e-4)
    close(mean_of(hl_gauss(jnp.zeros(()), *SUPPORT)), 0.36879, rtol=0, atol=2e-5)
    outside = hl_gauss(jnp.array([-1e3, -0.1, 150.1, 1e6]), *SUPPORT)
    ends = hl_gauss(jnp.array([0.0, 0.0, 150.0, 150.0]), *SUPPORT)
    np.testing.assert_array_equal(outside, ends)


def test_code_moves_with_the_value():
    value = jnp.array([40.0, 40.3, 40.9])
    close(hl_gauss(value + 1, *SUPPORT)[:, 1:], hl_gauss(value, *SUPPORT)[:, :-1], rtol=0)
    for y, entropy in ((75.0, 1.2003), (75.4, 1.2003), (0.0, 0.7447)):
        code = np.asarray(hl_gauss(jnp.float32(y), *SUPPORT), np.float64)
        code = code[code > 0]
        close(-(code * np.log(code)).sum(), entropy, rtol=0, atol=1e-3)


def test_cross_entropy_is_least_at_the_code_itself():
    code = hl_gauss(jnp.float32(4.3), 0.0, 10.0, 11)
    loss = lambda logits: -(code * jax.nn.log_softmax(logits)).sum()
    close(jax.grad(loss)(jnp.log(code + 1e-12)), jnp.zeros(11), atol=1e-6)
    descend = lambda logits, _: (logits - 2.0 * jax.grad(loss)(logits), None)
    logits = jax.lax.scan(descend, jnp.zeros(11), length=5000)[0]
    close(jax.nn.softmax(logits), code, atol=2e-3)


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
    close(targets(data, 0.9, 0.7, mode), reference(data, 0.9, 0.7, mode))


@pytest.mark.parametrize("mode", ["aligned", "shifted"])
def test_limits_of_lambda(mode):
    data = episode()
    soft = data["reward"] + data["bonus"]
    close(targets(data, lam=0.0, mode=mode), soft + 0.9 * data["next_value"])
    data["next_value"][-1] = 0.0
    discount = 0.9 ** np.arange(T)[:, None]
    close(targets(data, lam=1.0, mode=mode)[0], (discount * soft).sum(0))
    ones = np.ones((T, N), np.float32)
    data = episode(reward=2 * ones, bonus=0 * ones, next_value=20 * ones)
    for lam in (0.0, 0.5, 1.0):
        close(targets(data, lam=lam, mode=mode), 20.0)


def test_nothing_comes_after_a_termination():
    terminated = np.zeros((T, N), bool)
    terminated[2] = True
    data = episode(terminated=terminated)
    before = targets(data)
    close(before[2], data["reward"][2])
    for name in ("reward", "bonus", "next_value"):
        data[name][3:] += 5.0
    for name in ("bonus", "next_value"):
        data[name][2] += 5.0
    after = targets(data)
    close(after[:3], before[:3])
    assert (after[3:] != before[3:]).all()


def test_a_truncated_step_takes_its_bootstrap():
    truncated = np.zeros((T, N), bool)
    truncated[2] = True
    data = episode(truncated=truncated)
    before = targets(data)
    close(before[2], data["reward"][2] + data["bonus"][2] + 0.9 * data["next_value"][2])
    data["reward"][3:] += 5.0
    close(targets(data)[:3], before[:3])


def test_shifted_targets_look_one_step_ahead():
    truncated = np.zeros((T, N), bool)
    truncated[3] = True
    terminated = np.zeros((T, N), bool)
    terminated[-1] = True
    data = episode(truncated=truncated, terminated=terminated)
    before = targets(data, mode="shifted")
    one_step = data["reward"] + data["bonus"] + 0.9 * data["next_value"]
    close(before[2], one_step[2])
    close(before[-1], one_step[-1])  # whatever `terminated` says
    data["reward"][3] += 5.0
    kept = ~truncated
    close(targets(data, mode="shifted")[kept], before[kept])


@pytest.mark.parametrize("mode", ["aligned", "shifted"])
def test_weights_on_the_trace(mode):
    zeros = np.zeros((T, N), np.float32)
    close(targets(episode(weight=zeros), mode=mode), targets(episode(), lam=0.0, mode=mode))


def test_trace_weights_are_the_bounded_ratio():
    policy = TanhGaussian(jnp.zeros((1000, 2)), jnp.full((1000, 2), 0.5))
    noise = 3.0 * jax.random.normal(jax.random.key(0), (1000, 2))
    u = policy.sample(noise)
    close(reppo.trace_weight(policy, policy, u, 0.5), 1.0, rtol=1e-6)
    wide = policy._replace(std=2.0 * policy.std)
    weight = reppo.trace_weight(policy, wide, u, 0.5)
    assert (weight >= 0.5).all()
    assert (weight <= 1.0).all()
    small = np.abs(u).max(1) < 3  # not clipped by the environment
    ratio = np.exp(policy.log_prob(u) - wide.log_prob(u))
    close(weight[small], np.clip(ratio, 0.5, 1.0)[small])
    broken = policy._replace(mean=policy.mean * jnp.nan)
    close(reppo.trace_weight(broken, wide, u, 0.5), 0.5)


# --- the squashed Gaussian ---


def test_density_of_the_squashed_gaussian():
    policy = TanhGaussian(jnp.array([0.3]), jnp.array([0.7]))
    action = np.tanh(policy.sample(jax.random.normal(jax.random.key(0), (1_000_000, 1))))[:, 0]
    edges = np.linspace(-0.95, 0.95, 20)
    density = np.histogram(action, edges)[0] / len(action) / 0.1
    inside = edges[:-1, None] + 0.1 * (np.arange(20) + 0.5) / 20  # the mean density of a bin
    exact = np.exp(policy.log_prob(jnp.arctanh(jnp.asarray(inside))[..., None])).mean(1)
    close(density[exact > 0.3], exact[exact > 0.3], rtol=0.02)
    u = np.linspace(-6, 6, 20_001)
    mass = np.exp(policy.log_prob(jnp.asarray(u)[:, None])) * (1 - np.tanh(u) ** 2)
    close(np.trapezoid(mass, u), 1.0, atol=1e-3)


def test_log_prob_from_the_sample_is_that_of_the_action():
    policy = TanhGaussian(jnp.array([0.3, -1.0]), jnp.array([0.7, 1.5]))
    u = jax.random.uniform(jax.random.key(1), (500, 2), minval=-4, maxval=4)
    z = (np.asarray(u, np.float64) - policy.mean) / policy.std
    normal = -0.5 * z**2 - np.log(policy.std) - 0.5 * np.log(2 * np.pi)
    slope = np.log1p(-(np.tanh(np.asarray(u, np.float64)) ** 2))
    close(policy.log_prob(u), (normal - slope).sum(-1), rtol=1e-4, atol=1e-4)
    again = jnp.arctanh(jnp.tanh(u))
    close(policy.log_prob(again), policy.log_prob(u), rtol=5e-3, atol=5e-3)
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
    close(exact, by_hand.sum())
    assert abs(kl.mean() - exact) < 3 * kl.std() / math.sqrt(len(kl))


def test_spread_of_the_estimates_under_a_shift():
    one = jnp.ones((20_000, 1))
    old, new = TanhGaussian(0 * one, 0.5 * one), TanhGaussian(0.2 * one, 0.5 * one)
    noise = jax.random.normal(jax.random.key(0), (16, 20_000, 1))
    kl = kl_divergence(old, new, noise, "sampled")
    close(kl.std(), math.sqrt(2 * 0.08 / 16), rtol=0.03)


def test_saturated_policies_show_the_published_clipping():
    policy = TanhGaussian(jnp.array([4.0]), jnp.array([1.0]))
    noise = jax.random.normal(jax.random.key(0), (20_000, 1))
    z, tail = np.linspace(MAX_SAMPLE - 4, 10, 100_001), MAX_SAMPLE - 4
    excess = -0.5 * (z**2 - tail**2) + 2 * (z - tail)  # of the log-density, where tanh is flat
    expected = np.trapezoid(excess * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi), z)
    close(kl_divergence(policy, policy, noise, "sampled"), expected, rtol=0, atol=5e-3)
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
    close(loss, [0.2 * 0.5 - 1.0, 0.05, 0.15])
    assert reppo.policy_loss(VALUE, LOG_PROB, KL * jnp.nan, 0.2, 0.5, 0.1, "clipped")[1].all()


def test_limits_of_the_gate():
    close(actor_loss("clipped", jnp.inf)[0], actor_loss("value")[0])
    close(actor_loss("full")[0] - actor_loss("value")[0], 0.5 * KL)
    grad = jax.grad(lambda value: actor_loss("clipped", -jnp.inf, value)[0].sum())(VALUE)
    close(grad, 0.0)
    close(actor_loss("clipped", -jnp.inf, VALUE + 7)[0], actor_loss("clipped", -jnp.inf)[0])


@pytest.mark.parametrize(("entropy", "kl"), [(-1.0, 0.3), (1.0, 0.02)])
def test_multipliers_follow_their_constraints(entropy, kl):
    target_entropy, bound = -0.5, 0.1

    def loss(duals, entropy, kl):
        alpha, beta = jnp.exp(duals)
        return sum(reppo.dual_losses(alpha, beta, entropy - target_entropy, bound - kl))

    duals = jnp.log(jnp.array([0.2, 0.7]))
    grad, *forces = jax.grad(loss, (0, 1, 2))(duals, entropy, kl)
    close(grad, [0.2 * (entropy + 0.5), -0.7 * (kl - 0.1)])
    close(forces, 0.0)  # on the policy
    alpha_rises, beta_rises = grad < 0
    assert alpha_rises == (entropy < target_entropy)
    assert beta_rises == (kl > bound)


def test_multipliers_have_no_gradient_from_the_policy_loss():
    def loss(duals):
        return reppo.policy_loss(VALUE, LOG_PROB, KL, *duals, 0.1, "full")[0].sum()

    close(jax.grad(loss)(jnp.array([0.2, 0.5])), 0.0)


@pytest.mark.parametrize("tuned", [True, False])
def test_multipliers_move_only_if_tuned(tuned):
    before, after, metrics = run_update(**({} if tuned else SCALAR), learning_rate=0.01)
    for name, old in before.params["actor"]["duals"].items():
        new = after.params["actor"]["duals"][name]
        assert (old != new) == tuned
        close(metrics[f"losses/{name}"], np.exp(new))
    moved = jax.tree.map(
        lambda x, y: bool((x != y).any()),
        before.params["actor"]["net"],
        after.params["actor"]["net"],
    )
    assert all(jax.tree.leaves(moved))


def test_multipliers_have_their_own_step_size():
    runs = [run_update(**ONE, learning_rate=1e-3, dual_lr_mult=factor) for factor in (1.0, 5.0)]
    steps = [
        after.params["actor"]["duals"]["temperature"]
        - before.params["actor"]["duals"]["temperature"]
        for before, after, _ in runs
    ]
    close(steps[1], 5.0 * steps[0], rtol=1e-3)
    tiny.assert_same(runs[0][1].params["actor"]["net"], runs[1][1].params["actor"]["net"])


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
    close(jax.grad(loss)(mean), expected, atol=5e-3)


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
    close(critic_error(other), critic_error(batch))
    # the mean is over the whole minibatch
    full = [critic_error(critic_batch(has_target=jnp.arange(B) == i)) for i in range(B)]
    close(sum(full), critic_error(critic_batch()))


def test_critic_loss_by_hand():
    batch, p = critic_batch(), prediction()
    code = np.asarray(hl_gauss(batch.target, 0.0, 10.0, 11))
    cross = -(code * np.asarray(jax.nn.log_softmax(p.logits))).sum(-1)
    wanted = np.concatenate([np.asarray(batch.reward)[:, None], batch.next_features], 1)
    auxiliary = ((np.asarray(p.predicted) - wanted) ** 2).sum(1) / (H + 1)
    close(critic_error(batch, 0.0), cross.mean())
    close(critic_error(batch, 2.0), (cross + 2 * auxiliary).mean())
    alone = lambda: p._replace(predicted=None)
    close(critic_error(batch._replace(next_features=None), 0.0, alone), cross.mean())


def test_nothing_is_predicted_past_the_end_of_an_episode():
    terminated = jnp.array([True, False, False, False])
    batch = critic_batch(terminated=terminated)
    other = batch._replace(next_features=batch.next_features.at[0].add(9.0))
    close(critic_error(other), critic_error(batch))
    other = batch._replace(next_features=batch.next_features.at[1].add(9.0))
    assert critic_error(other) > critic_error(batch) + 1


def test_scalar_critic_is_a_plain_mean_square():
    scalar = lambda: Prediction(jnp.array([1.0, 2.0, 3.0, 0.0]), None, None, None)
    close(critic_error(critic_batch(next_features=None), 0.0, scalar), 16 / 4)
    config = dataclasses.replace(reppo.Config(), critic_loss="mse", critic_width=8)
    critic = reppo.Critic(config)
    params = critic.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)))
    assert critic.apply(params, jnp.zeros((5, 3)), jnp.zeros((5, 2))).value.shape == (5,)


def test_no_prediction_is_stored_or_learned_without_its_weight():
    config = config_of(aux_loss_mult=0.0)
    algo = reppo.build(config)
    state = jax.eval_shape(algo.init, jax.random.key(0))
    with_head = jax.eval_shape(reppo.build(config_of()).init, jax.random.key(0))
    count = lambda state: len(jax.tree.leaves(state.params["critic"]))
    assert count(state) < count(with_head)
    assert jax.eval_shape(algo.update, state)[1]["losses/aux_loss"].shape == ()


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
            close(value.mean(), (vmin + vmax) / 2, rtol=0, atol=0.02 * (vmax - vmin))


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
        close(net.apply(params, obs).std, min_std, atol=1e-8)


# --- observations ---


def recorder():
    """Observations that wander; remembers them and the actions of its first 32 steps."""

    def reset(key):
        obs = 3.0 * jax.random.normal(key, (2,)) + 5.0
        return obs, (jnp.int32(0), obs, jnp.zeros((32, 2)), jnp.zeros((32, 2)))

    def step(key, state, action):
        t, obs, seen, done = state
        obs = 0.9 * obs + jax.random.normal(key, (2,))
        return obs, (t + 1, obs, seen.at[t].set(obs), done.at[t].set(action)), 0.0, False, {}

    return RawEnv("recorder", reset, step, 2, (2,), 2, False, 10_000, "cached")


def test_statistics_include_the_observation_that_they_standardise():
    """With next to no noise an action is the mean at the observation, standardised at its step."""
    config = config_of(
        env="test_reppo:recorder", learning_rate=0.0, noise_min=1e-6, noise_max=1e-6, trace_min=1.0
    )
    algo = reppo.build(config)
    start = jax.jit(algo.init)(jax.random.key(0))
    state = start
    for _ in range(2):
        state, _ = jax.jit(algo.update)(state)
    _, _, seen, actions = raw_state(state.env_state)  # [N, 32, 2]
    seen = np.concatenate([np.asarray(start.obs)[:, None], seen[:, :16]], 1)
    close(state.obs_stats.mean, seen.reshape(-1, 2).mean(0))
    close(state.obs_stats.var, seen.reshape(-1, 2).var(0))
    assert state.obs_stats.count == seen.shape[0] * 17
    actor = reppo.Actor(config, 2, 2)
    for t in range(16):
        past = seen[:, : t + 1].reshape(-1, 2)
        inputs = (seen[:, t] - past.mean(0)) / np.sqrt(past.var(0) + 1e-2)
        mean = actor.apply(start.params["actor"]["net"], jnp.asarray(inputs)).mean
        close(actions[:, t], np.clip(np.tanh(mean), -0.999, 0.999), atol=2e-4)


# --- bookkeeping ---


@pytest.mark.parametrize(("preset", "updates"), [("large", 382), ("medium", 763), ("small", 1526)])
def test_published_sizes_of_a_run(preset, updates):
    config = dataclasses.replace(reppo.Config(), **reppo.PRESETS[f"dmc_{preset}"])
    assert config.num_updates == updates
    gradient_steps = config.num_epochs * config.num_minibatches
    assert config.steps_per_update / gradient_steps == 256
    assert config.steps_per_update // config.num_minibatches == 2048


def test_an_epoch_sees_every_transition_once():
    """Without learning, the mean over minibatches is that over the batch."""
    whole = run_update(**ONE, learning_rate=0.0)[2]
    cut = run_update(**(ONE | {"num_minibatches": 4}), learning_rate=0.0)[2]
    for name in ("losses/qf_loss", "losses/value_error", "losses/q_value", "losses/std"):
        close(cut[name], whole[name], rtol=1e-4)


def test_the_actor_climbs_the_critic_that_was_just_updated():
    still, moving = (run_update(**ONE, learning_rate=rate)[2] for rate in (0.0, 0.03))
    close(moving["losses/q_value"], still["losses/q_value"])
    close(moving["losses/entropy"], still["losses/entropy"])
    assert abs(moving["losses/policy_loss"] - still["losses/policy_loss"]) > 1e-3


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_first_step_of_an_update_has_no_kl(noise):
    metrics = run_update(**ONE, noise_min=noise, noise_max=noise)[2]
    assert abs(metrics["losses/kl"]) < 1e-5
    assert metrics["losses/gated_fraction"] == 0


ARRAYS = "reward", "bonus", "next_value", "terminated", "truncated", "weight"


def recorded_update(monkeypatch, adapt, **changes):
    """One update of `adapt(first state)` and the arguments of its recursion, by name."""
    seen, real = {}, reppo.soft_td_lambda

    def record(*args):
        seen.update(zip(ARRAYS, args, strict=False))
        return real(*args)

    monkeypatch.setattr(reppo, "soft_td_lambda", record)
    algo = reppo.build(config_of(**changes))

    def run(key):
        state = adapt(algo.init(key))
        after, metrics = algo.update(state)
        return state, after, metrics, dict(seen)

    return jax.jit(run)(jax.random.key(0))


def blind_and_narrow(state):
    """The critic no longer sees the action's two entries; the policy has mean 0, deviation e^-3."""
    critic = state.params["critic"]["params"]
    kernel = critic["Block_0"]["Dense_0"]["kernel"].at[2:].set(0.0)
    block = critic["Block_0"] | {"Dense_0": critic["Block_0"]["Dense_0"] | {"kernel": kernel}}
    net = state.params["actor"]["net"]["params"]
    head = {"kernel": 0 * net["Dense_0"]["kernel"], "bias": jnp.array([0.0, 0.0, -3.0, -3.0])}
    params = {
        "critic": {"params": critic | {"Block_0": block}},
        "actor": state.params["actor"] | {"net": {"params": net | {"Dense_0": head}}},
    }
    return state._replace(params=params)


@pytest.mark.parametrize("mode", ["aligned", "shifted"])
def test_what_the_targets_are_made_of(mode, monkeypatch):
    """Values of the right successors, the entropy's bonus; what has no target does not count."""
    changes = {"env": "tiny:counter", "normalize_obs": False, "zero_init": False, "min_std": 0.0}
    changes |= {"gamma": 0.5, "temperature_init": 2.0, "target_mode": mode}
    changes |= {"num_epochs": 1, "num_minibatches": 1}
    config = config_of(**changes)
    state, _, metrics, seen = recorded_update(monkeypatch, blind_and_narrow, **changes)
    truncated = np.asarray(seen["truncated"])
    assert truncated.any(0).all()
    true, shown = tiny.successors(truncated)
    obs = true if mode == "aligned" else shown
    critic = reppo.Critic(config)
    predict = lambda obs: critic.apply(state.params["critic"], obs, np.zeros((8, 4, 2))).value
    here = np.stack([true[..., 0] - 1, true[..., 1] + 1], -1)
    assert np.abs(predict(true) - predict(here)).min() > 1e-3
    assert np.abs(predict(true) - predict(shown))[truncated].min() > 1e-3
    close(seen["next_value"], predict(obs), rtol=1e-4)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) - 3.0)  # tanh is the identity near 0
    close(seen["bonus"].mean(), 0.5 * 2.0 * entropy, rtol=0.15)
    close(seen["weight"], 1.0)
    lost = truncated if mode == "shifted" else np.zeros_like(truncated)
    target = reppo.soft_td_lambda(*(seen[k] for k in ARRAYS), 0.5, config.td_lambda, mode)
    taken = np.where(lost, 0.0, 1.0)
    assert (taken.mean() < 1) == (mode == "shifted")
    error = (taken * (predict(here) - target) ** 2).mean()
    close(metrics["losses/value_error"], error, rtol=1e-3)


def test_weights_compare_the_policy_with_what_acted(monkeypatch):
    """The ratio of a narrow to a wide density is small far out, and never below 1 / 3 inside."""
    changes = {"noise_max": 3.0, "trace_min": 0.0, "env": "pendulum"}
    weight = np.asarray(recorded_update(monkeypatch, lambda x: x, **changes)[3]["weight"])
    close(weight[:, 0], 1.0)
    assert (weight[:, 1:] < 0.3).any()
    assert (weight <= 1.0).all()


@pytest.mark.parametrize(
    ("field", "value", "name", "rises"),
    [
        ("kl_bound", -1.0, "kl_coef", True),
        ("kl_bound", 1.0, "kl_coef", False),
        ("target_entropy_mult", -10.0, "temperature", True),
        ("target_entropy_mult", 10.0, "temperature", False),
    ],
)
def test_an_update_moves_the_multipliers_to_their_constraints(field, value, name, rises):
    before, after, _ = run_update(**ONE, **{field: value})
    old, new = (state.params["actor"]["duals"][name] for state in (before, after))
    assert (new > old) == rises


def test_the_kl_is_measured_from_the_policy_that_acted():
    metrics = run_update(learning_rate=0.03)[2]
    assert metrics["losses/kl"] > 0.05
    assert 0 < metrics["losses/gated_fraction"] < 1


def test_minibatches_are_shuffled(monkeypatch):
    shuffled = run_update()[1]
    monkeypatch.setattr(jax.random, "permutation", lambda key, n: jnp.arange(n))
    monkeypatch.setattr(tiny, "compiled_update", tiny.compiled_update.__wrapped__)
    in_order = run_update()[1]
    differ = jax.tree.map(lambda x, y: bool((x != y).any()), shuffled.params, in_order.params)
    assert any(jax.tree.leaves(differ))


def test_the_critic_sees_what_the_actor_does_not(monkeypatch):
    make = reppo.envs.make
    cheat = lambda *args, **kwargs: make(*args, **kwargs)._replace(privileged_size=1)
    monkeypatch.setattr(reppo.envs, "make", cheat)
    params = jax.eval_shape(reppo.build(config_of()).init, jax.random.key(0)).params
    first = lambda tree: tree["params"]["Block_0"]["Dense_0"]["kernel"].shape[0]
    assert first(params["critic"]) == 4 + 1
    assert first(params["actor"]["net"]) == 4 - 1


SCALAR = {
    "critic_loss": "mse",
    "value_samples": 3,
    "kl_mode": "full",
    "tune_temperature": False,
    "tune_kl_coef": False,
}
OTHER = {
    "target_mode": "shifted",
    "kl_estimator": "exact",
    "reverse_kl": True,
    "encoder_output": "block",
    "encoder_layers": 3,
    "norm": "layer",
    "noise_max": 1.5,
}


@pytest.mark.parametrize(
    "changes", [SCALAR, pytest.param(OTHER, marks=pytest.mark.slow)], ids=["scalar", "other"]
)
def test_variants_run(changes):
    metrics = run_update(**changes)[2]
    assert metrics["health/finite"]
    assert metrics["health/skipped_steps"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


# --- broken physics ---


def broken():
    """Balance whose reward is never a number."""
    raw = tiny.balance()

    def step(key, state, action):
        obs, state, _, terminated, info = raw.step(key, state, action)
        return obs, state, jnp.nan, terminated, info

    return raw._replace(name="broken", step=step)


def test_broken_physics_teaches_nothing():
    before, after, metrics = run_update(env="test_reppo:broken")
    assert metrics["health/env_nan"] == 32
    assert metrics["health/finite"]
    assert metrics["health/skipped_steps"] == 0
    tiny.assert_close(after.params, before.params, atol=1e-6)  # a step is 3e-4


def test_a_gradient_that_is_not_finite_is_skipped():
    """A reward scale of infinity makes every target infinite, and the scalar critic's error too."""
    before, after, metrics = run_update(**SCALAR, reward_scale=math.inf)
    tiny.assert_same(before.params["critic"], after.params["critic"])
    assert metrics["health/skipped_steps"] == 4
    assert not metrics["health/finite"]  # nothing was learned: the seed is named


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 3}, r"num_minibatches=3 .* 32 transitions .*num_envs=4, num_steps=8"),
        ({"env": "cartpole"}, r"CartPole-v1 has discrete actions"),
        ({"vmin": 5.0, "vmax": 5.0}, r"vmin=5 to vmax=5"),
        ({"num_bins": 1}, r"num_bins=1"),
    ],
)
def test_bad_input_is_one_error(changes, message):
    for function in (reppo.build, reppo.make_train):
        with pytest.raises(ValueError, match=message):
            function(config_of(**changes))


def test_a_support_that_is_too_small_is_a_warning():
    numbers = r"values can be 0 to 100 .*vmin=-2 to vmax=12"
    with pytest.warns(UserWarning, match=numbers):
        config_of(reward_range=(0.0, 1.0), gamma=0.99).validate()


def test_the_warning_is_one_line_before_anything_compiles(tmp_path):
    (tmp_path / "config.json").touch()  # ends the launch right after
    command = [sys.executable, "algos/reppo.py", "--env", "pendulum", "--vmin", "-9"]
    command += ["--run-dir", str(tmp_path)]
    root = Path(reppo.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 2
    assert lines[0].startswith("warning: values can be -162.8 to 0 (reward_range=(-16.28, 0.0)")
    assert lines[1].startswith("error: ")


@pytest.mark.filterwarnings("error::UserWarning")
def test_presets_have_room_for_their_rewards():
    for preset in reppo.PRESETS.values():
        dataclasses.replace(reppo.Config(), **preset).validate()


# --- learning ---


@pytest.mark.slow
def test_bandit_is_learned():
    config = reppo.Config(
        env="probe/action-continuous", num_envs=64, num_steps=16, num_epochs=4, num_minibatches=4,
        total_timesteps=150 * 1024, vmin=-3.0, vmax=1.0, hidden=(32,), critic_width=32,
        learning_rate=1e-3, normalize_obs=False,
    )  # fmt: skip
    assert config.num_updates * config.num_epochs * config.num_minibatches <= 3000
    state = jax.jit(reppo.make_train(config))(jax.random.key(0))["state"]
    algo = reppo.build(config)
    action = algo.act(algo.policy_of(state), jnp.ones((1, 1)), jax.random.key(0), True)
    assert abs(action[0, 0] - 0.5) < 0.1


def point_mass():
    """x' = x + a / 2, reward -x^2, from x in [-2, 2], for 32 steps."""

    def reset(key):
        obs = jax.random.uniform(key, (1,), minval=-2.0, maxval=2.0)
        return obs, obs

    def step(key, state, action):
        obs = state + 0.5 * jnp.clip(action, -1.0, 1.0)
        return obs, obs, -(obs[0] ** 2), False, {}

    return RawEnv("point_mass", reset, step, 1, (1,), 1, False, 32, "fresh")


@pytest.mark.slow
def test_point_mass_is_brought_to_rest():
    """At least 95 % of the way from doing nothing to the best policy, a = -2 x."""
    config = reppo.Config(
        env="test_reppo:point_mass", num_envs=32, num_steps=16, num_epochs=4, num_minibatches=4,
        total_timesteps=100_000, gamma=0.95, vmin=-50.0, vmax=10.0, hidden=(64, 64),
        critic_width=64, dual_lr_mult=3.0,
    )  # fmt: skip
    state = jax.jit(reppo.make_train(config))(jax.random.key(0))["state"]
    algo = reppo.build(config)
    policy = algo.policy_of(state)
    start = jnp.linspace(-2.0, 2.0, 41)[:, None]

    def play(act):
        def step(obs, _):
            obs = obs + 0.5 * jnp.clip(act(obs), -1.0, 1.0)
            return obs, -(obs[:, 0] ** 2)

        return float(jax.lax.scan(step, start, length=32)[1].sum(0).mean())

    learned = play(lambda obs: algo.act(policy, obs, jax.random.key(0), True))
    best, idle = play(lambda obs: -2.0 * obs), play(jnp.zeros_like)
    assert (learned - idle) / (best - idle) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "cpu", reason="hours on a CPU")
def test_cartpole_is_balanced():
    pytest.importorskip("mujoco_playground")
    from algos import common
    from envs import make

    preset = reppo.PRESETS["dmc_small"] | {"total_timesteps": 10_000_000}
    config = reppo.Config(env="CartpoleBalance", **preset)
    state = jax.jit(reppo.make_train(config))(jax.random.key(0))["state"]
    algo = reppo.build(config)
    env = make("CartpoleBalance", 64, stagger=False, reset_mode="cached")
    evaluate = jax.jit(partial(common.evaluate, algo.act, env=env, key=jax.random.key(1)))
    assert evaluate(algo.policy_of(state))[0].mean() > 950
