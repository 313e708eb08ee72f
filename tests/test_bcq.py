"""Batch-constrained Q-learning: draws, targets, autoencoder, gradient steps, what it plays."""

import dataclasses
import itertools
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from algos import bcq, launch

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_bcq")

assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
config_of = partial(tiny.config_of, "bcq")


@cache
def update_of(config):
    """A compiled update of one seed: state, rows -> state, metrics."""
    return jax.jit(tiny.build("bcq", config).update)


@cache
def first_state(config):
    return jax.jit(tiny.build("bcq", config).init)(jax.random.key(0))


def rows_of(n=64, **changes):
    dataset = tiny.transitions(n, **changes)
    return bcq.Batch(*(jnp.asarray(getattr(dataset, name)) for name in bcq.Batch._fields))


def shifted(params, by=1.0):
    return jax.tree.map(lambda x: x + by, params)


def scaled(params, by):
    return jax.tree.map(lambda x: by * x, params)


# --- draws ---


@pytest.mark.parametrize("most", [0.05, 0.15, 0.5])
def test_perturbed_actions_stay_near_and_in_bounds(most):
    action = jax.random.uniform(jax.random.key(0), (1000, 3), minval=-1.0)
    direction = 5.0 * jax.random.normal(jax.random.key(1), (1000, 3))
    moved = bcq.perturb(action, direction, most)
    assert np.abs(moved - action).max() <= most + 1e-6
    assert np.abs(moved).max() == 1.0  # reached, and not left
    assert_close(bcq.perturb(0.2, 100.0, most), 0.2 + most)
    assert_close(bcq.perturb(0.2, -100.0, most), 0.2 - most)
    assert_close(bcq.perturb(0.2, 0.5, most), 0.2 + most * math.tanh(0.5))


def test_a_perturbation_passes_gradients_inside_the_bounds():
    slope = lambda action: jax.grad(lambda x: bcq.perturb(action, x, 0.1))(0.5)
    assert_close(slope(0.2), 0.1 / math.cosh(0.5) ** 2)
    assert slope(1.0) == 0.0


@partial(jax.jit, static_argnums=1)
def played(policy, config, latent, obs):
    """Perturbed actions at `obs` from latents that are clipped already, and their values [2, B]."""
    drawn = bcq.Decoder(config, 1).apply(policy["decoder"], obs, latent)
    network = bcq.MLP(config.hidden, 1)
    direction = jnp.tanh(network.apply(policy["perturbation"], obs, drawn))
    action = jnp.clip(drawn + config.max_perturbation * direction, -1.0, 1.0)
    return action, bcq.Critic(config).apply(policy["critic"], obs, action)


PLAYS = config_of(max_perturbation=0.3)


@pytest.mark.parametrize("greedy", [True, False])
def test_it_plays_the_draw_that_the_first_critic_prefers(greedy):
    """Latents are clipped, and max_perturbation is the policy's own: another value may be swept."""
    algo = tiny.build("bcq", config_of())
    policy = algo.policy_of(first_state(PLAYS))
    assert policy.keys() == {"critic", "perturbation", "decoder", "max_perturbation"}
    obs, key = jax.random.normal(jax.random.key(0), (6, 4)), jax.random.key(1)
    noise = np.asarray(jax.random.normal(key, (10, 6, 2)))
    assert (np.abs(noise) > 0.5).any()
    noise = np.clip(noise, -0.5, 0.5)
    actions, values = zip(*(played(policy, PLAYS, z, obs) for z in noise), strict=True)
    first = np.array(values)[:, 0]
    assert (first.argmax(0) != np.array(values)[:, 1].argmax(0)).any()  # the second would not do
    expected = np.array(actions)[first.argmax(0), np.arange(6)]
    act = jax.jit(lambda key: algo.act(policy, obs, key, greedy))
    assert_close(act(key), expected)
    assert (act(jax.random.key(2)) != expected).any()


# --- targets and losses ---


def test_mix():
    value = jnp.array([[1.0, 3.0], [3.0, 1.0]])
    assert_close([bcq.mix(value, w) for w in (1.0, 0.75, 0.0)], [[1, 1], [1.5, 1.5], [3, 3]])


