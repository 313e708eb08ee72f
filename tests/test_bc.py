"""Behaviour cloning: densities of given actions, losses, the weight of the entropy, recovery."""

import dataclasses
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from scipy import stats
from tiny import assert_allclose

from algos import bc, launch
from algos.common import TanhGaussian
from algos.launch import datasets
from algos.launch.program import row_bytes

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_bc")


def config_of(**changes):
    return tiny.config_of("bc", **changes)


# --- densities of given actions ---


def test_density_of_given_actions():
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(50, 2)), rng.uniform(0.1, 1.0, size=(50, 2))
    policy = TanhGaussian(jnp.float32(mean), jnp.float32(std))
    u = policy.sample(jnp.float32(rng.normal(size=(50, 2))))
    action = np.float64(jnp.tanh(u))
    inside = (abs(action) < 0.99).all(1)
    assert inside.sum() > 20
    expected = stats.norm.logpdf(np.arctanh(action), mean, std) - np.log(1 - action**2)
    actual = bc.given_log_prob(policy, jnp.tanh(u))
    assert_allclose(actual[inside], expected.sum(1)[inside], rtol=1e-3, atol=1e-3)
    assert_allclose(actual[inside], policy.log_prob(u)[inside], rtol=1e-3, atol=1e-3)


def test_actions_on_the_bounds_have_the_density_of_those_just_inside():
    policy = TanhGaussian(jnp.zeros(1), jnp.full(1, 0.5))
    density = lambda action: bc.given_log_prob(policy, jnp.array([action]))
    for sign in (-1.0, 1.0):
        assert jnp.isfinite(density(sign))
        assert_allclose(density(sign), density(0.999 * sign))
        assert jax.grad(density)(sign) == 0.0
    assert_allclose(density(0.5), -0.541584)
    assert jax.grad(density)(0.9) != 0.0


def test_std_of_the_policy():
    actor = bc.Actor(config_of(hidden=()), 1)
    params = actor.init(jax.random.key(0), jnp.zeros((1, 3)))
    for raw, std in ((0.0, 0.082085), (-20.0, 0.0067379), (20.0, 1.0)):
        params["params"]["Dense_0"]["bias"] = jnp.array([0.7, raw])
        policy = actor.apply(params, jnp.zeros((2, 3)))
        assert_allclose(policy.std, np.full((2, 1), std), atol=1e-6)
        assert_allclose(policy.mean, np.full((2, 1), 0.7))


# --- losses ---


def test_policy_loss_by_hand():
    own, given = jnp.array([0.5, -1.0]), jnp.array([0.2, 0.4])
    assert_allclose(bc.policy_loss(own, given, 0.3), (0.3 * -0.5 - 0.6) / 2)
    grads = jax.grad(bc.policy_loss, (0, 1, 2))(own, given, 0.3)
    assert_allclose(grads[0], [0.15, 0.15])
    assert_allclose(grads[1], [-0.5, -0.5])
    assert grads[2] == 0.0


@pytest.mark.parametrize(("x", "up", "down"), [(0.2, 1, -1), (0.0, 0, -1), (-0.1, 0, -1)])
def test_the_temperature_can_always_come_back(x, up, down):
    slope = jax.grad(bc.temperature_loss)
    gradient = lambda surplus: slope(jnp.float32(x), jnp.full(3, -surplus), 0.0)
    assert [float(gradient(surplus)) for surplus in (1.0, -1.0)] == [up, down]


@pytest.mark.parametrize(("entropy", "gradient"), [(-1.5, 0.5), (-2.5, -0.5)])
def test_the_temperature_falls_while_entropy_is_above_its_target(entropy, gradient):
    loss = lambda v, log_prob: bc.temperature_loss(v, log_prob, -2.0)
    grads = jax.grad(loss, (0, 1))(0.4, jnp.full(3, -entropy))
    assert_allclose(grads[0], gradient)  # descent is against it
    assert (grads[1] == 0).all()
    assert_allclose(loss(0.4, jnp.full(3, -entropy)), 0.4 * gradient)


# --- updates ---


@cache
def update_of(config):
    """Compiled update of a configuration: state, batch of all rows -> state, metrics."""
    return jax.jit(tiny.build("bc", config).update)


def first_state(config):
    return jax.jit(tiny.build("bc", config).init)(jax.random.key(0))


