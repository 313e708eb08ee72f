"""REPPO for discrete actions: what differs from the continuous file, and that the rest does not."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from algos import common, reppo, reppo_discrete
from algos.reppo_discrete import Batch, Prediction, critic_loss, kl_divergence
from algos.reppo_discrete import policy_loss as loss_of
from envs import gymnax

A, B, H, BINS = 3, 4, 5, 11
LOGITS = jnp.array([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
OTHER = jnp.array([[0.5, 0.0, 0.0], [0.0, 1.0, 2.0], [1.0, -1.0, 0.0]])
VALUE = jnp.array([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0], [2.0, 2.0, 5.0]])


# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_reppo_discrete")

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def config_of(**changes):
    shared = {"reward_scale": 1.0, "anneal_lr": False}
    return tiny.config_of("reppo_discrete", **(shared | changes))


def run_update(**changes):
    """State before and after an update of one gradient step, and its metrics."""
    one = {"num_epochs": 1, "num_minibatches": 1, "reward_scale": 1.0, "anneal_lr": False}
    return tiny.run_update("reppo_discrete", **(one | changes))


# --- the same as for continuous actions ---


def test_targets_and_codes_are_those_of_the_continuous_file():
    rng = np.random.default_rng(0)
    reward, bonus, value = rng.normal(size=(3, 9, 4)).astype(np.float32)
    done = rng.random((9, 4)) < 0.5
    terminated = done & (rng.random((9, 4)) < 0.5)
    args = reward, bonus, value, terminated, done & ~terminated
    ones = np.ones_like(reward)
    close(
        reppo_discrete.soft_td_lambda(*args, 0.9, 0.7),
        reppo.soft_td_lambda(*args, ones, 0.9, 0.7, "aligned"),
    )
    support = -2.0, 12.0, 29
    codes = (module.hl_gauss(value, *support) for module in (reppo_discrete, reppo))
    np.testing.assert_array_equal(*codes)
    duals = 0.2, 0.5, 0.3, 0.05
    close(reppo_discrete.dual_losses(*duals), reppo.dual_losses(*duals))


# --- exact expectations ---


def test_entropy_of_a_uniform_policy():
    close(common.Categorical(jnp.full((2, A), 7.0)).entropy(), math.log(A))


def test_limits_of_the_gate():
    policy, kl = common.Categorical(LOGITS), jnp.array([0.05, 0.1, 0.3])
    open_, closed = (loss_of(policy, VALUE, kl, 0.2, 0.5, bound) for bound in (jnp.inf, -jnp.inf))
    assert not open_[1].any()
    close(closed[0], 0.5 * kl)  # no Q in it


def test_kl_by_hand():
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (LOGITS, OTHER))
    p_policy, q_policy = common.Categorical(LOGITS), common.Categorical(OTHER)
    close(kl_divergence(p_policy, q_policy), (p * np.log(p / q)).sum(1))
    close(kl_divergence(p_policy, common.Categorical(LOGITS + 3.0)), 0.0, atol=1e-6)


def test_loss_of_the_policy_by_hand():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    climb = (p * (0.2 * np.log(p) - VALUE)).sum(1)
    kl = jnp.array([0.05, 0.1, 0.3])
    loss, gated = loss_of(common.Categorical(LOGITS), VALUE, kl, 0.2, 0.5, 0.1)
    assert gated.tolist() == [False, True, True]  # the bound itself counts as reached
    close(loss, [climb[0], 0.05, 0.15])
    loss, gated = loss_of(common.Categorical(LOGITS), VALUE, kl * jnp.nan, 0.2, 0.5, 0.1)
    assert gated.all()


def test_unconstrained_policy_becomes_the_softmax_of_its_values():
    """The minimiser of E[alpha log pi - Q] is softmax(Q / alpha)."""
    alpha = 0.8

    def loss(logits):
        return loss_of(common.Categorical(logits), VALUE, jnp.zeros(3), alpha, 0.0, 0.1)[0].sum()

    close(jax.grad(loss)(VALUE / alpha), 0.0, atol=1e-6)
    step = lambda logits, _: (logits - jax.grad(loss)(logits), None)
    logits = jax.lax.scan(step, jnp.zeros((3, A)), length=2000)[0]
    close(jax.nn.softmax(logits), jax.nn.softmax(VALUE / alpha), atol=1e-3)


def test_multipliers_have_no_gradient_from_the_policy_loss():
    def loss(duals):
        kl = jnp.array([0.05, 0.2, 0.3])
        return loss_of(common.Categorical(LOGITS), VALUE, kl, *duals, 0.1)[0].sum()

    close(jax.grad(loss)(jnp.array([0.2, 0.5])), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_temperature_follows_the_entropy(factor):
    """A new policy is nearly uniform: H is close to log 2, above half of it, below twice of it."""
    before, after, metrics = run_update(target_entropy_mult=factor)
    close(metrics["losses/entropy"], math.log(2), rtol=0.3)
    old, new = (x.params["actor"]["duals"]["temperature"] for x in (before, after))
    assert (new > old) == (factor == 2.0)
    close(metrics["losses/temperature"], np.exp(new))


# --- critic ---


def batch_of(**changes):
    flag = jnp.zeros(B, bool)
    batch = Batch(
        obs=jnp.zeros((B, 2)),
        action=jnp.array([0, 1, 2, 1]),
        policy=common.Categorical(jnp.zeros((B, A))),
        reward=jnp.arange(4.0),
        terminated=flag,
        valid=~flag,
        target=jnp.array([1.0, 2.0, 3.0, 4.0]),
        next_features=jax.random.normal(jax.random.key(1), (B, H)),
    )
    return batch._replace(**changes)


def prediction():
    keys = jax.random.split(jax.random.key(2))
    logits = jax.random.normal(keys[0], (B, A, BINS))
    value = jax.nn.softmax(logits) @ jnp.linspace(0.0, 10.0, BINS)
    return Prediction(value, logits, jnp.zeros((B, H)), jax.random.normal(keys[1], (B, 1 + H)))


def test_critic_loss_by_hand():
    batch, p = batch_of(), prediction()
    code = np.asarray(reppo.hl_gauss(batch.target, 0.0, 10.0, BINS))
    taken = np.asarray(jax.nn.log_softmax(p.logits))[np.arange(B), batch.action]
    cross = -(code * taken).sum(-1)
    wanted = np.concatenate([np.asarray(batch.reward)[:, None], batch.next_features], 1)
    auxiliary = ((np.asarray(p.predicted) - wanted) ** 2).sum(1) / (H + 1)
    close(critic_loss(p, batch, 0.0, 10.0, 2.0)[0], (cross + 2 * auxiliary).mean())
    aux = critic_loss(p, batch, 0.0, 10.0, 2.0)[1]
    error = np.asarray(p.value)[np.arange(B), batch.action] - batch.target
    close(aux["losses/value_error"], (error**2).mean())


def test_only_the_histogram_of_the_action_taken_is_trained():
    batch = batch_of()
    grads = jax.grad(lambda p: critic_loss(p, batch, 0.0, 10.0, 1.0)[0])(prediction())
    touched = np.asarray(grads.logits).any(-1)
    np.testing.assert_array_equal(touched, np.eye(A, dtype=bool)[batch.action])


def test_masks():
    loss = lambda batch: critic_loss(prediction(), batch, 0.0, 10.0, 1.0)[0]
    first = jnp.arange(B) == 0
    broken = batch_of(valid=~first)
    close(loss(broken._replace(target=broken.target.at[0].add(5.0))), loss(broken))
    ended = batch_of(terminated=first)
    other = ended._replace(next_features=ended.next_features.at[0].add(9.0))
    close(loss(other), loss(ended))
    other = ended._replace(next_features=ended.next_features.at[1].add(9.0))
    assert loss(other) > loss(ended) + 1


def test_initial_values_are_zero_and_the_prediction_is_told_the_action():
    config = dataclasses.replace(reppo_discrete.Config(), vmax=50.0)
    critic = reppo_discrete.Critic(config, A)
    obs = jax.random.normal(jax.random.key(0), (100, 7))
    params = critic.init(jax.random.key(1), obs[:1], jnp.zeros(1, jnp.int32))
    assert jnp.abs(critic.apply(params, obs).value).max() < 1e-4 * 50
    assert critic.apply(params, obs).predicted is None
    left, right = (critic.apply(params, obs, jnp.full(100, a)).predicted for a in (0, 1))
    assert (left != right).any(1).all()


# --- an update ---


def test_what_the_targets_are_made_of(monkeypatch):
    """Expectations over actions at the true successors, also where a reset follows."""
    seen, real = {}, reppo_discrete.soft_td_lambda

    def record(*args):
        names = "reward", "bonus", "next_value", "terminated", "truncated"
        seen.update(zip(names, args, strict=False))
        return real(*args)

    monkeypatch.setattr(reppo_discrete, "soft_td_lambda", record)
    config = config_of(env="tiny:counter_discrete", normalize_obs=False, temperature_init=2.0)
    algo = reppo_discrete.build(config)

    def run(key):
        state = algo.init(key)
        # Without the code of 0 the values of the critic differ.
        critic = state.params["critic"]["params"]
        critic = {"params": critic | {"zero_code": 0 * critic["zero_code"]}}
        state = state._replace(params=state.params | {"critic": critic})
        return state, algo.update(state)[0], dict(seen)

    state, _, seen = jax.jit(run)(jax.random.key(0))
    truncated = np.asarray(seen["truncated"])
    assert truncated.any(0).all()
    obs = tiny.successors(truncated)[0]
    policy = reppo_discrete.Actor(config, 2).apply(state.params["actor"]["net"], obs)
    p = np.asarray(jax.nn.softmax(policy.logits))
    q = np.asarray(reppo_discrete.Critic(config, 2).apply(state.params["critic"], obs).value)
    assert np.abs(q[..., 0] - q[..., 1]).min() > 1e-3
    close(seen["next_value"], (p * q).sum(-1), rtol=1e-4)
    close(seen["bonus"], -config.gamma * 2.0 * (p * np.log(p)).sum(-1), rtol=1e-4)


@pytest.mark.parametrize(("bound", "rises"), [(-1.0, True), (1.0, False)])
def test_kl_coefficient_follows_the_bound(bound, rises):
    before, after, _ = run_update(kl_bound=bound)
    old, new = (x.params["actor"]["duals"]["kl_coef"] for x in (before, after))
    assert (new > old) == rises


def test_the_kl_is_measured_from_the_policy_that_acted():
    metrics = run_update(num_minibatches=2, learning_rate=0.3)[2]
    assert metrics["losses/kl"] > 0.01
    assert metrics["losses/gated_fraction"] > 0


def broken():
    """Cartpole whose reward is never a number."""
    raw = gymnax.make("CartPole-v1")

    def step(key, state, action):
        obs, state, _, terminated, info = raw.step(key, state, action)
        return obs, state, jnp.nan, terminated, info

    return raw._replace(name="broken", step=step)


@pytest.mark.slow
def test_broken_physics_teaches_nothing():
    before, after, metrics = run_update(env="test_reppo_discrete:broken")
    assert metrics["health/env_nan"] == 32
    tiny.assert_close(after.params, before.params, atol=1e-6)  # a step is 3e-4


def test_the_actor_climbs_the_critic_that_was_just_updated():
    still, moving = (run_update(learning_rate=rate)[2] for rate in (0.0, 0.3))
    close(moving["losses/q_value"], still["losses/q_value"])
    assert abs(moving["losses/policy_loss"] - still["losses/policy_loss"]) > 1e-3


def test_a_gradient_that_is_not_finite_is_skipped():
    before, after, metrics = run_update(reward_scale=math.inf)
    tiny.assert_same(before.params["critic"], after.params["critic"])
    assert metrics["health/skipped_steps"] == 1
    assert not metrics["health/finite"]


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 3}, r"num_minibatches=3 .* 32 transitions .*num_envs=4, num_steps=8"),
        ({"env": "pendulum"}, r"Pendulum-v1 has continuous actions: .*algos/reppo.py"),
        ({"vmin": 5.0, "vmax": 5.0}, r"vmin=5 to vmax=5"),
    ],
)
def test_bad_input_is_one_error(changes, message):
    for function in (reppo_discrete.build, reppo_discrete.make_train):
        with pytest.raises(ValueError, match=message):
            function(config_of(**changes))


@pytest.mark.filterwarnings("error::UserWarning")
def test_presets_have_room_for_their_rewards():
    for preset in reppo_discrete.PRESETS.values():
        dataclasses.replace(reppo_discrete.Config(), **preset).validate()


def test_a_support_that_is_too_small_is_a_warning():
    numbers = r"values can be 0 to 100 .*vmin=-2 to vmax=12"
    with pytest.warns(UserWarning, match=numbers):
        config_of(reward_range=(0.0, 1.0), gamma=0.99).validate()