def test_targets_by_hand():
    value = jnp.broadcast_to(jnp.array([10.0, 12.0])[:, None, None], (2, 3, 2))
    ends = jnp.array([False, True])
    target = lambda value: bcq.best_target(jnp.ones(2), ends, value, 0.99, 0.75)
    assert_close(target(value), [11.395, 1.0])
    assert_close(target(value.at[..., 1].set(jnp.nan)), [11.395, 1.0])  # nothing of it enters
    assert_close(jax.grad(lambda value: target(value).sum())(value), 0.0)


def test_critics_are_mixed_before_the_best_draw_is_taken():
    """Draws whose critics say (0, 8) and (3, 3): the mixed maxima would be 0.75 * 3 + 0.25 * 8."""
    value = jnp.array([[[0.0], [3.0]], [[8.0], [3.0]]])  # [critics, draws, B]
    assert_close(bcq.best_target(0.0, False, value, 1.0, 0.75), [3.0])
    assert_close(bcq.best_target(0.0, False, value, 1.0, 0.25), [6.0])


def test_critics_share_one_loss():
    value, target = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 0.0])
    assert_close(bcq.critic_loss(value, target), (0 + 4) / 2 + (4 + 16) / 2)


def test_kl_of_latents():
    assert_close(bcq.latent_kl(0.0, 0.0), 0.0)
    for mean, std in itertools.product((-0.4, 1.3), (0.3, 2.0)):
        z = np.linspace(mean - 12 * std, mean + 12 * std, 20_001)
        p = stats.norm.pdf(z, mean, std)
        log_ratio = stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z)
        expected = np.trapezoid(p * log_ratio, z)
        assert_close(bcq.latent_kl(mean, math.log(std)), expected, rtol=1e-4)


def test_vae_loss_by_hand():
    """Both terms are means over rows and dimensions, of which latents have twice as many."""
    action, latent = jnp.zeros((5, 2)), jnp.zeros((5, 4))
    loss = partial(bcq.vae_loss, action=action)
    assert_close(loss(action, mean=latent, log_std=latent), 0.0)
    assert_close(loss(action, mean=latent + 1.0, log_std=latent), 0.25)
    assert_close(loss(action + 0.3, mean=latent, log_std=latent), 0.09)
    assert_close(loss(action.at[0, 0].set(1.0), mean=latent, log_std=latent), 0.1)


# --- networks ---


def test_outputs_are_limited():
    """With weights of +-100: the log std of latents, and actions."""
    config, obs = config_of(vae_hidden=()), jnp.ones((1, 4))
    encoder, decoder = bcq.Encoder(config, 1), bcq.Decoder(config, 1)
    encoded = encoder.init(jax.random.key(0), obs, jnp.ones((1, 1)))
    decoded = decoder.init(jax.random.key(0), obs, jnp.ones((1, 2)))
    for by, log_std in ((100.0, 15.0), (-100.0, -4.0)):
        mean, clipped = encoder.apply(shifted(encoded, by), obs, jnp.ones((1, 1)))
        assert_close(clipped, np.full((1, 2), log_std))
        assert np.abs(mean).min() > 100.0
        assert_close(decoder.apply(shifted(decoded, by), obs, jnp.ones((1, 2))), [[np.sign(by)]])


def test_weights_start_uniform_and_biases_at_zero():
    for path, x in tiny.arrays(first_state(config_of(hidden=(64,))).params).items():
        if "bias" in path:
            assert (x == 0).all()
            continue
        limit = math.sqrt(6 / sum(x.shape[-2:]))
        assert 0.5 * limit < np.abs(x).max() <= limit, path


# --- gradient steps ---

BY_HAND = config_of(
    gradient_steps=3, batch_size=5, polyak_tau=0.25, max_perturbation=0.4, critic_lr=1e-2,
    learning_rate=5e-3, vae_lr=2e-3, min_weight=0.6, gamma=0.9,
)  # fmt: skip


