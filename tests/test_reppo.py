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
from algos.reppo import (
    MAX_SAMPLE,
    Batch,
    Prediction,
    Transition,
    hl_gauss,
    kl_divergence,
    kl_estimate,
)

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
    return data | changes


def targets(data, gamma=0.9, lam=0.8):
    data = {k: jnp.asarray(v) for k, v in data.items()}
    return np.asarray(reppo.soft_td_lambda(**data, gamma=gamma, lam=lam))


def reference(data, gamma, lam):
    """The recursion, element by element."""
    r, b, v, term, trunc = (np.asarray(x, np.float64) for x in data.values())
    out = np.zeros((T, N))
    for n in range(N):
        following = v[-1, n]
        for t in reversed(range(T)):
            c = 0.0 if trunc[t, n] or t == T - 1 else lam
            mix = b[t, n] + gamma * (c * following + (1 - c) * v[t, n])
            following = out[t, n] = r[t, n] + (1 - term[t, n]) * mix
    return out


@pytest.mark.parametrize("seed", range(5))
def test_targets_are_the_double_loop(seed):
    rng = np.random.default_rng(seed + 100)
    done = rng.random((T, N)) < 0.5
    terminated = done & (rng.random((T, N)) < 0.5)
    data = episode(seed, terminated=terminated, truncated=done & ~terminated)
    assert_close(targets(data, 0.9, 0.7), reference(data, 0.9, 0.7))


def test_limits_of_lambda():
    data = episode()
    soft = data["reward"] + data["bonus"]
    assert_close(targets(data, lam=0.0), soft + 0.9 * data["next_value"])
    data["next_value"][-1] = 0.0
    discount = 0.9 ** np.arange(T)[:, None]
    assert_close(targets(data, lam=1.0)[0], (discount * soft).sum(0))
    ones = np.ones((T, N), np.float32)
    data = episode(reward=2 * ones, bonus=0 * ones, next_value=20 * ones)
    for lam in (0.0, 0.5, 1.0):
        assert_close(targets(data, lam=lam), 20.0)


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


def test_targets_by_hand():
    """Three steps with gamma = lambda = 1/2, next values 8, 8, 8, rewards 1 and bonuses 2."""
    column = lambda *x: jnp.array(x)[:, None]
    no = column(False, False, False)
    args = column(1.0, 1.0, 1.0), column(2.0, 2.0, 2.0), column(8.0, 8.0, 8.0)
    target = lambda terminated, truncated: reppo.soft_td_lambda(
        *args, terminated, truncated, 0.5, 0.5
    )
    # the last step: 1 + 2 + 8 / 2; before it: 3 + (7 / 2 + 8 / 2) / 2; and so on
    assert_close(target(no, no)[:, 0], [6.6875, 6.75, 7.0])
    middle = column(False, True, False)
    assert_close(target(middle, no)[:, 0], [3 + (1 / 2 + 4) / 2, 1.0, 7.0])
    assert_close(target(no, middle)[:, 0], [3 + (7 / 2 + 4) / 2, 7.0, 7.0])


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


def test_equal_policies_have_no_kl():
    noise = jax.random.normal(jax.random.key(0), (16, 2))
    assert kl_estimate(OLD, OLD, noise) == 0
    assert kl_divergence(OLD, OLD) == 0


def test_exact_kl_by_hand():
    """ln(std ratio) + (std_p^2 + distance^2) / (2 std_q^2) - 1/2 for each dimension."""
    first = math.log(0.6 / 0.5) + (0.25 + 0.01) / 0.72 - 0.5
    second = math.log(0.3 / 0.4) + (0.16 + 0.04) / 0.18 - 0.5
    assert_close(kl_divergence(OLD, NEW), first + second)


