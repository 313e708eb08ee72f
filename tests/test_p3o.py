"""P3O: effective sample size, value targets, losses."""

import dataclasses
import math
from functools import lru_cache

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
    # two unit Gaussians whose means are 0.5 apart
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


# --- value targets ---


def target_of(reward, value, done, config):
    """Value targets [B, T] of both losses; they depend on neither the policy nor the actions."""
    b, t = reward.shape
    logits, action = jnp.zeros((b, t + 1, 2)), jnp.zeros((b, t), int)
    segments = p3o.Segments(
        jnp.zeros((b, t + 1, 1)), action, None, reward, done, jnp.ones_like(done)
    )
    return p3o.estimates(Categorical(logits), value, segments, config)[3]


def test_value_targets_by_hand():
    reward, value = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 1.0, 1.0, 2.0]])
    done = np.array([[False, True, False]])
    targets = lambda lam: target_of(reward, value, done, config_of(gamma=0.5, gae_lambda=lam))
    assert_allclose(targets(0.5), [[1.75, 2.0, 4.0]])
    assert_allclose(targets(1.0), [[2.0, 2.0, 4.0]])
    value[0, 3] = 5.0  # the bootstrap, which nothing before the end of an episode sees
    assert_allclose(targets(0.5), [[1.75, 2.0, 5.5]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_value_target_is_the_double_loop(seed, gamma, lam, chance):
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
    assert_allclose(compiled_target()(reward, value, done, gamma, lam), expected, atol=1e-4)


@lru_cache
def compiled_target():
    def target(reward, value, done, gamma, lam):
        return target_of(reward, value, done, config_of(gamma=gamma, gae_lambda=lam))

    return jax.jit(target)


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
        valid=np.ones((b, t), bool),
    )
    return logits, value, segments


def on_policy(logits, segments):
    """The same segments, as if this policy had acted."""
    return segments._replace(policy=Categorical(logits[:, :-1]))


def rows(loss, logits, value, segments, config):
    """A loss, and its gradients for the logits and the values."""
    function = lambda logits, value: loss(Categorical(logits), value, segments, config)[0]
    return jax.value_and_grad(function, (0, 1))(logits, value)


@pytest.mark.parametrize("kl_coef", [None, 0.7])
def test_replaying_the_present_policy_is_the_on_policy_step(kl_coef):
    config = config_of(ent_coef=0.0, kl_coef=kl_coef)
    logits, value, segments = random_batch()
    segments = on_policy(logits, segments)
    aux = p3o.replay_loss(Categorical(logits), value, segments, config)[1]
    assert_allclose(aux["replay/kl_coef"], kl_coef or 0.0, atol=1e-6)
    assert_allclose(aux["replay/ratio_limit"], 1.0, atol=1e-6)
    assert_allclose(aux["replay/kl"], 0.0, atol=1e-6)
    fresh, replayed = (
        rows(loss, logits, value, segments, config) for loss in (p3o.fresh_loss, p3o.replay_loss)
    )
    tiny.assert_close(fresh, replayed, rtol=1e-5, atol=1e-6)


def test_a_run_whose_buffer_would_change_its_size_cannot_be_longer(tmp_path, capsys):
    """50 rollouts of 8 steps keep 25 of them; 100 would keep 50."""
    run_dir, sizes = str(tmp_path / "run"), "--num-envs 2 --num-steps 4 --hidden 4 --num-evals 1"
    sizes += " --eval-episodes 1 --final-episodes 1 --replay-fraction 0.5 --total-timesteps 400"
    launch.main("p3o", ["--env", "probe/value", *sizes.split(), "--run-dir", run_dir])
    with pytest.raises(SystemExit):
        launch.main("p3o", ["--resume", run_dir, "--total-timesteps", "800", "--verbose", "0"])
    said = capsys.readouterr().err
    assert "does not fit this configuration" in said
    assert said.endswith("if a size in it depends on --total-timesteps, resume with 400\n")


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
        valid=jnp.ones((1, 2), bool),
    )
    value = jnp.zeros((1, 3))
    aux = p3o.replay_loss(Categorical(logits), value, segments, config)[1]
    kl = 0.1927448 if direction == "pi_beta" else 0.2231436
    expected = {
        "ess": 0.7352941,
        "ratio_limit": 0.7352941,
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


@pytest.mark.parametrize("max_ratio", [None, 0.8])
@pytest.mark.parametrize("kl_coef", [None, 0.7])
def test_gradient_of_the_replay_loss(max_ratio, kl_coef):
    """-rho A (onehot - pi) / M + lambda / (M K) pi (log(pi / beta) - KL), and nothing else."""
    config = config_of(max_ratio=max_ratio, kl_coef=kl_coef)
    logits, value, segments = random_batch(1)
    _, (grad, value_grad) = rows(p3o.replay_loss, logits, value, segments, config)
    p, q = (np.asarray(jax.nn.softmax(x)) for x in (logits[:, :-1], segments.policy.logits))
    taken = np.eye(3)[segments.action]
    weight = (taken * p / q).sum(-1)
    ess = weight.sum() ** 2 / (weight**2).sum() / weight.size
    rho = np.minimum(weight, max_ratio or ess)
    assert (rho < weight).any()
    kl_coef = kl_coef or 1 - ess
    advantage = np.asarray(target_of(segments.reward, value, segments.done, config))
    advantage = advantage - value[:, :-1]
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
        valid=jnp.ones((1, 3), bool),
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

    config = config_of(kl_coef=0.0)
    assert_allclose(jax.grad(loss)(segments.policy.logits), 0.0)


def test_parts_of_the_fresh_loss():
    config = config_of(ent_coef=0.2, vf_coef=0.7)
    logits, value, segments = random_batch(4)
    loss, aux = p3o.fresh_loss(Categorical(logits), value, segments, config)
    target = np.asarray(target_of(segments.reward, value, segments.done, config))
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
        valid=np.ones((2, 3), bool),
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
    # The ESS is that of the ratios before they are cut.
    log_weight = np.asarray(Categorical(logits[:, :-1]).log_prob(segments.action)) + 200.0
    weight = np.exp(log_weight - log_weight.max())
    ess = weight.sum() ** 2 / (weight**2).sum() / weight.size
    assert ess < 0.9
    assert_allclose(aux["replay/ess"], ess, rtol=1e-3)


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


def test_each_convolution_has_an_activation():
    config = tiny.config_of("p3o", hidden=(4,), activation="relu")
    torso, image = p3o.Torso(config, (5, 5, 1)), jax.random.normal(jax.random.key(1), (25,))
    params = torso.init(jax.random.key(0), image)
    first, second = (params["params"][f"Dense_{i}"]["kernel"] for i in (0, 1))
    hidden = jax.nn.relu(p3o.patches(image.reshape(5, 5, 1), 3, 1) @ first).ravel()
    expected = jax.nn.relu(hidden @ second)
    assert_allclose(torso.apply(params, image), expected, rtol=1e-4, atol=1e-5)