def test_gradient_steps_by_hand():
    """Three steps from the same draws, the targets state by state and draw by draw."""
    config, rows, before = BY_HAND, rows_of(15), first_state(BY_HAND)
    # Targets that are elsewhere, so that it shows when they move, and that they are used.
    before = before._replace(target_params=shifted(before.target_params, 0.1))
    after, metrics = update_of(config)(before, rows)

    encoder, decoder, critic = bcq.Encoder(config, 1), bcq.Decoder(config, 1), bcq.Critic(config)
    perturbation = bcq.MLP(config.hidden, 1)

    def perturbed(decoder_params, perturbation_params, obs, noise):
        action = decoder.apply(decoder_params, obs, jnp.clip(noise, -0.5, 0.5))
        step = 0.4 * jnp.tanh(perturbation.apply(perturbation_params, obs, action))
        return jnp.clip(action + step, -1.0, 1.0)

    def target_of(params, targets, row, noise):
        """y of a single row from noise [10, 2]."""

        def mixed(z):
            action = perturbed(params["vae"]["decoder"], targets["perturbation"], row.next_obs, z)
            one, two = critic.apply(targets["critic"], row.next_obs, action)
            return 0.6 * jnp.minimum(one, two) + 0.4 * jnp.maximum(one, two)

        return row.reward + 0.9 * (1.0 - row.terminated) * jax.lax.map(mixed, noise).max()

    def q_loss(p, batch, y):
        one, two = critic.apply(p, batch.obs, batch.action)
        return ((one - y) ** 2).mean() + ((two - y) ** 2).mean()

    def policy_loss(p, params, batch, noise):
        action = perturbed(params["vae"]["decoder"], p, batch.obs, noise)
        return -critic.apply(params["critic"], batch.obs, action)[0].mean()

    def vae_loss(p, batch, noise):
        mean, log_std = encoder.apply(p["encoder"], batch.obs, batch.action)
        latent = mean + jnp.exp(log_std) * noise
        error = decoder.apply(p["decoder"], batch.obs, latent) - batch.action
        kl = 0.5 * (mean**2 + jnp.exp(log_std) ** 2 - 1.0) - log_std
        return (error**2).mean() + 0.5 * kl.mean()

    def adam(params, moments, rate, t, loss, *args):
        """The t-th step of Adam: loss before it, parameters, mean and square of gradients."""
        value, grads = jax.value_and_grad(loss)(params, *args)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
        square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, moments[1], grads)
        length = lambda v: jnp.sqrt(v / (1 - 0.999**t)) + 1e-7
        move = lambda p, m, v: p - rate * m / (1 - 0.9**t) / length(v)
        return value, jax.tree.map(move, params, mean, square), (mean, square)

    @jax.jit
    def step(t, params, targets, moments, batch, key):
        """The t-th step, t = 1, 2, 3."""
        keys, normal = jax.random.split(key, 3), jax.random.normal
        online = {name: params[name] for name in targets}
        targets = jax.tree.map(lambda x, y: (3 * x + y) / 4, targets, online)
        noise = normal(keys[0], (10, 5, 2)).swapaxes(0, 1)
        y = jax.lax.map(lambda row: target_of(params, targets, *row), (batch, noise))
        losses = {}

        def learn(name, *args):
            nonlocal params, moments
            loss, new, moved = adam(params[name], moments[name], *args)
            params, moments = params | {name: new}, moments | {name: moved}
            losses[name] = loss

        learn("critic", 1e-2, t, q_loss, batch, y)
        learn("perturbation", 5e-3, t, policy_loss, params, batch, normal(keys[1], (5, 2)))
        learn("vae", 2e-3, t, vae_loss, batch, normal(keys[2], (5, 2)))
        return params, targets, moments, jnp.stack([y.mean(), *losses.values()])

    params, targets, seen = before.params, before.target_params, []
    moments = {name: (jax.tree.map(jnp.zeros_like, params[name]),) * 2 for name in params}
    _, key_index, key_steps = jax.random.split(before.key, 3)
    index = jax.random.randint(key_index, (3, 5), 0, 15)
    assert rows.terminated[index].any()
    for i, key in enumerate(jax.random.split(key_steps, 3)):
        batch = jax.tree.map(lambda x: x[index[i]], rows)  # noqa: B023
        t = jnp.float32(i + 1)
        params, targets, moments, losses = step(t, params, targets, moments, batch, key)
        seen.append(losses)
    names = ("losses/target", "losses/qf_loss", "losses/policy_loss", "losses/vae_loss")
    assert_close([metrics[name] for name in names], np.mean(seen, 0), rtol=1e-4)
    tiny.assert_close(after.target_params, targets, rtol=1e-4, atol=1e-5)
    tiny.assert_close(after.params, params, rtol=1e-3, atol=1e-5)


