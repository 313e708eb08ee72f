"""Layers of the networks by hand, and that a clone of bc.py is the policy that brac.py plays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import assert_allclose

from algos import bc, bcq, brac, ppo, reppo, reppo_discrete, sac

X = np.linspace(-2.0, 2.0, 15, dtype=np.float32).reshape(5, 3)


def params_of(network, *inputs):
    return network.init(jax.random.key(0), *inputs)


@pytest.mark.parametrize("module", [sac, bcq, brac])
def test_hidden_layers_are_relu(module):
    network = module.MLP((4,), 1)
    params = params_of(network, X)
    hidden, last = (params["params"][f"Dense_{i}"]["kernel"] for i in (0, 1))
    assert_allclose(network.apply(params, X), jnp.maximum(X @ hidden, 0.0) @ last)


def test_a_clone_is_the_policy_of_bc():
    """The hidden layer is ReLU in both files, so the parameters of one serve the other."""
    config = tiny.config_of("brac", hidden=(4,))
    actor = bc.Actor(tiny.config_of("bc", hidden=(4,)), 2)
    params = params_of(actor, X)
    ours, clone = actor.apply(params, X), brac.Actor(config, 2).apply(params, X)
    hidden, last = (params["params"][f"Dense_{i}"]["kernel"] for i in (0, 1))
    assert_allclose(ours.mean, (jnp.maximum(X @ hidden, 0.0) @ last)[:, :2])
    tiny.assert_close((clone.mean, clone.std), (ours.mean, ours.std))


@pytest.mark.parametrize("name", ["rms", "none", "discrete"])
def test_a_block_is_linear_normalised_and_swish(name):
    config = dataclasses.replace(reppo.Config(), norm="none" if name == "none" else "rms")
    block = reppo_discrete.Block(4) if name == "discrete" else reppo.Block(config, 4)
    params = params_of(block, X)
    y = X @ params["params"]["Dense_0"]["kernel"]
    if name != "none":
        y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    assert_allclose(block.apply(params, X), y / (1.0 + jnp.exp(-y)))


def test_the_gain_of_the_policy_is_not_the_critics():
    config = dataclasses.replace(ppo.Config(), hidden=(64,), policy_gain=0.1)
    params = params_of(ppo.Critic(config, (64,)), jnp.ones((1, 64)))
    last = params["params"]["Dense_0"]["kernel"]
    assert_allclose(last.T @ last, [[1.0]])
