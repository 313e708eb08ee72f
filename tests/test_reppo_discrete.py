"""REPPO for discrete actions: what differs from the continuous file, and that the rest does not."""

import dataclasses
import math
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import envs
from algos import common, reppo, reppo_discrete
from algos.reppo_discrete import Batch, Prediction, Transition, kl_divergence, policy_loss
from envs import gymnax

A, B, H, BINS = 3, 4, 5, 11
LOGITS = jnp.array([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
OTHER = jnp.array([[0.5, 0.0, 0.0], [0.0, 1.0, 2.0], [1.0, -1.0, 0.0]])
VALUE = jnp.array([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0], [2.0, 2.0, 5.0]])


# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_reppo_discrete")

assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


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
    ours, theirs = (x.soft_td_lambda(*args, 0.9, 0.7) for x in (reppo_discrete, reppo))
    np.testing.assert_array_equal(ours, theirs)
    support = -2.0, 12.0, 29
    codes = (module.hl_gauss(value, *support) for module in (reppo_discrete, reppo))
    np.testing.assert_array_equal(*codes)
    duals = 0.2, 0.5, 0.3, 0.05
    assert reppo_discrete.dual_loss(*duals) == reppo.dual_loss(*duals)


# --- exact expectations ---


def test_entropy_of_a_uniform_policy():
    assert_close(common.Categorical(jnp.full((2, A), 7.0)).entropy(), math.log(A))


def test_kl_by_hand():
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (LOGITS, OTHER))
    p_policy, q_policy = common.Categorical(LOGITS), common.Categorical(OTHER)
    assert_close(kl_divergence(p_policy, q_policy), (p * np.log(p / q)).sum(1))
    assert_close(kl_divergence(p_policy, common.Categorical(LOGITS + 3.0)), 0.0, atol=1e-6)


def test_loss_of_the_policy_by_hand():
    sac_loss, kl = jnp.array([-0.9, -2.1, -2.8]), jnp.array([0.05, 0.1, 0.3])
    loss, gated = policy_loss(sac_loss, kl, 0.5, 0.1)
    assert gated.tolist() == [False, True, True]  # the bound itself counts as reached
    assert_close(loss, [-0.9, 0.05, 0.15])
    assert policy_loss(sac_loss, kl * jnp.nan, 0.5, 0.1)[1].all()
    assert_close(policy_loss(sac_loss, kl, 0.5, jnp.inf)[0], sac_loss)
    assert_close(policy_loss(sac_loss, kl, 0.5, 0.0)[0], 0.5 * kl)
    force = jax.grad(lambda kl_coef: policy_loss(sac_loss, kl, kl_coef, 0.1)[0].sum())(0.5)
    assert_close(force, 0.0)


@pytest.mark.parametrize(("factor", "sign"), [(0.0, -1), (2.0, 1)])
def test_temperature_follows_the_entropy(factor, sign):
    """A new policy is nearly uniform: H is close to log 2, so above 0 and below 2 log 2."""
    before, after, metrics = run_update(target_entropy_mult=factor)
    assert_close(metrics["losses/entropy"], math.log(2), rtol=0.3)
    old, new = (x.params["actor"]["duals"]["temperature"] for x in (before, after))
    assert np.sign(new - old) == sign
    assert_close(metrics["losses/temperature"], np.exp(new))


# --- critic ---


def batch_of(**changes):
    """Transitions with rewards 0, 1, 2, 3 and targets 1, 2, 3, 4."""
    false = jnp.zeros(B, bool)
    step = Transition(
        obs=jnp.zeros((B, 2)),
        action=jnp.array([0, 1, 2, 1]),
        policy=common.Categorical(jnp.zeros((B, A))),
        reward=jnp.arange(4.0),
        terminated=false,
        truncated=false,
        valid=~false,
        next_obs=jnp.zeros((B, 2)),
    )
    features = jax.random.normal(jax.random.key(1), (B, H))
    return Batch(step._replace(**changes), jnp.array([1.0, 2.0, 3.0, 4.0]), features)


def test_critic_loss_by_hand():
    logits = jax.random.normal(jax.random.key(2), (B, BINS))
    target = batch_of().target
    code = np.asarray(reppo.hl_gauss(target, 0.0, 10.0, BINS))
    cross = -(code * np.asarray(jax.nn.log_softmax(logits))).sum(-1)
    prediction = Prediction(jnp.zeros(B), logits, jnp.zeros((B, H)), None)
    assert_close(reppo_discrete.critic_loss(prediction, target, 0.0, 10.0), cross)


