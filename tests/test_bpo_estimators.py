"""BPO's estimators: against loops, by hand, and their mean and variance on known tasks.

Numbers without a derivation next to them are exact results of dynamic programming.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_allclose

from algos import bpo
from algos.ppo import gae
from experiments import return_variance as tabular

INF = jnp.inf
ESTIMATORS = [bpo.step_estimator, bpo.trajectory_estimator]


def random_rollout(seed, shape=(12, 5)):
    """Arrays of one rollout: reward, value, next_value, terminated, done, log_ratio."""
    rng = np.random.default_rng(seed)
    ended = rng.random(shape) < 0.3
    terminated = ended & (rng.random(shape) < 0.5)
    arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(3)]
    return *arrays, terminated, ended, rng.normal(size=shape).astype(np.float32) * 0.5


# --- estimators ---


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clips", [(1.0, 1.0), (1.5, 1.0), (3.0, 1.7)])
def test_on_policy_is_gae(estimator, clips):
    *rollout, log_ratio = random_rollout(0)
    advantage, target = estimator(*rollout, 0 * log_ratio, 0.97, 0.9, *clips)
    expected = gae(*rollout, 0.97, 0.9)
    assert_allclose(advantage, expected)
    assert_allclose(target, expected + rollout[1])


@pytest.mark.parametrize(
    ("estimator", "target"),
    [(bpo.step_estimator, [2.825, 1.5]), (bpo.trajectory_estimator, [2.9375, 1.5])],
)
def test_two_steps_by_hand(estimator, target):
    column = lambda *x: jnp.array(x)[:, None]
    last = column(False, True)
    log_ratio = jnp.log(column(2.0, 0.5))
    args = column(1.0, 2.0), column(0.5, 1.0), column(1.0, 7.0), last, last, log_ratio
    actual = jnp.stack(estimator(*args, 0.9, 0.5, 1.5, 1.0))[..., 0]
    assert_allclose(actual, [[1.625, 1.0], target])


@pytest.mark.parametrize("clip_c", [1.1, 0.8])
def test_estimators_match_double_loop(clip_c):
    reward, value, next_value, terminated, done, log_ratio = random_rollout(1)
    gamma, lam, clip_rho = 0.97, 0.9, 1.4
    rho = np.exp(log_ratio)
    delta = reward + gamma * np.where(terminated, 0, next_value) - value
    T, N = reward.shape
    for estimator in ESTIMATORS:
        advantage = np.zeros((T, N))
        target = np.zeros((T, N))
        for n in range(N):
            for t in range(T):
                for k in range(t, T):
                    later = rho[t + 1 : k + 1, n]
                    product = np.prod(later)
                    if estimator is bpo.trajectory_estimator:
                        weight = first = 1.0 if k == t else min(clip_c, product)
                        first *= min(clip_rho, rho[t, n])
                    else:
                        c = np.minimum(rho[t:k, n], clip_c)
                        last = min(clip_rho, rho[k, n])
                        weight = 1.0 if k == t else np.prod(c[1:]) * last
                        first = np.prod(c) * last
                    advantage[t, n] += (gamma * lam) ** (k - t) * weight * delta[k, n]
                    target[t, n] += (gamma * lam) ** (k - t) * first * delta[k, n]
                    if done[k, n]:
                        break
        actual = estimator(
            reward, value, next_value, terminated, done, log_ratio, gamma, lam, clip_rho, clip_c
        )
        assert_allclose(actual[0], advantage, rtol=1e-4)
        assert_allclose(actual[1], value + target, rtol=1e-4)


def test_structure_of_estimators():
    rollout = random_rollout(2)
    reward, value, next_value, terminated, _, log_ratio = rollout
    rho = np.minimum(np.exp(log_ratio), 1.3)
    # equal clips
    advantage, target = bpo.step_estimator(*rollout, 0.97, 0.9, 1.3, 1.3)
    assert_allclose(rho * advantage, target - value)
    # no clips: the trajectory form is the step form
    step, traj = (estimator(*rollout, 0.97, 0.9, INF, INF) for estimator in ESTIMATORS)
    assert_allclose(step, traj, rtol=1e-4)
    # lambda = 0
    delta = reward + 0.97 * np.where(terminated, 0, next_value) - value
    for estimator in ESTIMATORS:
        advantage, target = estimator(*rollout, 0.97, 0.0, 1.3, 1.1)
        assert_allclose(advantage, delta)
        assert_allclose(target, value + rho * delta)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("truncated", [False, True])
def test_nothing_flows_back_over_the_end_of_an_episode(estimator, truncated):
    rollout = [x.copy() for x in random_rollout(3)]
    rollout[3][:], rollout[4][:] = False, False
    rollout[4][6] = True
    rollout[3][6] = not truncated
    before = jnp.stack(estimator(*rollout, 0.97, 0.9, 1.5, 1.2))
    for i in (0, 1, 2, 5):  # reward, value, next_value, log_ratio
        rollout[i][7:] += 1.0
    after = jnp.stack(estimator(*rollout, 0.97, 0.9, 1.5, 1.2))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()
    # and it is next_value that a time limit looks at, and a failure does not
    rollout[2][6] += 1.0
    changed = jnp.stack(estimator(*rollout, 0.97, 0.9, 1.5, 1.2))[:, 6] != after[:, 6]
    assert changed.all() == truncated
    assert changed.any() == truncated


@pytest.mark.parametrize(("log_ratio", "clip_c"), [(20.0, 1.0), (-20.0, 1.0), (-20.0, INF)])
def test_trajectory_clipping_does_not_overflow(log_ratio, clip_c):
    *rollout, _ = random_rollout(4, (64, 3))
    log_ratio = jnp.full((64, 3), log_ratio)
    estimates = bpo.trajectory_estimator(*rollout, log_ratio, 0.99, 0.95, 1.5, clip_c)
    assert jnp.isfinite(jnp.stack(estimates)).all()


# --- fitted Q evaluation ---


def test_fqe_target_bootstraps_unless_terminated():
    terminated = jnp.array([True, False, False])  # failed, time limit, neither
    assert_allclose(bpo.fqe_target(jnp.ones(3), terminated, jnp.full(3, 5.0), 0.9), [1.0, 5.5, 5.5])


def test_symlog():
    magnitudes = jnp.logspace(-6, 6, 200)
    x = jnp.concatenate([-magnitudes[::-1], magnitudes])
    assert_allclose(bpo.symexp(bpo.symlog(x)), x, atol=0)
    assert_allclose(bpo.symlog(-x), -bpo.symlog(x), atol=0)
    assert (jnp.diff(bpo.symlog(x)) > 0).all()
    assert_allclose(bpo.symlog(jnp.e - 1.0), 1.0)


def test_fqe_loss():
    # (1 - 3)^2 + 0.5 (1 - 2)^2 = 4.5 and (2 - 2)^2 + 0.5 (2 - 0)^2 = 2, weighted 2 and 1
    output, target, anchor = jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0]), jnp.array([2.0, 0.0])
    assert_allclose(bpo.fqe_loss(output, target, anchor, jnp.array([2.0, 1.0]), 0.5), 5.5)


def test_td_weight():
    log_ratio = jnp.log(jnp.array([0.01, 0.5, 2.0, 50.0]))
    expected = np.array([0.1, 0.5, 2.0, 10.0]) / 3.15
    assert_allclose(bpo.td_weight(log_ratio), expected)
    assert_allclose(bpo.td_weight(log_ratio).mean(), 1.0)
    assert jnp.isfinite(bpo.td_weight(jnp.array([-300.0, 300.0]))).all()


# --- variance, on the tabular task X ---

X = tabular.MDP_X
V = np.array([3.484026, 2.924920])
MU_HAT = np.array([[0.660448, 0.339552], [0.444130, 0.555870]])
MU_CENTRED = np.array([[0.580681, 0.419319], [0.365025, 0.634975]])


def test_exact_moments_and_policies():
    exact = tabular.solve(X)
    assert_allclose(exact.v, V, rtol=1e-6)
    assert_allclose(exact.q, [[3.984665, 2.733067], [4.884026, 2.085304]])
    assert_allclose(exact.r_hat, [[6.969329, 0.0], [15.536102, -5.170607]])
    assert_allclose(exact.qhat, [[19.754685, 11.748694], [27.906794, 8.029414]])
    assert_allclose(exact.mu_hat, MU_HAT)
    assert_allclose(exact.mu_centred, MU_CENTRED)
    assert_allclose((X.policy * exact.qhat).sum(-1) - exact.v**2, [4.413855, 5.437470])


def test_exact_variances():
    zero = np.zeros(2)
    best = tabular.best_pdis_policy(X)
    for mu, expected in [
        (X.policy, (4.413855, 5.437470)),
        (MU_HAT, (0.662513, 0.738152)),
        (best, (0.338383, 0.352795)),
    ]:
        assert_allclose(tabular.variance(X, mu, zero), expected, rtol=1e-4)
    for mu, expected in [
        (X.policy, (4.413855, 5.437470)),
        (MU_HAT, (4.966579, 5.943458)),
        (MU_CENTRED, (4.201226, 5.141199)),
    ]:
        assert_allclose(tabular.variance(X, mu, V), expected, rtol=1e-4)


@lru_cache
def sampled_rollouts(name):
    """State [T, N], reward, next state and log-ratio; half of the columns start in each state."""
    mu = {"pi": X.policy, "hat": MU_HAT, "centred": MU_CENTRED}[name]
    rng = np.random.default_rng(0)
    T, N = 70, 60_000
    state = np.repeat([0, 1], N // 2)
    rows = []
    for _ in range(T):
        action = (rng.random(N) > mu[state, 0]).astype(int)
        next_state = (rng.random(N) > X.transition[state, action, 0]).astype(int)
        log_ratio = np.log(X.policy[state, action] / mu[state, action])
        rows.append((state, X.reward[state, action], next_state, log_ratio))
        state = next_state
    return [np.stack(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("mu", "value", "lam", "mean", "variance"),
    [
        ("pi", (0, 0), 1.0, V, (4.413855, 5.437470)),
        ("hat", (0, 0), 1.0, V, (0.662513, 0.738152)),
        ("pi", V, 1.0, V, (4.413855, 5.437470)),
        ("hat", V, 1.0, V, (4.966579, 5.943458)),
        ("centred", V, 1.0, V, (4.201226, 5.141199)),
        ("hat", V, 0.5, V, None),
        ("pi", (0, 0), 0.9, (1.941637, 1.371047), None),
        ("hat", (0, 0), 0.9, (1.941637, 1.371047), None),
    ],
)
def test_estimator_has_exact_mean_and_variance(mu, value, lam, mean, variance):
    state, reward, next_state, log_ratio = sampled_rollouts(mu)
    value = np.asarray(value, np.float32)
    no = np.zeros(state.shape, bool)
    _, target = jax.jit(bpo.step_estimator)(
        reward, value[state], value[next_state], no, no, log_ratio, X.gamma, lam, INF, INF
    )
    samples = np.asarray(target[0]).reshape(2, -1)
    error = samples.std(-1) / np.sqrt(samples.shape[1])
    assert (np.abs(samples.mean(-1) - mean) < 4.5 * error + 3e-3).all()
    if variance is not None:
        assert_allclose(samples.var(-1), variance, rtol=0.05)


def test_pdis_has_no_baseline():
    """So mu_hat lowers the variance whatever V is."""
    state, reward, next_state, log_ratio = sampled_rollouts("hat")
    no = np.zeros(state.shape, bool)
    value = np.asarray(V, np.float32)
    target = tabular.pdis_estimator(reward, value[next_state], no, no, log_ratio, X.gamma)
    samples = np.asarray(target[0]).reshape(2, -1)
    assert_allclose(samples.mean(-1), V, rtol=0.01)
    assert_allclose(samples.var(-1), (0.662513, 0.738152), rtol=0.05)


def test_pdis_by_hand():
    """Three episodes side by side: cut by the rollout, by a time limit, by a failure."""
    log_ratio = jnp.log(jnp.array([[2.0], [0.5]])) * jnp.ones(3)
    reward, next_value = jnp.array([[1.0], [2.0]]) * jnp.ones(3), jnp.full((2, 3), 10.0)
    terminated = jnp.array([[False] * 3, [False, False, True]])
    done = jnp.array([[False, True, False], [False, True, True]])
    target = tabular.pdis_estimator(reward, next_value, terminated, done, log_ratio, 0.9)
    # G_1 = 0.5 (2 + 0.9 * 10) = 5.5, or 0.5 * 2 after a failure; G_0 = 2 (1 + 0.9 G_1)
    assert_allclose(target[1], [5.5, 5.5, 1.0])
    assert_allclose(target[0], [11.9, 20.0, 3.8])


# --- bandits and chains ---


def bandit_variance(pi, mu, outcomes, value):
    """Variance of the target of one terminating step; `outcomes` are (action, reward, chance)."""
    action, reward, chance = (np.array(x) for x in zip(*outcomes, strict=True))
    pi, mu = np.asarray(pi), np.asarray(mu)
    yes = np.ones((1, len(action)), bool)
    ones = np.ones((1, len(action)))
    _, target = bpo.step_estimator(
        *(reward[None], value * ones, 9 * ones, yes, yes, np.log(pi / mu)[action][None]),
        *(1.0, 1.0, INF, INF),
    )
    p = mu[action] * chance
    mean = (p * target[0]).sum()
    return (p * (target[0] - mean) ** 2).sum()


def test_bandit_with_noise():
    pi = np.array([0.5, 0.5])
    outcomes = [(0, -1.0, 0.5), (0, 1.0, 0.5), (1, 2.0, 1.0)]
    qhat, q = jnp.array([1.0, 4.0]), jnp.array([0.0, 2.0])
    mu = jax.nn.softmax(bpo.mu_target(jnp.log(pi), qhat))
    assert_allclose(mu, [1 / 3, 2 / 3])
    assert_allclose(bandit_variance(pi, pi, outcomes, 0.0), 1.5)
    assert_allclose(bandit_variance(pi, mu, outcomes, 0.0), 1.25)
    centred = jax.nn.softmax(bpo.mu_target(jnp.log(pi), bpo.centred_moment(qhat, q, 1.0)))
    assert_allclose(centred, [0.585786, 0.414214])
    assert_allclose(bandit_variance(pi, pi, outcomes, 1.0), 1.5)
    assert_allclose(bandit_variance(pi, mu, outcomes, 1.0), 1.875)
    assert_allclose(bandit_variance(pi, centred, outcomes, 1.0), 1.457107)


def test_bandit_without_noise_has_no_variance_left():
    pi, reward = np.array([0.5, 0.5]), jnp.array([1.0, 3.0])
    mu = jax.nn.softmax(bpo.mu_target(jnp.log(pi), bpo.second_moment_reward(reward, reward)))
    assert_allclose(mu, [0.25, 0.75])
    outcomes = [(0, 1.0, 1.0), (1, 3.0, 1.0)]
    assert_allclose(bandit_variance(pi, mu, outcomes, 0.0), 0.0, atol=1e-10)


def test_centred_moment_is_bounded_below():
    assert_allclose(
        bpo.centred_moment(jnp.array(3.0), jnp.array(2.0), jnp.array(2.0)), 1e-6, atol=0
    )


def test_second_moment_recursion():
    # a deterministic chain 0 -> 1 -> end with rewards 2 and -3: the second moment is the square
    reward, terminated = jnp.array([2.0, -3.0]), jnp.array([False, True])
    following = lambda x: jnp.array([x[1], 99.0])
    q = qhat = jnp.zeros(2)
    for _ in range(3):
        q = bpo.fqe_target(reward, terminated, following(q), 0.9)
        r_hat = bpo.second_moment_reward(reward, q)
        qhat = bpo.fqe_target(r_hat, terminated, following(qhat), 0.81)
    assert_allclose(q, [-0.7, -3.0])
    assert_allclose(qhat, q**2)
    # reward 1, survives with chance 0.9
    chance, ends, gamma = jnp.array([0.9, 0.1]), jnp.array([False, True]), 0.98
    v = second = raw = 0.0
    for _ in range(400):
        v = chance @ bpo.fqe_target(1.0, ends, v, gamma)
        r_hat = bpo.second_moment_reward(1.0, v)
        second = chance @ bpo.fqe_target(r_hat, ends, second, gamma**2)
        raw = chance @ bpo.fqe_target(1.0, ends, raw, gamma**2)
    assert_allclose(v, 8.474576)
    assert_allclose(r_hat, 15.949153)
    assert_allclose(second, 117.584433)
    assert_allclose(second - v**2, 45.765990, rtol=1e-4)
    assert_allclose(raw, 7.372457)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clipped_fixed_point_is_between_pi_and_mu(estimator):
    pi, mu = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    reward, yes = np.array([[1.0, 0.0]]), np.ones((1, 2), bool)
    value = 0.0
    for _ in range(100):
        _, target = estimator(
            *(reward, np.full((1, 2), value), yes * 9.0, yes, yes, np.log(pi / mu)[None]),
            *(0.9, 1.0, 1.0, 1.0),
        )
        value = float((mu * target[0]).sum())
    assert_allclose(value, 5 / 6)