@pytest.mark.parametrize(("p", "q"), [(OLD, NEW), (NEW, OLD)], ids=["forward", "backward"])
def test_mean_of_the_estimates_is_the_exact_kl(p, q):
    noise = jax.random.normal(jax.random.key(0), (16, 20_000, 2))
    wide = lambda x: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (20_000, 2)), x)
    kl = np.asarray(kl_estimate(wide(p), wide(q), noise), np.float64)
    assert abs(kl.mean() - float(kl_divergence(p, q))) < 3 * kl.std() / math.sqrt(len(kl))


def test_spread_of_the_estimates_under_a_shift():
    one = jnp.ones((20_000, 1))
    old, new = TanhGaussian(0 * one, 0.5 * one), TanhGaussian(0.2 * one, 0.5 * one)
    noise = jax.random.normal(jax.random.key(0), (16, 20_000, 1))
    kl = kl_estimate(old, new, noise)
    assert_close(kl.std(), math.sqrt(2 * 0.08 / 16), rtol=0.03)


def test_saturated_policies_show_the_published_clipping():
    policy = TanhGaussian(jnp.array([4.0]), jnp.array([1.0]))
    noise = jax.random.normal(jax.random.key(0), (20_000, 1))
    z, tail = np.linspace(MAX_SAMPLE - 4, 10, 100_001), MAX_SAMPLE - 4
    excess = -0.5 * (z**2 - tail**2) + 2 * (z - tail)  # of the log-density, where tanh is flat
    expected = np.trapezoid(excess * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi), z)
    assert_close(kl_estimate(policy, policy, noise), expected, rtol=0, atol=5e-3)
    assert expected > 0.05
    assert kl_divergence(policy, policy) == 0


# --- the actor's loss ---

SAC_LOSS = jnp.array([-0.9, -2.1, -2.8])
KL = jnp.array([0.05, 0.1, 0.3])


def actor_loss(mode, bound=0.1, sac_loss=SAC_LOSS, kl=KL):
    return reppo.policy_loss(sac_loss, kl, 0.5, bound, mode)


def test_gate_is_closed_at_the_bound():
    loss, gated = actor_loss("clipped")
    assert gated.tolist() == [False, True, True]
    assert_close(loss, [-0.9, 0.05, 0.15])
    assert actor_loss("clipped", kl=KL * jnp.nan)[1].all()


def test_modes_of_the_loss():
    assert_close(actor_loss("full")[0], [-0.875, -2.05, -2.65])
    assert_close(actor_loss("value")[0], SAC_LOSS)
    assert_close(actor_loss("clipped", jnp.inf)[0], SAC_LOSS)
    assert_close(actor_loss("clipped", 0.0)[0], 0.5 * KL)
    grad = jax.grad(lambda sac_loss: actor_loss("clipped", 0.0, sac_loss)[0].sum())(SAC_LOSS)
    assert_close(grad, 0.0)


def test_the_policy_loss_puts_no_force_on_the_multiplier():
    loss = lambda beta: reppo.policy_loss(SAC_LOSS, KL, beta, 0.1, "full")[0].sum()
    assert_close(jax.grad(loss)(0.5), 0.0)


@pytest.mark.parametrize(("entropy", "kl"), [(-1.0, 0.3), (1.0, 0.02)])
def test_multipliers_follow_their_constraints(entropy, kl):
    target_entropy, bound = -0.5, 0.1

    def loss(duals, entropy, kl):
        alpha, beta = jnp.exp(duals)
        return reppo.dual_loss(alpha, beta, entropy - target_entropy, bound - kl)

    duals = jnp.log(jnp.array([0.2, 0.7]))
    grad, *forces = jax.grad(loss, (0, 1, 2))(duals, entropy, kl)
    assert_close(grad, [0.2 * (entropy + 0.5), -0.7 * (kl - 0.1)])
    assert_close(forces, 0.0)  # on the policy
    alpha_rises, beta_rises = grad < 0
    assert alpha_rises == (entropy < target_entropy)
    assert beta_rises == (kl > bound)


