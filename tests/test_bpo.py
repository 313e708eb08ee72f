"""Behaviour policy optimisation: networks, the losses of mu, configuration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats
from tiny import assert_allclose

from algos import bpo, common

# --- networks ---


@pytest.mark.parametrize("positive", [False, True])
def test_zero_final_networks_start_without_preference(positive):
    config = bpo.Config(hidden=(8, 8), zero_norm_final=True)
    net = bpo.ActionCritic(config, (5,), 3, True, positive)
    x = jax.random.normal(jax.random.key(1), (20, 5))
    params = net.init(jax.random.key(0), x)
    assert_allclose(
        bpo.symexp(net.apply(params, x)), 1.000002 if positive else 0.0, rtol=1e-6, atol=1e-7
    )
    assert any("LayerNorm" in name for name in params["params"]["Torso_0"])


@pytest.mark.parametrize("zero", [False, True])
def test_zero_final_networks_have_orthogonal_kernels(zero):
    config = bpo.Config(hidden=(16,), kernel_init="lecun_normal", zero_norm_final=zero)
    nets = bpo.ActionCritic(config, (16,), 1, True, False), bpo.Critic(config, (16,))
    for net, orthogonal in zip(nets, (zero, False), strict=True):
        params = net.init(jax.random.key(0), jnp.zeros((1, 16)))["params"]
        kernel = params["Torso_0"]["Dense_0"]["kernel"]
        error = np.abs(kernel @ kernel.T - np.eye(16)).max()
        assert error < 1e-5 if orthogonal else error > 0.1


def test_networks_of_images_convolve_them():
    config = bpo.Config(hidden=(8,))
    image = jnp.zeros((1, 5 * 5 * 2))
    q = bpo.ActionCritic(config, (5, 5, 2), 3, True, False)
    params = q.init(jax.random.key(0), image)["params"]["Torso_0"]
    assert params["Dense_0"]["kernel"].shape == (3 * 3 * 2, 16)
    # A continuous action has no place in the image, so both are one vector.
    q = bpo.ActionCritic(config, (5, 5, 2), 3, False, False)
    params = q.init(jax.random.key(0), image, jnp.zeros((1, 3)))["params"]["Torso_0"]
    assert params["Dense_0"]["kernel"].shape == (5 * 5 * 2 + 3, 8)


# --- behaviour policy ---


def test_discrete_mu_fits_its_target():
    log_pi = jnp.log(jnp.array([[0.5, 0.5]]))
    target = bpo.mu_target(log_pi, jnp.array([[1.0, 9.0]]))
    assert_allclose(jax.nn.softmax(target), [[0.25, 0.75]])
    loss = lambda logits, target: bpo.mu_loss_discrete(jax.nn.log_softmax(logits), target)
    assert_allclose(loss(target, target), 0.562335)  # the entropy of the target
    assert_allclose(jax.grad(loss)(target, target), 0.0, atol=1e-6)
    constant = bpo.mu_target(log_pi, jnp.full((1, 2), 7.0))
    assert_allclose(jax.nn.softmax(constant), jnp.exp(log_pi))
    assert_allclose(jax.grad(loss)(log_pi, constant), 0.0, atol=1e-6)


def gaussian_mu_loss(mean, log_std, ent_coef=0.0):
    """Loss of mu = N(mean, exp(log_std)^2) for pi = N(0.3, 0.25) and Q^ = exp(1.6 a)."""
    noise = jnp.asarray(stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000))[:, None]
    broadcast = lambda x: jnp.broadcast_to(x, noise.shape)
    mu = common.Gaussian(broadcast(mean), broadcast(log_std))
    pi = common.Gaussian(broadcast(0.3), broadcast(jnp.log(0.5)))
    action = mu.sample(noise)
    moment = jnp.exp(1.6 * action[:, 0])
    target = bpo.mu_target(pi.log_prob(action), moment)
    loss = bpo.mu_loss_continuous(mu.log_prob(action), target)
    return loss - ent_coef * mu.entropy().mean()


@pytest.mark.parametrize("ent_coef", [0.0, 0.2])
def test_gaussian_mu_fits_its_target(ent_coef):
    log_std = jnp.log(0.5 * jnp.sqrt(1.0 + ent_coef))
    gradient = jax.grad(gaussian_mu_loss, (0, 1))
    assert_allclose(jnp.stack(gradient(jnp.array(0.5), log_std, ent_coef)), 0.0, atol=2e-3)
    assert jnp.abs(jnp.stack(gradient(jnp.array(0.3), log_std, ent_coef)))[0] > 0.5
    assert jnp.abs(jnp.stack(gradient(jnp.array(0.5), log_std + 0.1, ent_coef)))[1] > 0.1
    if not ent_coef:
        assert_allclose(gaussian_mu_loss(jnp.array(0.5), log_std), -0.32)


def test_every_action_feels_its_own_second_moment():
    log_prob, moment = jnp.zeros(4), jnp.array([4.0, 2.0, 1.0, 3.0])
    loss = lambda moment: bpo.mu_loss_continuous(log_prob, bpo.mu_target(log_prob, moment))
    assert_allclose(jax.grad(loss)(moment), -0.125 / moment)


def test_surrogate_weights_the_first_action():
    # at pi = pi_old the ratio is pi / mu, and a sample beyond the clip has no gradient
    log_pi, log_mu = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.4, 0.45]))
    gradient = lambda log_pi, advantage: jax.grad(
        lambda x: bpo.policy_loss(x, log_mu, advantage, 0.2)[0]
    )(log_pi)
    assert_allclose(gradient(log_pi, jnp.ones(2)), [0.0, -0.5 / 0.45 / 2])
    assert_allclose(gradient(log_pi, -jnp.ones(2)), [0.625, 0.5 / 0.45 / 2])
    assert_allclose(gradient(log_mu, jnp.array([3.0, -1.0])), [-1.5, 0.5])  # -A grad log pi / 2


# --- configuration ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 5}, "num_minibatches=5"),
        ({"num_vf_minibatches": 1}, "num_vf_minibatches=1"),  # cuts no single rollout
        ({"num_mu_minibatches": 128}, "num_mu_minibatches=128"),
        ({"gamma": 1.0}, "gamma below 1"),  # rewards have no bounded sum
        ({"num_minibatches": 32}, "num_minibatches=32 makes minibatches of one transition"),
    ],
)
def test_bad_settings_name_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        common.check(tiny.config_of("bpo", **changes))


def test_gamma_may_be_1_without_bounds():
    common.check(tiny.config_of("bpo", gamma=1.0, clip_targets=False))


def test_paper_presets_make_the_papers_gradient_steps():
    """(pi, Q, mu) per full update, and the transitions of a minibatch."""
    expected = {
        "cartpole_ppo": ((20, 40, 80), (256, 256, 128)),
        "mujoco_ppo": ((320, 640, 1280), (64, 256, 128)),
        "mujoco_ppo_gsde": ((1280, 2560, 2560), (128, 128, 128)),
    }
    for name, (steps, sizes) in expected.items():
        config = bpo.config_for("ant", name)  # no value of the task's preset may survive
        replay = config.replay_rollouts * config.steps_per_update
        phases = [
            (config.num_epochs, config.num_minibatches, config.steps_per_update),
            (config.num_vf_epochs, config.num_vf_minibatches, replay),
            (config.num_mu_epochs, config.num_mu_minibatches, replay),
        ]
        assert tuple(epochs * n for epochs, n, _ in phases) == steps
        assert tuple(size // n for _, n, size in phases) == sizes
        tasks = (preset for task, preset in bpo.PRESETS.items() if "ppo" not in task)
        assert set().union(*tasks) <= set(bpo.PRESETS[name])


@pytest.mark.parametrize(
    ("name", "clips"),
    [
        ("ppo_bpo", (1.5, 1.5, False)),
        ("ppo_bpo_zero", (1.5, 1.5, False)),
        ("ppo_bpo_zero1.0", (1.0, 1.0, False)),
        ("ppo_bpo_zero1.0_1.5", (1.5, 1.0, False)),
        ("ppo_bpo_zero1.0_1.4", (1.4, 1.0, False)),
        ("ppo_bpo_zero1.0_traj", (1.0, 1.0, True)),
        ("ppo_bpo_zero1.5_traj", (1.5, 1.5, True)),
    ],
)
def test_add_on_presets(name, clips):
    config = bpo.config_for("ant", "mujoco_ppo_gsde", name)
    common.check(config)
    assert (config.clip_rho, config.clip_c, config.clip_traj) == clips
    assert config.symlog_targets
    assert config.polyak_tau == 0.02
    assert config.zero_norm_final == (name != "ppo_bpo")