def test_prediction_loss_by_hand():
    predicted = jax.random.normal(jax.random.key(3), (B, 1 + H))
    first = jnp.arange(B) == 0
    batch = batch_of(terminated=first)
    wanted = np.concatenate([np.asarray(batch.step.reward)[:, None], batch.next_features], 1)
    squares = (np.asarray(predicted) - wanted) ** 2
    expected = np.where(first, 0.0, squares.sum(1) / (H + 1))
    assert_close(reppo_discrete.aux_loss(predicted, batch), expected)


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


# `counter` pays 1 a step, and its episodes are cut after 4 steps; here all of them start at 0.
COUNTER = {"env": "tiny:counter_discrete", "normalize_obs": False, "td_lambda": 0.0, "gamma": 0.5}
SUCCESSOR = np.array([[1, 3], [2, 2], [3, 1], [4, 0]] * 2, np.float32)


def counter_update(change=lambda state: state, **changes):
    """First state of `counter` whose values differ, state and metrics after one gradient step."""
    config = config_of(**COUNTER | {"num_epochs": 1, "num_minibatches": 1} | changes)
    algo = reppo_discrete.build(config, envs.make(config.env, 4, stagger=False))

    def run(key):
        state = algo.init(key)
        # Without the histogram of 0 the values of the critic differ.
        critic = state.params["critic"]["params"]
        critic = {"params": critic | {"zero_code": 0 * critic["zero_code"]}}
        state = change(state._replace(params=state.params | {"critic": critic}))
        return state, *algo.update(state)

    return config, *jax.jit(run)(jax.random.key(0))


@pytest.mark.parametrize("temperature", [1e-20, 2.0])
def test_what_the_targets_are_made_of(temperature):
    """1 + gamma (E[Q] + alpha H) at the true successor, also where a reset follows."""
    config, state, _, metrics = counter_update(temperature_init=temperature)
    policy = reppo_discrete.Actor(config, 2).apply(state.params["actor"]["net"], SUCCESSOR)
    p = np.asarray(jax.nn.softmax(policy.logits))
    q = np.asarray(reppo_discrete.Critic(config, 2).apply(state.params["critic"], SUCCESSOR).value)
    assert np.abs(q[:, 0] - q[:, 1]).min() > 1e-3
    target = 1 + 0.5 * (p * (q - temperature * np.log(p))).sum(-1)
    variance = metrics["losses/value_error"] / (1 - metrics["losses/explained_variance"])
    assert_close(variance, target.var(), rtol=1e-3)


@pytest.mark.parametrize("reward_scale", [1.0, -1.0])
def test_share_of_targets_outside_the_support(reward_scale):
    """+-1 + gamma E[Q] is beyond either end of [-1, 1] where E[Q] has the sign of the reward."""
    changes = {"temperature_init": 1e-20, "vmin": -1.0, "vmax": 1.0, "reward_scale": reward_scale}
    config, state, _, metrics = counter_update(**changes)
    policy = reppo_discrete.Actor(config, 2).apply(state.params["actor"]["net"], SUCCESSOR)
    q = reppo_discrete.Critic(config, 2).apply(state.params["critic"], SUCCESSOR).value
    outside = (jax.nn.softmax(policy.logits) * q * reward_scale).sum(-1) > 0
    assert 0 < outside.mean() < 1
    assert_close(metrics["health/target_clip_fraction"], outside.mean())


def only_left(state):
    """The policy takes action 0 with a probability of 1 - e^-30."""
    head = state.params["actor"]["net"]["params"]["Dense_0"]
    head = {"kernel": 0 * head["kernel"], "bias": jnp.array([30.0, 0.0])}
    net = {"params": state.params["actor"]["net"]["params"] | {"Dense_0": head}}
    return state._replace(params=state.params | {"actor": state.params["actor"] | {"net": net}})


def test_only_the_histogram_of_the_action_taken_is_trained():
    """The last layer of Q has the bins of action 0, then those of action 1."""
    changes = {"temperature_init": 1e-20, "learning_rate": 0.01}
    config, before, after, metrics = counter_update(only_left, **changes)
    critic = reppo_discrete.Critic(config, 2)
    predict = lambda obs: critic.apply(before.params["critic"], obs).value[:, 0]
    here = SUCCESSOR + np.array([-1, 1], np.float32)
    error = ((predict(here) - 1 - 0.5 * predict(SUCCESSOR)) ** 2).mean()
    assert_close(metrics["losses/value_error"], error, rtol=1e-4)
    old, new = (x.params["critic"]["params"]["Dense_1"]["bias"] for x in (before, after))
    moved = (old != new).reshape(2, config.num_bins)
    assert moved[0].any()
    assert not moved[1].any()