def rows_of(n, **changes):
    dataset = tiny.transitions(n, **changes)
    return bc.Batch(jnp.asarray(dataset.obs), jnp.asarray(dataset.action))


BY_HAND = config_of(gradient_steps=3, batch_size=5, target_entropy_mult=0.7, learning_rate=1e-2)


def test_gradient_steps_by_hand():
    """Three steps from the same draws: the policy, then the weight with the new policy."""
    rows, before = rows_of(12), first_state(BY_HAND)
    after, metrics = update_of(BY_HAND)(before, rows)
    actor, params = bc.Actor(BY_HAND, 1), before.params
    adam = optax.adam(1e-2, eps=1e-7)

    def own(p, obs, key):
        policy = actor.apply(p, obs)
        noise = jax.random.normal(key, (5, 1))
        return policy, policy.log_prob(policy.mean + noise * policy.std)

    @jax.jit
    def step(params, opt, batch, key):
        key_policy, key_weight = jax.random.split(key)

        def policy_loss(p):
            policy, log_prob = own(p, batch.obs, key_policy)
            u = jnp.arctanh(jnp.clip(batch.action, -0.999, 0.999))
            return (params["temperature"] * log_prob - policy.log_prob(u)).mean()

        loss, grads = jax.value_and_grad(policy_loss)(params["actor"])
        direction, moments = adam.update(grads, opt["actor"])
        new = {"actor": optax.apply_updates(params["actor"], direction)}
        gradient = (-own(new["actor"], batch.obs, key_weight)[1] + 0.7).mean()
        direction, weight_moments = adam.update(gradient, opt["temperature"])
        new["temperature"] = params["temperature"] + direction
        return new, {"actor": moments, "temperature": weight_moments}, loss

    opt = {name: adam.init(params[name]) for name in params}
    _, key_index, key_steps = jax.random.split(before.key, 3)
    index = jax.random.randint(key_index, (3, 5), 0, 12)
    losses = []
    for i, key in zip(index, jax.random.split(key_steps, 3), strict=True):
        batch = jax.tree.map(lambda x: x[i], rows)  # noqa: B023
        params, opt, loss = step(params, opt, batch, key)
        losses.append(loss)
    assert (params["temperature"] > 0) & (params["temperature"] != 1)
    assert_allclose(metrics["losses/policy_loss"], np.mean(losses), rtol=1e-4)
    tiny.assert_close(after.params, params, rtol=1e-3, atol=1e-5)


def test_the_dataset_is_an_argument():
    """One program learns from any rows, none of which are constants in it."""
    config = config_of()
    program, keys, hparams = tiny.program_of("bc", config)
    (rows,) = program.data
    np.testing.assert_array_equal(rows.obs, tiny.transitions(64).obs)
    np.testing.assert_array_equal(rows.action, tiny.transitions(64).action)
    assert rows.obs.sharding.is_fully_replicated
    state = jax.eval_shape(program.init, keys, hparams)
    traced = program.train.trace(state, hparams, jnp.int32(1), rows)
    assert max([x.size for x in traced.jaxpr.consts], default=0) < rows.action.size
    # weights 4 x 8 + 8 + 8 x 2 + 2 and v, with two moments each; two counters, a key, a counter
    assert row_bytes(state) == 4 * 3 * (58 + 1) + 2 * 4 + 8 + 4


def test_drawn_actions_and_metrics():
    """Of one gradient step that changes nothing, from the same draws."""
    config = config_of(gradient_steps=1, learning_rate=0.0, batch_size=5)
    state, rows = first_state(config), rows_of(12)
    _, metrics = update_of(config)(state, rows)
    _, key_index, key_steps = jax.random.split(state.key, 3)
    index = jax.random.randint(key_index, (1, 5), 0, 12)[0]
    batch = jax.tree.map(lambda x: x[index], rows)
    key = jax.random.split(jax.random.split(key_steps, 1)[0])[0]
    policy = bc.Actor(config, 1).apply(state.params["actor"], batch.obs)
    u = policy.mean + policy.std * jax.random.normal(key, (5, 1))
    wanted = {
        "entropy": -policy.log_prob(u).mean(),
        "std": policy.std.mean(),
        "mode_error": ((np.tanh(policy.mean) - batch.action) ** 2).mean(),
        "log_likelihood": bc.given_log_prob(policy, batch.action).mean(),
    }
    for name, value in wanted.items():
        assert_allclose(metrics[f"losses/{name}"], value, rtol=1e-4)
    algo = tiny.build("bc", config)
    assert_allclose(algo.act(algo.policy_of(state), batch.obs, key, False), np.tanh(u))


