"""Soft actor-critic: targets, losses, networks, replay, the order of a gradient step."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import assert_allclose

from algos import common, sac
from algos.launch import program

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_sac")


def config_of(**changes):
    return tiny.config_of("sac", **changes)


# --- targets and losses ---


@pytest.mark.parametrize(
    ("temperature", "terminated", "expected"),
    [(0.0, False, 10.9), (0.05, False, 10.9495), (0.0, True, 1.0), (0.05, True, 1.0)],
)
def test_target_by_hand(temperature, terminated, expected):
    value, log_prob = jnp.array([[10.0], [12.0]]), jnp.array([-1.0])
    value = jnp.where(terminated, jnp.nan, value)  # nothing of it enters after the end
    ended = jnp.array([terminated])
    target = sac.soft_target(jnp.ones(1), ended, value, log_prob, temperature, 0.99)
    assert_allclose(target, [expected])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_losses_are_those_of_a_double_loop(seed, temperature, gamma):
    rng = np.random.default_rng(seed)
    reward, log_prob = rng.normal(size=(2, 5))
    terminated, valid = rng.random(5) < 0.3, rng.random(5) < 0.7
    value, next_value = rng.normal(size=(2, 2, 5))
    target, q_loss, pi_loss, alpha_loss = np.zeros(5), 0.0, 0.0, 0.0
    for b in range(5):
        soft_value = min(next_value[0, b], next_value[1, b]) - temperature * log_prob[b]
        target[b] = reward[b] + (0.0 if terminated[b] else gamma * soft_value)
        if not valid[b]:  # weighs nothing, and the rest no more than before
            continue
        alpha_loss += temperature * (-log_prob[b] + 2.0) / 5
        for i in range(2):
            q_loss += (value[i, b] - target[b]) ** 2 / 5
        pi_loss += (temperature * log_prob[b] - min(value[0, b], value[1, b])) / 5
    actual = sac.soft_target(reward, terminated, next_value, log_prob, temperature, gamma)
    assert_allclose(actual, target)
    assert_allclose(sac.critic_loss(value, target, valid), q_loss)
    assert_allclose(sac.policy_loss(value, log_prob, temperature, valid), pi_loss)
    assert_allclose(sac.temperature_loss(temperature, log_prob, -2.0, valid), alpha_loss)


def test_no_gradient_passes_through_the_target():
    def loss(reward, next_value, log_prob, temperature):
        ended = jnp.zeros(3, bool)
        target = sac.soft_target(reward, ended, next_value, log_prob, temperature, 0.9)
        return sac.critic_loss(jnp.ones((2, 3)), target, True)

    grads = jax.grad(loss, (0, 1, 2, 3))(jnp.ones(3), jnp.ones((2, 3)), jnp.ones(3), 0.5)
    assert all((x == 0).all() for x in jax.tree.leaves(grads))


def test_gradient_of_the_policy_loss():
    """Through the smaller value and the log-probability, and not into the temperature."""
    value, log_prob = jnp.array([[1.0, 5.0], [2.0, 3.0]]), jnp.array([0.3, -0.2])
    grads = jax.grad(sac.policy_loss, (0, 1, 2))(value, log_prob, 0.4, True)
    assert_allclose(grads[0], [[-0.5, 0.0], [0.0, -0.5]])
    assert_allclose(grads[1], [0.2, 0.2])
    assert grads[2] == 0.0


@pytest.mark.parametrize(("entropy", "sign"), [(-1.5, -1), (-2.5, 1)])
def test_temperature_falls_while_entropy_is_above_its_target(entropy, sign):
    loss = lambda log, log_prob: sac.temperature_loss(jnp.exp(log), log_prob, -2.0, True)
    grads = jax.grad(loss, (0, 1))(jnp.log(0.3), jnp.full(4, -entropy))
    assert_allclose(grads[0], 0.3 * (entropy + 2.0))
    assert np.sign(-grads[0]) == sign  # the step of descent
    assert (grads[1] == 0).all()


# --- networks ---


def test_std_of_the_policy():
    config = config_of(hidden=())
    actor = sac.Actor(config, 1)
    params = actor.init(jax.random.key(0), jnp.zeros((1, 3)))
    layer = params["params"]["MLP_0"]["Dense_0"]
    for raw, std in ((0.0, 0.082085), (-20.0, 0.0067379), (20.0, 1.0)):
        layer["bias"] = jnp.array([0.7, raw])
        policy = actor.apply(params, jnp.zeros((2, 3)))
        assert_allclose(policy.std, np.full((2, 1), std), atol=1e-6)
        assert_allclose(policy.mean, np.full((2, 1), 0.7))


def test_density_of_the_action():
    """d = 1, mean 0, std 0.5: by hand, and its integral over (-1, 1)."""
    policy = common.TanhGaussian(jnp.zeros(1), jnp.full(1, 0.5))
    assert_allclose(policy.log_prob(jnp.arctanh(jnp.array([0.5]))), -0.541584)
    assert_allclose(policy.log_prob(jnp.zeros(1)), -0.225791)
    edges = jnp.linspace(-1.0, 1.0, 200_001)
    middle = 0.5 * (edges[1:] + edges[:-1])
    density = jnp.exp(policy.log_prob(jnp.arctanh(middle)[:, None]))
    assert_allclose((density * jnp.diff(edges)).sum(), 1.0, atol=1e-4)


def test_critics_are_two_of_their_own():
    config = config_of(critic_hidden=(40, 30))
    critic = sac.Critic(config)
    obs, action = jax.random.normal(jax.random.key(1), (5, 7)), jnp.full((5, 2), 0.3)
    params = critic.init(jax.random.key(0), obs, action)
    value = critic.apply(params, obs, action)
    assert value.shape == (2, 5)
    assert (abs(value[0] - value[1]) > 1e-3).any()
    assert (critic.apply(params, obs, -action) != value).all()
    for name, x in tiny.arrays(params).items():
        if "bias" in name:
            assert not x.any()
        else:  # Glorot: uniform, with a bound of the root of 6 over both sizes
            bound = math.sqrt(6 / sum(x.shape[1:]))
            assert 0.9 * bound < abs(x).max() <= bound
            assert stats.kstest(x.ravel() / bound, stats.uniform(-1, 2).cdf).pvalue > 1e-3


# --- updates ---


@cache
def functions_of(config):
    """Compiled init and update of a configuration; `update` takes a learning rate as well."""
    env = sac.make_env(config)

    def update(state, learning_rate):
        changed = dataclasses.replace(config, learning_rate=learning_rate)
        return sac.build(changed, env).update(state)

    return jax.jit(sac.build(config, env).init), jax.jit(update)


def states_of(config, num_updates, change=lambda state: state, learning_rate=1e-3):
    """States after 0 to `num_updates` updates from seed 0, and the metrics of each update."""
    init, update = functions_of(config)
    states, metrics = [change(init(jax.random.key(0)))], []
    for _ in range(num_updates):
        state, measured = update(states[-1], learning_rate)
        states.append(state)
        metrics.append(measured)
    return states, metrics


# 4 environments x 8 steps in an update, a ring of 4 rollouts, 4 gradient steps from the second on.
COUNTER = config_of(env="tiny:counter")


def test_replay_is_a_ring_of_rollouts():
    states, _ = states_of(COUNTER, 6)
    N, T = COUNTER.num_envs, COUNTER.num_steps

    def slot(update, i):
        part = lambda x: x[i * N * T : (i + 1) * N * T].reshape((T, N, *x.shape[1:]))
        return jax.tree.map(part, states[update].replay)

    rollouts = [slot(update + 1, update % 4) for update in range(6)]
    for i, update in enumerate((4, 5, 2, 3)):
        tiny.assert_same(slot(6, i), rollouts[update])
    assert not np.asarray(states[1].replay.obs[N * T :]).any()
    for update, rollout in enumerate(rollouts):
        np.testing.assert_array_equal(rollout.obs[0], states[update].obs)
        time = rollout.obs[..., 0]
        # The true successor of the last step is 4, and its time limit is no failure.
        np.testing.assert_array_equal(rollout.next_obs[..., 0], time + 1)
        assert ((time[1:] == time[:-1] + 1) | (time[1:] == 0)).all()
        assert (rollout.next_obs[..., 0] == 4).any()
        assert not rollout.terminated.any()
        assert (rollout.reward == 1).all()


def test_nothing_is_learned_while_actions_are_uniform():
    """One update of 32 steps: afterwards the policy acts, and 4 gradient steps are taken."""
    states, metrics = states_of(COUNTER, 2)
    assert [m["losses/count"] for m in metrics] == [0, 4]
    learned = lambda state: (state.params, state.target_params, state.opt_state)
    tiny.assert_same(learned(states[0]), learned(states[1]))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), *(s.params for s in states[1:]))
    assert all(jax.tree.leaves(moved))
    first, second = (np.asarray(states[2].replay.action[i : i + 32]) for i in (0, 32))
    assert stats.kstest(first.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    policy = sac.Actor(COUNTER, 2).apply(
        states[1].params["actor"],
        states[1].obs_stats.normalize(states[2].replay.obs[32:64]),
    )
    noise = (np.arctanh(second) - policy.mean) / policy.std
    assert abs(noise).max() < 4.5
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-3


def test_rows_that_are_not_written_yet_are_never_drawn():
    spoil = lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
    change = lambda state: state._replace(replay=jax.tree.map(spoil, state.replay))
    states, metrics = states_of(COUNTER, 4, change)
    assert metrics[1]["losses/count"] == 4
    assert common.all_finite((states[4].params, metrics))


def test_a_full_ring_is_replayed_evenly():
    """Without a discount the mean target is the mean reward, here the number of the row."""
    config = dataclasses.replace(COUNTER, batch_size=4096, gamma=0.0, reward_scale=1.0)
    algo = tiny.build("sac", config)
    state = jax.jit(algo.init)(jax.random.key(0))
    replay = state.replay._replace(reward=jnp.arange(128.0))
    state, metrics = jax.jit(algo.update)(state._replace(replay=replay, update=jnp.int32(4)))
    mean = metrics["losses/target"] / metrics["losses/count"]
    assert (state.replay.reward[:32] == 1).all()  # the fifth rollout took the first one's place
    assert_allclose(mean, state.replay.reward.mean(), rtol=0.02)


def test_broken_physics_is_marked_in_the_replay():
    """That such steps weigh nothing in the losses is tested above."""
    env = sac.make_env(COUNTER)

    def step(key, state, action):
        *rest, info = env.step(key, state, action)
        return *rest, info | {"env_nan": info["final_observation"][:, 0] == 2}

    algo = sac.build(COUNTER, env._replace(step=step))
    replay = jax.jit(algo.update)(algo.init(jax.random.key(0)))[0].replay
    np.testing.assert_array_equal(replay.valid[:32], replay.next_obs[:32, 0] != 2)
    assert 0 < replay.valid[:32].sum() < 32


def test_statistics_are_of_what_was_observed_and_replay_is_not_normalised():
    states, _ = states_of(COUNTER, 2)
    rows = states[2].replay.obs[:64]
    assert set(np.unique(rows[:, 0])) == {0, 1, 2, 3}
    assert_allclose(states[2].obs_stats.mean, rows.mean(0))
    assert_allclose(states[2].obs_stats.var, rows.var(0))
    algo = tiny.build("sac", COUNTER)
    action = algo.act(algo.policy_of(states[2]), rows, jax.random.key(0), True)
    inputs = states[2].obs_stats.normalize(rows)
    mean = sac.Actor(COUNTER, 2).apply(states[2].params["actor"], inputs).mean
    assert_allclose(action, jnp.tanh(mean))


def test_target_critics_start_as_copies_and_follow_slowly():
    """Towards fixed critics, by 1 - 0.995^k after k steps."""
    states, _ = states_of(COUNTER, 1)
    tiny.assert_same(states[0].target_params, {"critic": states[0].params["critic"]})
    zero = lambda state: state._replace(
        target_params=jax.tree.map(jnp.zeros_like, state.target_params)
    )
    states, _ = states_of(COUNTER, 5, zero, learning_rate=0.0)
    tiny.assert_same(states[0].params, states[5].params)
    share = 1 - 0.995 ** (4 * 4)
    wanted = jax.tree.map(lambda x: share * x, states[5].params["critic"])
    tiny.assert_close(states[5].target_params["critic"], wanted)


BY_HAND = config_of(
    env="probe/termination-continuous",
    learning_starts=0,
    updates_per_step=2 / 32,
    batch_size=32,
    polyak_tau=0.3,
    temperature_init=0.2,
    target_entropy_mult=0.7,
    reward_scale=0.5,
)


def test_gradient_steps_by_hand():
    """Two steps from the same draws: target critics, critics, actor and temperature, each from what
    was updated before it.
    """
    (before, after), (metrics,) = states_of(BY_HAND, 1, learning_rate=1e-2)
    rows = jax.tree.map(lambda x: x[:32], after.replay)
    np.testing.assert_array_equal(rows.terminated, rows.obs[:, 7] == 1)
    assert 0 < rows.terminated.sum() < 32
    obs, next_obs = (after.obs_stats.normalize(x) for x in (rows.obs, rows.next_obs))
    rows = rows._replace(obs=obs, next_obs=next_obs)
    actor, critic = sac.Actor(BY_HAND, 1), sac.Critic(BY_HAND)

    def sampled(params, obs, z):
        policy = actor.apply(params, obs)
        u = policy.mean + z * policy.std
        log_normal = -0.5 * z**2 - jnp.log(policy.std) - 0.5 * math.log(2 * math.pi)
        return jnp.tanh(u), (log_normal - jnp.log(1 - jnp.tanh(u) ** 2)).sum(-1)

    adam = optax.adam(1e-2, eps=1e-7)

    @jax.jit
    def step(params, target, opt, key):
        key_batch, key_step = jax.random.split(key)
        index = jax.random.randint(key_batch, (32,), 0, 32)
        batch = jax.tree.map(lambda x: x[index], rows)
        noise = [jax.random.normal(key, (32, 1)) for key in jax.random.split(key_step, 3)]
        target = jax.tree.map(lambda t, p: 0.7 * t + 0.3 * p, target, params["critic"])
        alpha = jnp.exp(params["temperature"])
        action, log_prob = sampled(params["actor"], batch.next_obs, noise[0])
        next_value = critic.apply(target, batch.next_obs, action)
        y = 0.5 * batch.reward + jnp.where(
            batch.terminated, 0.0, BY_HAND.gamma * (next_value.min(0) - alpha * log_prob)
        )

        def q_loss(p, params):
            value = critic.apply(p, batch.obs, batch.action)
            return ((value[0] - y) ** 2).mean() + ((value[1] - y) ** 2).mean()

        def pi_loss(p, params):
            action, log_prob = sampled(p, batch.obs, noise[1])
            value = critic.apply(params["critic"], batch.obs, action)
            return (alpha * log_prob - jnp.minimum(value[0], value[1])).mean()

        def alpha_loss(log, params):
            _, log_prob = sampled(params["actor"], batch.obs, noise[2])
            return (jnp.exp(log) * jax.lax.stop_gradient(-log_prob + 0.7)).mean()

        losses = {}
        for name, loss in (("critic", q_loss), ("actor", pi_loss), ("temperature", alpha_loss)):
            losses[name], grads = jax.value_and_grad(loss)(params[name], params)
            direction, moments = adam.update(grads, opt[name])
            params = params | {name: optax.apply_updates(params[name], direction)}
            opt = opt | {name: moments}
        return params, target, opt, losses

    params, target = before.params, before.target_params["critic"]
    opt, sums = {name: adam.init(params[name]) for name in params}, []
    key = jax.random.split(before.key, 3)[2]
    for i in range(2):
        params, target, opt, losses = step(params, target, opt, jax.random.fold_in(key, i))
        sums.append(losses)
    sums = jax.tree.map(jnp.add, *sums)
    assert metrics["losses/count"] == 2
    assert_allclose(metrics["losses/qf_loss"], sums["critic"], rtol=1e-4)
    assert_allclose(metrics["losses/policy_loss"], sums["actor"], rtol=1e-4)
    tiny.assert_close(after.params, params, rtol=1e-3, atol=1e-5)
    tiny.assert_close(after.target_params["critic"], target, rtol=1e-3, atol=1e-5)


def test_the_temperature_starts_where_it_is_told():
    state = tiny.build("sac", config_of(temperature_init=0.2)).init(jax.random.key(0))
    assert_allclose(jnp.exp(state.params["temperature"]), 0.2)


def test_drawn_actions_are_those_of_the_policy():
    algo, key = tiny.build("sac", COUNTER), jax.random.key(0)
    state = algo.init(jax.random.key(1))
    obs = jax.random.normal(jax.random.key(2), (50, 2))
    policy = sac.Actor(COUNTER, 2).apply(state.params["actor"], obs)
    noise = jax.random.normal(key, (50, 2))
    action = algo.act(algo.policy_of(state), obs, key, False)
    assert_allclose(action, np.tanh(policy.mean + policy.std * noise))


def test_metrics_of_the_policy():
    """Of two gradient steps that change nothing, from the same draws."""
    (before, after), (metrics,) = states_of(BY_HAND, 1, learning_rate=0.0)
    rows = jax.tree.map(lambda x: x[:32], after.replay)
    actor, critic = sac.Actor(BY_HAND, 1), sac.Critic(BY_HAND)
    sums = dict.fromkeys(("entropy", "q_policy", "q_data", "saturated_fraction"), 0.0)
    for i in range(2):
        key = jax.random.fold_in(jax.random.split(before.key, 3)[2], i)
        key_batch, key_step = jax.random.split(key)
        batch = jax.tree.map(lambda x: x[jax.random.randint(key_batch, (32,), 0, 32)], rows)  # noqa: B023
        obs = after.obs_stats.normalize(batch.obs)
        policy = actor.apply(before.params["actor"], obs)
        noise = jax.random.normal(jax.random.split(key_step, 3)[1], (32, 1))
        u = policy.mean + policy.std * noise
        q = lambda action: critic.apply(before.params["critic"], obs, action)  # noqa: B023
        sums["entropy"] -= policy.log_prob(u).mean()
        sums["q_policy"] += q(jnp.tanh(u)).mean()
        sums["q_data"] += q(batch.action).mean()
        sums["saturated_fraction"] += (abs(np.tanh(u)) > 0.99).mean()
    for name, value in sums.items():
        assert_allclose(metrics[f"losses/{name}"], value, rtol=1e-4)


# --- configuration ---


def test_bytes_of_the_replay():
    """128 transitions: two observations of 4 numbers, an action, a reward, two flags."""
    init = tiny.build("sac", config_of()).init
    state = jax.eval_shape(jax.vmap(init), jax.random.split(jax.random.key(0)))
    assert program.row_bytes(state.replay) == 128 * (2 * 16 + 4 + 4 + 1 + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"updates_per_step": 0.1},
            r"updates_per_step=0.1 gives 3.2 gradient steps after a rollout of 4 x 8",
        ),
        ({"updates_per_step": 0.0}, r"updates_per_step=0.0: it should be greater than 0"),
        ({"temperature_init": 0.0}, r"temperature_init=0.0: it should be greater than 0"),
        ({"critic_hidden": (8, 0)}, r"critic_hidden=\(8, 0\): it should be greater than 0"),
        ({"buffer_size": 31}, r"buffer_size=31 is less than .* raise it to 32"),
        (
            {"learning_starts": 161},
            r"learning_starts=161, .* leaves no rollout of total_timesteps=192",
        ),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sac.make_train(config_of(**changes))
    sac.make_train(config_of(learning_starts=160, buffer_size=32))


def test_discrete_actions_are_refused():
    with pytest.raises(ValueError, match=r"CartPole.* has discrete actions"):
        sac.make_env(config_of(env="cartpole"))


def test_broken_steps_are_not_learned_from():
    """Whatever they hold: no loss of an update sees rows that are not valid."""
    (_, state, _), _ = states_of(COUNTER, 2)
    _, update = functions_of(COUNTER)
    replay = state.replay._replace(valid=state.replay.valid.at[:32].set(False))
    spoil = lambda x: x.at[:32].set(7.0)
    spoiled = replay._replace(
        obs=spoil(replay.obs),
        action=spoil(replay.action),
        reward=spoil(replay.reward),
        next_obs=spoil(replay.next_obs),
    )
    one, other = (update(state._replace(replay=x), 1e-3)[0] for x in (replay, spoiled))
    tiny.assert_close(one.params, other.params)


def test_the_target_entropy_is_one_of_each_action():
    """Of two actions: Adam's first moment of the temperature has alpha times it, times 0.1."""

    def moment(mult):
        changes = {"updates_per_step": 1 / 32, "learning_starts": 0}
        config = tiny.config_of("sac", env="tiny:counter", target_entropy_mult=mult, **changes)
        algo = tiny.build("sac", config)
        state = jax.jit(algo.update)(algo.init(jax.random.key(0)))[0]
        return state.opt_state["temperature"].mu

    assert_allclose(moment(1.7) - moment(0.7), 0.1 * 2, rtol=1e-4)


def test_the_logged_temperature_is_alpha():
    _, (metrics,) = states_of(BY_HAND, 1, learning_rate=0.0)
    assert_allclose(metrics["losses/temperature"] / metrics["losses/count"], 0.2, rtol=1e-5)