def test_unconstrained_policy_becomes_the_softmax_of_its_values():
    """The minimiser of E[alpha log pi - Q] is softmax(Q / alpha): there the policy stays."""
    alpha = 0.8

    def at_the_optimum(state):
        """Q and the policy do not depend on the observation."""
        critic = state.params["critic"]["params"]
        logits = jnp.array([[0.0] * 28 + [1.0], [1.0] + [0.0] * 28])
        head = {"kernel": 0 * critic["Dense_1"]["kernel"], "bias": logits.reshape(-1)}
        q = (jax.nn.softmax(logits) * jnp.linspace(-2.0, 12.0, 29)).sum(-1)
        state = only_left(state)
        actor = state.params["actor"]["net"]["params"]
        actor = actor | {"Dense_0": actor["Dense_0"] | {"bias": q / alpha}}
        params = {
            "critic": {"params": critic | {"Dense_1": head}},
            "actor": state.params["actor"] | {"net": {"params": actor}},
        }
        return state._replace(params=params)

    still = {"temperature_init": alpha, "kl_coef_init": 1e-20, "learning_rate": 0.0}
    metrics = counter_update(at_the_optimum, **still)[3]
    # what is left is the gradient of the temperature, alpha (H - target)
    assert_close(metrics["losses/actor_grad_norm"], alpha * metrics["losses/entropy"], rtol=1e-4)


def test_a_gated_state_does_not_climb():
    """Every KL is above a bound of -1, so without weight on the KL nothing moves the policy."""
    alone = {"temperature_init": 1e-20, "kl_coef_init": 1e-20, "kl_bound": -1.0}
    metrics = run_update(**alone)[2]
    assert metrics["losses/gated_fraction"] == 1
    assert metrics["losses/actor_grad_norm"] < 1e-6


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

    return raw._replace(step=step)


def test_broken_physics_teaches_nothing():
    before, after, metrics = run_update(env="test_reppo_discrete:broken")
    assert metrics["health/env_nan"] == 32
    tiny.assert_close(after.params, before.params, atol=1e-6)  # a step is 3e-4


def test_the_actor_climbs_the_critic_that_was_just_updated():
    still, moving = (run_update(learning_rate=rate)[2] for rate in (0.0, 0.3))
    assert_close(moving["losses/q_data"], still["losses/q_data"])
    assert abs(moving["losses/policy_loss"] - still["losses/policy_loss"]) > 1e-3


def test_a_gradient_that_is_not_finite_is_skipped():
    before, after, metrics = run_update(reward_scale=math.inf)
    tiny.assert_close(before.params["critic"], after.params["critic"], atol=1e-6)  # a step is 3e-4
    assert metrics["health/skipped_steps"] == 1
    assert not metrics["health/finite"]


def test_what_the_critic_learns_from_standardised_observations():
    """By statistics of all that was shown until then; a time limit ends the trace. Each epoch
    has every row once.
    """

    def change(state):
        """No norm of a layer hides a wrong scale, because there are biases."""
        critic = jax.tree.map(lambda x: x + 0.1, state.params["critic"])
        return only_left(state._replace(params=state.params | {"critic": critic}))

    config, state, _, metrics = counter_update(
        change, normalize_obs=True, td_lambda=0.8, temperature_init=1e-20, aux_loss_mult=2.0,
        learning_rate=0.0, num_epochs=2, num_minibatches=4,
    )  # fmt: skip
    standard = lambda seen, obs: (obs - seen.mean) / np.sqrt(seen.var + 1e-2)
    show = lambda seen, t: seen.add(np.tile(HERE[t % 8], (4, 1)))
    seen, obs, next_obs = show(common.Stats.empty((2,)), 0), [], []
    for t in range(8):
        obs.append(standard(seen, HERE[t]))
        seen = show(seen, t + 1)
        next_obs.append(standard(seen, SUCCESSOR[t]))
    critic, left = reppo_discrete.Critic(config, 2), np.zeros(8, int)
    predict = lambda obs: critic.apply(state.params["critic"], np.array(obs), left)
    here, after = predict(obs), predict(next_obs)
    value, next_value = here.value[:, 0], np.asarray(after.value[:, 0])
    target, trace = np.zeros(8), next_value[-1]
    for t in reversed(range(8)):
        mixed = next_value[t] if t % 4 == 3 else 0.8 * trace + 0.2 * next_value[t]
        trace = target[t] = 1 + 0.5 * mixed
    assert_close(metrics["losses/value_error"], ((value - target) ** 2).mean(), rtol=1e-4)
    wanted = np.concatenate([np.ones((8, 1)), after.features], 1)
    aux = ((here.predicted - wanted) ** 2).mean()
    assert_close(metrics["losses/aux_loss"], aux, rtol=1e-4)
    code = reppo_discrete.hl_gauss(target, config.vmin, config.vmax, config.num_bins)
    cross = -(code * jax.nn.log_softmax(here.logits[:, 0])).sum(-1).mean()
    assert_close(metrics["losses/qf_loss"], cross + 2 * aux, rtol=1e-4)