def test_targets_start_as_copies():
    state = first_state(config_of())
    copies = {name: state.params[name] for name in ("critic", "perturbation")}
    tiny.assert_same(state.target_params, copies)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "share"), [(1, 0.005), (100, 0.394230), (1000, 0.993346)])
def test_targets_follow(steps, share):
    """From 1 below parameters that stand still."""
    config = config_of(gradient_steps=steps, critic_lr=0.0, learning_rate=0.0)
    state = first_state(config)
    away = state._replace(target_params=shifted(state.target_params, -1.0))
    after, _ = update_of(config)(away, rows_of())
    tiny.assert_close(after.target_params, shifted(state.target_params, share - 1.0), atol=1e-4)


def test_what_plays_is_not_a_target_network():
    algo, state = tiny.build("bcq", PLAYS), first_state(PLAYS)
    away = state._replace(target_params=shifted(state.target_params))
    tiny.assert_same(algo.policy_of(away), algo.policy_of(state))


def test_metrics_of_a_step():
    """Of one gradient step that changes nothing, from the same draws."""
    still = {"critic_lr": 0.0, "learning_rate": 0.0, "vae_lr": 0.0}
    config = config_of(gradient_steps=1, batch_size=40, max_perturbation=0.4, **still)
    state, rows = first_state(config), rows_of(60)
    # A decoder whose actions reach the bounds in some rows.
    vae = state.params["vae"] | {"decoder": scaled(state.params["vae"]["decoder"], 2.0)}
    params = state.params | {"vae": vae}
    _, metrics = update_of(config)(state._replace(params=params), rows)
    _, key_index, key_steps = jax.random.split(state.key, 3)
    index = jax.random.randint(key_index, (1, 40), 0, 60)[0]
    keys = jax.random.split(jax.random.split(key_steps, 1)[0], 3)
    obs, data = rows.obs[index], rows.action[index]
    decode = lambda latent: bcq.Decoder(config, 1).apply(vae["decoder"], obs, latent)
    drawn = decode(jnp.clip(jax.random.normal(keys[1], (40, 2)), -0.5, 0.5))
    step = 0.4 * jnp.tanh(bcq.MLP(config.hidden, 1).apply(params["perturbation"], obs, drawn))
    action = jnp.clip(drawn + step, -1.0, 1.0)
    mean, log_std = bcq.Encoder(config, 1).apply(vae["encoder"], obs, data)
    std = jnp.exp(log_std)
    error = decode(mean + std * jax.random.normal(keys[2], (40, 2))) - data
    expected = {
        "perturbation": abs(action - drawn).mean(),
        "saturated_fraction": (abs(action) > 0.99).mean(),
        "q_data": bcq.Critic(config).apply(params["critic"], obs, data).mean(),
        "reconstruction_error": (error**2).mean(),
        "latent_kl": (0.5 * (mean**2 + std**2 - 1.0) - log_std).mean(),
    }
    assert 0.05 < expected["saturated_fraction"] < 0.95
    for name, value in expected.items():
        assert_close(metrics[f"losses/{name}"], value, rtol=1e-4, err_msg=name)


# --- a program of several values ---


@pytest.mark.slow
def test_swept_values_train_as_they_would_alone():
    """A grid of seeds, perturbations and step sizes in one program, 64 gradient steps each."""
    config = config_of(total_timesteps=64)
    train, rows = bcq.make_train(config), rows_of()
    grid = [(0, 0.05, 3e-5), (1, 0.5, 3e-5), (1, 0.5, 1e-3)]
    seeds, most, rates = (jnp.array(x) for x in zip(*grid, strict=True))
    hparams = {"max_perturbation": most, "learning_rate": rates}
    keys = jax.vmap(jax.random.key)(seeds)
    together = jax.jit(jax.vmap(train, (0, 0, None)))(keys, hparams, rows)["state"]
    for i, (seed, most, rate) in enumerate(grid):
        alone = dataclasses.replace(config, max_perturbation=most, learning_rate=rate)
        state = jax.jit(bcq.make_train(alone))(jax.random.key(seed), None, rows)["state"]
        tiny.assert_close(jax.tree.map(lambda x: x[i], together.params), state.params)  # noqa: B023