def test_gradient_goes_through_the_action():
    """Q = g a with a fixed deviation and no entropy: the gradient of the mean is -g E[1 - a^2]."""
    g, std = jnp.array([1.5, -0.5]), jnp.array([0.3, 0.8])
    noise = jax.random.normal(jax.random.key(0), (200_000, 2))

    def loss(mean):
        policy = TanhGaussian(mean, std)
        u = policy.sample(noise)
        zero = jnp.zeros(len(noise))
        return reppo.policy_loss(-jnp.tanh(u) @ g, zero, 1.0, 0.1, "clipped")[0].mean()

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
    """Transitions with rewards 0, 1/4, 1/2, 3/4 and targets 1, 2, 3, 4."""
    false = jnp.zeros(B, bool)
    step = Transition(
        obs=jnp.zeros((B, 2)),
        action=jnp.zeros((B, 1)),
        policy=TanhGaussian(jnp.zeros((B, 1)), jnp.ones((B, 1))),
        reward=jnp.arange(B) / 4,
        terminated=false,
        truncated=false,
        valid=~false,
        next_obs=jnp.zeros((B, 2)),
    )
    features = jax.random.normal(jax.random.key(1), (B, H))
    return Batch(step._replace(**changes), jnp.array([1.0, 2.0, 3.0, 4.0]), features)


def prediction():
    keys = jax.random.split(jax.random.key(2))
    logits = jax.random.normal(keys[0], (B, 11))
    value = jax.nn.softmax(logits) @ jnp.linspace(0.0, 10.0, 11)
    return Prediction(value, logits, jnp.zeros((B, H)), jax.random.normal(keys[1], (B, 1 + H)))


def test_critic_loss_by_hand():
    target, p = critic_batch().target, prediction()
    code = np.asarray(hl_gauss(target, 0.0, 10.0, 11))
    cross = -(code * np.asarray(jax.nn.log_softmax(p.logits))).sum(-1)
    assert_close(reppo.critic_loss(p, target, 0.0, 10.0), cross)
    scalar = p._replace(value=jnp.array([1.0, 2.0, 3.0, 0.0]), logits=None)
    assert_close(reppo.critic_loss(scalar, target, 0.0, 10.0), [0.0, 0.0, 0.0, 16.0])


def test_prediction_loss_by_hand():
    batch, p = critic_batch(), prediction()
    wanted = np.concatenate([np.asarray(batch.step.reward)[:, None], batch.next_features], 1)
    squares = (np.asarray(p.predicted) - wanted) ** 2
    assert_close(reppo.aux_loss(p.predicted, batch), squares.sum(1) / (H + 1))


def test_nothing_is_predicted_past_the_end_of_an_episode():
    predicted, terminated = prediction().predicted, jnp.array([True, False, False, False])
    loss = reppo.aux_loss(predicted, critic_batch(terminated=terminated))
    assert loss[0] == 0
    assert (loss[1:] > 0).all()
    assert (reppo.aux_loss(predicted, critic_batch(truncated=terminated)) > 0).all()


def test_scalar_critic_has_one_value_for_each_observation():
    config = dataclasses.replace(reppo.Config(), critic_loss="mse", critic_width=8)
    critic = reppo.Critic(config)
    params = critic.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)))
    prediction = critic.apply(params, jnp.zeros((5, 3)), jnp.zeros((5, 2)))
    assert prediction.value.shape == (5,)
    assert prediction.logits is None


# --- networks ---


@pytest.mark.parametrize(("vmin", "vmax"), [(0.0, 150.0), (-10.0, 10.0)])
def test_initial_value_is_zero(vmin, vmax):
    obs, action = jax.random.normal(jax.random.key(0), (100, 17)), jnp.zeros((100, 6))
    critic = reppo.Critic(dataclasses.replace(reppo.Config(), vmin=vmin, vmax=vmax))
    value = critic.apply(critic.init(jax.random.key(1), obs[:1], action[:1]), obs, action).value
    assert jnp.abs(value).max() < 1e-4 * (vmax - vmin)


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