def test_length_of_a_step():
    """Adam's first step is the learning rate, here in the middle of its schedule."""
    config = config_of(
        learning_rate=0.01, anneal_lr=True, dual_lr_mult=3.0, num_epochs=1, num_minibatches=1,
        max_grad_norm=1e-3, reward_scale=1.0,
    )  # fmt: skip
    algo = tiny.build("reppo_discrete", config)
    state = jax.jit(algo.init)(jax.random.key(0))._replace(update=jnp.int32(3))
    after, metrics = jax.jit(algo.update)(state)
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), state.params, after.params)
    assert config.num_updates == 6
    for name in ("temperature", "kl_coef"):
        assert_close(moved["actor"]["duals"][name], 3 * 0.005, rtol=1e-3)
    for part in (moved["actor"]["net"], moved["critic"]):
        assert_close(max(jax.tree.leaves(part)), 0.005, rtol=1e-2)
    for name in ("actor", "critic"):  # the mean gradient is a tenth of the first one
        assert metrics[f"losses/{name}_grad_norm"] > 1e-3
        assert_close(optax.global_norm(after.opt_state[name][1].mu), 1e-4, rtol=1e-3)


def test_target_of_the_entropy():
    """A share of that of a uniform policy: the temperature falls above it, and rises below."""
    share = float(run_update()[2]["losses/entropy"]) / math.log(2)
    for factor, sign in ((0.95, -1), (1.05, 1)):
        before, after, _ = run_update(target_entropy_mult=factor * share)
        old, new = (x.params["actor"]["duals"]["temperature"] for x in (before, after))
        assert np.sign(new - old) == sign


def test_the_kl_is_that_of_the_new_policy_from_the_old_one():
    """Two epochs of one minibatch: the first has no KL, the second what the first step made."""
    _, before, after, _ = counter_update(learning_rate=0.3)
    config, *_, metrics = counter_update(learning_rate=0.3, num_epochs=2)
    actor = reppo_discrete.Actor(config, 2)
    old, new = (
        jax.nn.log_softmax(actor.apply(x.params["actor"]["net"], HERE).logits)
        for x in (before, after)
    )
    kl, other = ((np.exp(p) * (p - q)).sum(-1).mean() for p, q in ((old, new), (new, old)))
    assert abs(kl / other - 1) > 0.05
    assert_close(metrics["losses/kl"], kl / 2, rtol=1e-3)


def test_what_acts_is_the_policy_at_standardised_observations():
    config = config_of()
    algo, key = tiny.build("reppo_discrete", config), jax.random.key(0)
    state = algo.init(jax.random.key(1))
    seen = common.Stats(jnp.full(4, 3.0), jnp.full(4, 0.25), jnp.float32(64))
    obs = 3.0 + 0.5 * jax.random.normal(jax.random.key(2), (200, 4))
    inputs = (obs - 3.0) / np.sqrt(0.26)
    logits = reppo_discrete.Actor(config, 2).apply(state.params["actor"]["net"], inputs).logits
    policy = algo.policy_of(state._replace(obs_stats=seen))
    np.testing.assert_array_equal(algo.act(policy, obs, key, True), logits.argmax(-1))
    drawn = (logits + jax.random.gumbel(key, logits.shape)).argmax(-1)
    np.testing.assert_array_equal(algo.act(policy, obs, key, False), drawn)


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 3}, r"num_minibatches=3 .* 32 transitions .*num_envs=4, num_steps=8"),
        ({"env": "pendulum"}, r"Pendulum-v1 has continuous actions: .*algos/reppo.py"),
        ({"vmin": 5.0, "vmax": 5.0}, r"vmin=5: .*vmax=5"),
        ({"reward_range": (5.0, -5.0)}, r"reward_range=\(5.0, -5.0\): the lower end comes first"),
    ],
)
def test_bad_input_is_one_error(changes, message):
    with pytest.raises(ValueError, match=message):
        reppo_discrete.make_train(config_of(**changes))


def test_presets_have_room_for_their_rewards(recwarn):
    for preset in reppo_discrete.PRESETS.values():
        dataclasses.replace(reppo_discrete.Config(), **preset).validate()
    assert not recwarn.list


def test_a_support_that_is_too_small_is_a_warning():
    numbers = r"values can be 0 to 100 .*vmin=-2, vmax=12"
    with pytest.warns(UserWarning, match=numbers) as caught:
        config_of(reward_range=(0.0, 1.0), gamma=0.99).validate()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_of(reward_range=(0.0, 0.0), vmin=1.0).validate()  # not known


HERE = SUCCESSOR + np.array([-1, 1], np.float32)