# --- configuration ---


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"dataset='': give --dataset PATH"):
        bc.make_train(config_of(dataset=""))
    with pytest.raises(ValueError, match="gradient_steps=0: it should be greater than 0"):
        bc.make_train(config_of(gradient_steps=0))
    with pytest.raises(ValueError, match="does not exist"):
        tiny.build("bc", config_of(dataset="nowhere.npz")).data([0])
    with pytest.raises(ValueError, match="discrete actions"):
        bc.make_env(config_of(env="cartpole"))


def test_a_policy_needs_no_dataset():
    """What acts is built without reading what it was learned from."""
    algo = tiny.build("bc", config_of(dataset="gone.npz"))
    policy = algo.policy_of(first_state(config_of()))
    assert algo.act(policy, jnp.zeros((3, 4)), jax.random.key(0), True).shape == (3, 1)


def test_a_launch_with_a_bad_dataset_is_one_line_and_leaves_nothing(tmp_path, capsys):
    """Before anything compiles: also where rows and file are fine, but of another task."""
    datasets.write(tmp_path / "other.npz", tiny.transitions(20, 3), {"env": "gymnax/Pendulum-v1"})
    wanted = {"nowhere.npz": "does not exist", "other.npz": r"\(obs \[20, 3\], action \[20, 1\]\)"}
    for name, message in wanted.items():
        argv = tiny.flags_of(config_of(dataset=str(tmp_path / name)))
        argv += ["--run-dir", str(tmp_path / "run"), "--verbose", "0"]
        with pytest.raises(SystemExit) as status:
            launch.main("bc", argv)
        assert status.value.code == 2
        said = capsys.readouterr().err
        assert re.match(rf"error: .*{message}.*\n\Z", said), said
        assert [p.name for p in tmp_path.iterdir()] == ["other.npz"]


# --- recovery ---

# Nothing is observed, so that the policy is one distribution.
RECOVERY = config_of(
    env="probe/value-continuous", hidden=(), batch_size=256, gradient_steps=1000, learning_rate=1e-3
)


def blind(action):
    return bc.Batch(jnp.zeros((len(action), 1)), jnp.float32(action)[:, None])


def test_the_distribution_of_the_data_is_recovered():
    noise = np.random.default_rng(0).normal(size=20_000)
    state, update = first_state(RECOVERY), update_of(RECOVERY)
    rows = blind(np.tanh(0.5 + 0.3 * noise))
    for _ in range(4):
        state, metrics = update(state, rows)
    policy = bc.Actor(RECOVERY, 1).apply(state.params["actor"], jnp.zeros(1))
    assert_allclose(policy.mean, [0.5], rtol=0, atol=0.02)
    assert_allclose(policy.std, [0.3], rtol=0, atol=0.02)
    assert_allclose(metrics["losses/temperature"], 0.0, atol=1e-3)


@pytest.mark.slow
def test_constant_data_meet_the_target_of_the_entropy():
    """(entropy, weight) orbit around (-1, 1): only their averages are there."""
    config = dataclasses.replace(RECOVERY, learning_rate=5e-4)
    state, update, rows = first_state(config), update_of(config), blind(np.full(100, 0.2))
    seen = []
    for _ in range(30):
        state, metrics = update(state, rows)
        seen.append((metrics["losses/entropy"], metrics["losses/temperature"]))
    entropy, weight = np.mean(seen[10:], 0)
    assert_allclose(entropy, -1.0, rtol=0, atol=0.05)
    assert_allclose(weight, 1.01, rtol=0, atol=0.1)


def test_a_clone_depends_on_what_it_observes():
    config = dataclasses.replace(RECOVERY, hidden=(8,), learning_rate=5e-3)
    rng = np.random.default_rng(0)
    obs = rng.choice([-1.0, 1.0], size=(2000, 1))
    action = np.tanh(0.7 * obs + 0.3 * rng.normal(size=obs.shape))
    rows = bc.Batch(jnp.float32(obs), jnp.float32(action))
    state, _ = update_of(config)(first_state(config), rows)
    algo = tiny.build("bc", config)
    action = algo.act(algo.policy_of(state), jnp.array([[-1.0], [1.0]]), jax.random.key(0), True)
    assert_allclose(action, np.tanh([[-0.7], [0.7]]), atol=0.05)
