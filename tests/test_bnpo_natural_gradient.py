"""The natural gradient of BNPO: Fisher products, conjugate gradients, the line search."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import assert_allclose

from algos import bnpo
from algos.common import Gaussian


def tiny_policy(params, obs):
    hidden = jnp.tanh(obs @ params["first"])
    log_std = jnp.broadcast_to(params["log_std"], (len(obs), 2))
    return Gaussian(hidden @ params["second"], log_std)


def tiny_problem(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"first": (3, 4), "second": (4, 2), "log_std": (2,)}
    params, vector = (
        {n: 0.5 * jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), ks, strict=True)}
        for ks in (jax.random.split(keys[0], 3), jax.random.split(keys[1], 3))
    )
    return params, vector, jax.random.normal(keys[2], (7, 3))


def test_fisher_product_is_the_hessian_of_the_kl():
    params, vector, obs = tiny_problem()
    policy_of = lambda params: tiny_policy(params, obs)
    product = jax.jit(partial(bnpo.fisher_product, policy_of, damping=0.1))(params, vector)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    kl = lambda x: bnpo.kl_divergence(policy_of(params), policy_of(unravel(x))).mean()
    direct = jax.jit(jax.hessian(kl))(flat) @ jax.flatten_util.ravel_pytree(vector)[0]
    expected = jax.tree.map(lambda h, v: h + 0.1 * v, unravel(direct), vector)
    for name in params:
        assert_allclose(product[name], expected[name], atol=1e-4)


def test_fisher_of_a_linear_mean():
    """E[s s'] times one over the variance."""
    _, _, obs = tiny_problem(1)
    weights = jnp.ones((3, 2))
    policy_of = lambda w: Gaussian(
        obs @ w, jnp.broadcast_to(jnp.log(jnp.array([2.0, 0.5])), (7, 2))
    )
    vector = jax.random.normal(jax.random.key(3), (3, 2))
    product = bnpo.fisher_product(policy_of, weights, vector, 0.0)
    assert_allclose(product, obs.T @ obs / 7 @ vector / jnp.array([4.0, 0.25]), atol=1e-4)


def sloped(policy_of, seed=5):
    """A loss that is linear in what the policy gives."""
    keys = jax.random.split(jax.random.key(seed))
    mean, log_std = (jax.random.normal(key, (7, 2)) for key in keys)
    return lambda params: (
        (mean * policy_of(params).mean).mean() + (log_std * policy_of(params).log_std).mean()
    )


def test_natural_step_has_the_wanted_kl():
    delta = 1e-4
    params, _, obs = tiny_problem(2)
    policy_of = lambda params: tiny_policy(params, obs)
    loss = sloped(policy_of)
    step = lambda x: bnpo.natural_step(loss, policy_of, x, jax.grad(loss)(x), delta, 1e-6)
    new = jax.jit(step)(params)
    assert_allclose(bnpo.kl_divergence(policy_of(params), policy_of(new)).mean(), delta, rtol=0.05)
    assert loss(new) < loss(params)


def test_natural_step_solves_the_fisher_system():
    """As many steps of conjugate gradients as there are parameters, against a direct solution."""
    _, _, obs = tiny_problem(6)
    std, damping, delta = jnp.array([2.0, 0.5]), 1e-2, 1e-4
    policy_of = lambda w: Gaussian(obs @ w, jnp.broadcast_to(jnp.log(std), (7, 2)))
    loss, start = sloped(policy_of), jnp.ones((3, 2))
    grads = jax.grad(loss)(start)
    new = bnpo.natural_step(loss, policy_of, start, grads, delta, damping, iterations=6)
    fisher = np.kron(obs.T @ obs / 7, np.diag(std**-2.0)) + damping * np.eye(6)
    step = -np.linalg.solve(np.float64(fisher), np.float64(grads).ravel())
    step *= np.sqrt(2 * delta / (step @ fisher @ step))
    assert_allclose((new - start).ravel(), step, rtol=1e-3, atol=1e-3 * np.abs(step).max())


def test_natural_step_stays_where_nothing_helps():
    params, vector, obs = tiny_problem(3)
    loss = lambda params: 0.0 * params["log_std"].sum()
    step = partial(bnpo.natural_step, loss, lambda p: tiny_policy(p, obs))
    new = jax.jit(step)(params, vector)
    for name in params:
        np.testing.assert_array_equal(new[name], params[name])


def test_natural_step_is_halved_until_it_helps():
    """The full step, sqrt(2 delta), and its half end above the start of a narrow valley."""
    policy_of = lambda mean: Gaussian(jnp.full((7, 1), mean), jnp.zeros((7, 1)))
    loss = lambda mean: (mean - 0.01) ** 2
    new = bnpo.natural_step(loss, policy_of, 0.0, jax.grad(loss)(0.0), 1e-3, 1e-9)
    assert_allclose(new, math.sqrt(2e-3) / 4, rtol=1e-3)


def test_natural_step_is_halved_until_it_is_near():
    """The full step helps, but the KL there is nine times what the Fisher matrix promises."""
    policy_of = lambda x: Gaussian(jnp.full((7, 1), x + 1e3 * x**3), jnp.zeros((7, 1)))
    new = bnpo.natural_step(jnp.negative, policy_of, 0.0, -1.0, 1e-3, 1e-9)
    assert_allclose(new, math.sqrt(2e-3) / 2, rtol=1e-3)


def test_natural_step_does_not_depend_on_the_parametrisation():
    """Twice the unit of log_std: the same change of the policy, to first order."""
    params, _, obs = tiny_problem(4)
    outcomes = []
    for unit in (1.0, 2.0):
        start = params | {"log_std": params["log_std"] / unit}
        policy_of = lambda p, unit=unit: tiny_policy(p | {"log_std": unit * p["log_std"]}, obs)
        loss = sloped(policy_of)
        grads = jax.grad(loss)(start)
        step = partial(bnpo.natural_step, loss, policy_of, delta=1e-4, damping=1e-6)
        new = jax.jit(partial(step, iterations=60))(start, grads)
        old, new = policy_of(start), policy_of(new)
        outcomes.append([new.mean - old.mean, new.log_std - old.log_std])
    for x, y in zip(*outcomes, strict=True):
        assert_allclose(x, y, rtol=0.05, atol=2e-4)


@pytest.mark.parametrize(
    ("rule", "slope"),
    [("ppo", 1e3), ("ppo", -1e3), ("weighted_ddpg", 1e-3), ("weighted_ddpg", -1e-3)],
)
def test_the_line_search_moves_only_what_has_a_gradient(rule, slope):
    """A steep critic does not refuse PPO's step, nor do large ratios one of a flat critic.

    The value is `slope` times the sum of the means, which are 0 at first.
    """
    first = tiny.config_of("bnpo").brains[0]
    brain = dataclasses.replace(first, rule=rule, natural_gradient=True, turn_minibatches=1.0)
    config = tiny.config_of("bnpo", brains=(brain,), hidden=(), critic_lr=0.0)
    algo = tiny.build("bnpo", config)
    state = algo.init(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    layers = zeros["critic"]["params"]
    size, actions = state.obs.shape[-1], state.replay.action.shape[-1]
    layers["Dense_1"]["kernel"] = layers["Dense_1"]["kernel"].at[:actions].set(slope / size)
    layers["Dense_2"]["kernel"] = layers["Dense_2"]["kernel"].at[size:].set(1.0)
    state = state._replace(
        params=zeros, target_params=state.target_params | {"critic": zeros["critic"]}
    )
    update = jax.jit(algo.update)
    state = update(state)[0]._replace(
        target_params=jax.tree.map(jnp.zeros_like, state.target_params)
    )
    new, metrics = update(state)
    assert metrics["brain0/count"] == 1.0
    no_noise = jax.tree.map(jnp.zeros_like, state.noise)
    actor = bnpo.Actor(config, actions)
    old, new = (actor.apply(x.params["actor"], state.obs, no_noise) for x in (state, new))
    assert_allclose(old.mean, 0.0, atol=0.0)
    assert bnpo.kl_divergence(old, new).mean() > 1e-5


def test_natural_step_of_a_policy_that_does_not_move():
    """F is 0, and only the damping is left."""
    policy_of = lambda x: Gaussian(jnp.full((7, 1), 0.0 * x), jnp.zeros((7, 1)))
    new = bnpo.natural_step(jnp.negative, policy_of, 0.0, -1.0)
    assert_allclose(new, math.sqrt(2.0 * 1e-3 / 1e-3), rtol=1e-4)


def test_natural_step_takes_a_small_gain():
    """The full step gains a twentieth of what its gradient predicts."""
    policy_of = lambda mean: Gaussian(jnp.full((7, 1), mean), jnp.zeros((7, 1)))
    loss = lambda mean: (mean - math.sqrt(2e-3) / 1.9) ** 2
    new = bnpo.natural_step(loss, policy_of, 0.0, jax.grad(loss)(0.0), 1e-3, 1e-9)
    assert_allclose(new, math.sqrt(2e-3), rtol=1e-3)


def test_natural_step_with_twice_the_kl_is_halved():
    policy_of = lambda x: Gaussian(jnp.full((7, 1), x + 207.0 * x**3), jnp.zeros((7, 1)))
    new = bnpo.natural_step(jnp.negative, policy_of, 0.0, -1.0, 1e-3, 1e-9)
    assert_allclose(new, math.sqrt(2e-3) / 2, rtol=1e-3)


@pytest.mark.parametrize(("halvings", "share"), [(9, 0.5**9), (10, 0.0)])
def test_natural_step_is_halved_nine_times(halvings, share):
    """They lead into a narrow valley; where ten would, nothing moves."""
    policy_of = lambda mean: Gaussian(jnp.full((7, 1), mean), jnp.zeros((7, 1)))
    full = math.sqrt(2e-3)
    loss = lambda mean: (mean - 0.75 * full / 2**halvings) ** 2
    new = bnpo.natural_step(loss, policy_of, 0.0, jax.grad(loss)(0.0), 1e-3, 1e-9)
    assert_allclose(new, share * full, rtol=1e-3, atol=1e-8)