# --- learning ---


@cache
def bandit(max_perturbation):
    """Greedy actions after learning from actions in [-0.4, 0.2]; the best action is 0.8."""
    config = config_of(
        **{"env": "probe/value-continuous", "gradient_steps": 1500, "batch_size": 64},
        **{"hidden": (16,), "critic_hidden": (32,), "vae_hidden": (32,), "polyak_tau": 0.05},
        **{"learning_rate": 1e-3, "critic_lr": 3e-3, "vae_lr": 3e-3},
    )
    rng = np.random.default_rng(0)
    action = jnp.float32(rng.uniform(-0.4, 0.2, size=(4000, 1)))
    obs = jnp.zeros((4000, 1))
    rows = bcq.Batch(obs, action, -((action[:, 0] - 0.8) ** 2), jnp.ones(4000, bool), obs)
    train = jax.jit(
        lambda most: bcq.make_train(config)(jax.random.key(0), {"max_perturbation": most}, rows)
    )
    algo = tiny.build("bcq", config)
    policy = algo.policy_of(train(jnp.float32(max_perturbation))["state"])
    return algo.act(policy, jnp.zeros((200, 1)), jax.random.key(1), True)


@pytest.mark.slow
def test_it_improves_on_the_data_but_stays_near_them():
    """Better with more freedom, which is bounded: 0.8 is out of reach of either."""
    near, far = bandit(0.05), bandit(0.2)
    assert -0.1 < near.mean() < 0.3
    assert near.mean() + 0.1 < far.mean() < 0.45


# --- configuration ---


def test_rows_are_shared_and_have_no_next_action():
    program, _, _ = tiny.program_of("bcq", config_of())
    (rows,) = program.data
    assert rows.obs.sharding.is_fully_replicated
    assert rows._fields == ("obs", "action", "reward", "terminated", "next_obs")
    np.testing.assert_array_equal(rows.terminated, tiny.transitions(64).terminated)


def test_published_sizes():
    """Parameters of each network for HalfCheetah's 17 observations and 6 actions."""
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    config, obs, action = bcq.Config(), jnp.zeros((1, 17)), jnp.zeros((1, 6))
    shapes = lambda network, *x: jax.eval_shape(network.init, jax.random.key(0), *x)
    dense = lambda *sizes: sum((a + 1) * b for a, b in itertools.pairwise(sizes))
    assert count(shapes(bcq.Critic(config), obs, action)) == 2 * 97_801
    assert count(shapes(bcq.Encoder(config, 6), obs, action)) == dense(23, 750, 750, 24)
    latent = jnp.zeros((1, 12))
    assert count(shapes(bcq.Decoder(config, 6), obs, latent)) == dense(29, 750, 750, 6)
    perturbation = bcq.MLP(config.hidden, 6)
    assert count(shapes(perturbation, obs, action)) == dense(23, 300, 300, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, r"dataset='': give --dataset PATH"),
        ({"gradient_steps": 0}, "gradient_steps=0: it should be greater than 0"),
        ({"max_perturbation": -0.1}, "max_perturbation=-0.1: it should be greater than or equal"),
        ({"min_weight": 1.5}, "min_weight=1.5: it should be less than or equal to 1"),
        ({"vae_hidden": (8, 0)}, r"vae_hidden=\(8, 0\): it should be greater than 0"),
        ({"env": "cartpole"}, "discrete actions"),
    ],
)
def test_bad_input_is_one_error(changes, message):
    with pytest.raises(ValueError, match=message):
        bcq.make_train(config_of(**changes))


def test_a_launch_names_a_value_out_of_range(tmp_path, capsys):
    argv = [*tiny.flags_of(config_of(min_weight=1.5)), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as status:
        launch.main("bcq", argv)
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith("error: min_weight=1.5: ")
