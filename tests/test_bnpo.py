"""BNPO: hindsight, targets, losses of the brains, natural gradient, settings."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_allclose

from algos import bnpo, common, ppo
from algos.bnpo import DDPG_BRAIN, PPO_BRAIN
from algos.common import Gaussian
from algos.launch import cli, rundir
from envs import arm
from envs.wrappers import Goals

# A replay buffer of W episodes of N environments with T steps; H steps are sampled.
W, N, T, H = 3, 2, 9, 4

# --- rows ---


def config_of(**changes):
    """20 environments with episodes of 12 steps, 3 of which are looked ahead; one brain."""
    brain = dataclasses.replace(PPO_BRAIN, buffer_size=3 * 20 * 12, her_ratio=0.25)
    return bnpo.Config(**{"brains": (brain,), "num_steps": 12, "max_nstep": 3, **changes})


def draw(config, update, size=20_000, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    return bnpo.draw_rows(config, config.brains[0], jnp.int32(update), size, keys)


def shares(x):
    """Share of each value from 0 on."""
    return np.bincount(x) / len(x)


def test_rows_are_drawn_uniformly():
    rows = draw(config_of(), update=7)
    assert_allclose(shares(rows.episode), np.full(3, 1 / 3), atol=0.02)
    assert_allclose(shares(rows.env), np.full(20, 1 / 20), atol=0.01)
    assert_allclose(shares(rows.step), np.full(12 - 3, 1 / 9), atol=0.01)  # three steps follow
    assert_allclose(shares(rows.goal_step), np.full(12 - 2, 1 / 10), atol=0.01)
    assert_allclose(rows.relabel.mean(), 0.25, atol=0.01)


@pytest.mark.parametrize(
    ("update", "window", "slots"),
    [(1, 3, {0}), (2, 3, {0, 1}), (7, 3, {0, 1, 2}), (7, 2, {2, 0}), (8, 1, {1})],
)
def test_rows_are_from_the_newest_complete_episodes(update, window, slots):
    """Of a buffer of 3 episodes, in which episode i is at i modulo 3."""
    large = config_of().brains[0]
    small = dataclasses.replace(large, buffer_size=window * 20 * 12)
    config = config_of(brains=(small, large))
    assert config.buffer_episodes == 3
    assert set(draw(config, update, 200).episode.tolist()) == slots


def test_future_goals_are_from_all_later_steps():
    rows = draw(config_of(her_strategy="future"), update=1)
    pairs = set(zip(rows.step.tolist(), rows.goal_step.tolist(), strict=True))
    assert pairs == {(t, h) for t in range(9) for h in range(t + 1, 13)}


def test_likely_actions_are_resampled():
    """In proportion to the ratio, at most 2, to the power 0.666."""
    ratio = jnp.array([0.0, 0.5, 1.0, 2.0, 50.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    first = jax.vmap(lambda key: bnpo.resample(key, ratio, 1)[0])(keys)
    weight = np.array([0.0, 0.5, 1.0, 2.0, 2.0]) ** 0.666
    assert_allclose(shares(first), weight / weight.sum(), atol=0.015)
    all_of_them = bnpo.resample(keys[0], ratio, 5)
    assert sorted(all_of_them.tolist()) == [0, 1, 2, 3, 4]  # without replacement


# --- hindsight ---


def buffer_of(obs):
    """Replay buffer with these observations [W, N, T + 1, ...] and empty steps."""
    zeros = jnp.zeros((*obs.shape[:2], obs.shape[2] - 1, 1))
    return bnpo.Trajectory(obs, zeros, Gaussian(zeros, zeros), zeros, zeros[..., 0] > 0)


def hindsight(goals, replay, rows, num_steps=H, **changes):
    """The sampled steps, and the same after relabelling."""
    traj = bnpo.gather(replay, rows, num_steps)
    return traj, bnpo.relabel(goals, bnpo.Config(**changes), replay, rows, traj)


def tagged():
    """Observations that are (episode, environment, step), twice: the second is the goal."""
    index = np.indices((W, N, T + 1)).transpose(1, 2, 3, 0).astype(np.float32)
    goals = Goals(
        achieved_goal=lambda obs: 100.0 + obs[..., :3],
        desired_goal=lambda obs: obs[..., 3:],
        with_goal=lambda obs, goal: jnp.concatenate([obs[..., :3], goal], -1),
        compute_reward=lambda achieved, goal, kind: goal[..., 2:],  # the step of the goal
        kinds=(),
        moving=True,
    )
    return buffer_of(jnp.asarray(np.concatenate([index, index], -1))), goals


def drawn(seed=0, size=200, future=False):
    rng = np.random.default_rng(seed)
    step = rng.integers(0, T - H + 1, size)
    return bnpo.Rows(
        episode=rng.integers(W, size=size),
        env=rng.integers(N, size=size),
        step=step,
        relabel=rng.random(size) < 0.5,
        goal_step=rng.integers(step + 1, T + 1) if future else rng.integers(0, T - H + 1, size),
    )


def test_shifted_goals_are_those_of_the_same_episode():
    replay, goals = tagged()
    rows, ahead = drawn(), np.arange(H + 1)
    own, new = hindsight(goals, replay, rows)
    start = np.where(rows.relabel, rows.goal_step, rows.step)
    for step, tag in ((rows.step, new.obs[..., :3]), (start, new.obs[..., 3:])):
        np.testing.assert_array_equal(tag[..., 0], np.repeat(rows.episode[:, None], H + 1, 1))
        np.testing.assert_array_equal(tag[..., 1], np.repeat(rows.env[:, None], H + 1, 1))
        np.testing.assert_array_equal(tag[..., 2], step[:, None] + ahead)
    np.testing.assert_array_equal(own.obs[..., 3:], own.obs[..., :3])


def test_future_goals_are_what_was_achieved_later():
    replay, goals = tagged()
    rows, ahead = drawn(1, future=True), np.arange(H + 1)
    _, new = hindsight(goals, replay, rows, her_strategy="future")
    achieved = 100 + np.stack([rows.episode, rows.env, rows.goal_step], -1)
    expected = np.where(rows.relabel[:, None, None], achieved[:, None], new.obs[..., :3])
    np.testing.assert_array_equal(new.obs[..., 3:], expected)
    np.testing.assert_array_equal(new.obs[..., 2], rows.step[:, None] + ahead)


def test_a_terminated_step_keeps_its_reward():
    """Its successor in the buffer is the next start."""
    replay, goals = tagged()
    replay = replay._replace(
        reward=replay.reward - 1.0, terminated=replay.terminated.at[0, 1, 3].set(True)
    )
    row = np.array([0])
    rows = bnpo.Rows(row, row + 1, row + 2, row == 0, row + 5)
    own, new = hindsight(goals, replay, rows, 3)
    np.testing.assert_array_equal(own.reward[0, :, 0], [-1, -1, -1])
    np.testing.assert_array_equal(new.reward[0, :, 0], [6, -1, 8])
    _, same = hindsight(goals, replay, rows._replace(relabel=row > 0), 3)
    np.testing.assert_array_equal(same.reward, own.reward)


def circle(speed):
    """Buffer of one episode of random arms, whose hands are near a target on a circle."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(1, 1, T + 1, 33)).astype(np.float32)
    angle = 40.0 + 4.0 * speed * np.arange(T + 1)
    obs[0, 0, :, 26:29] = arm.target_position(jnp.asarray(angle))
    obs[0, 0, :, 29:32] = arm.target_position(jnp.asarray(rng.uniform(0.0, 110.0, T + 1)))
    return buffer_of(jnp.asarray(obs))


GOALS = Goals(
    arm.achieved_goal, arm.desired_goal, arm.with_goal, arm.compute_reward, arm.KINDS, True
)


@pytest.mark.parametrize("kind", arm.KINDS)
def test_relabelled_rewards_are_those_of_the_new_goals(kind):
    replay = circle(0.9)
    episode = replay.obs[0, 0]
    reward = arm.compute_reward(arm.achieved_goal(episode[1:]), arm.desired_goal(episode[1:]), kind)
    replay = replay._replace(reward=reward[None, None])
    rows = drawn(2)
    unmoved = np.arange(200) % 4 == 0  # a shift by nothing
    goal_step = np.where(unmoved, rows.step, rows.goal_step)
    rows = rows._replace(episode=0 * rows.step, env=0 * rows.step, goal_step=goal_step)
    own, new = hindsight(GOALS, replay, rows, reward_kind=kind)
    ahead = np.arange(1, H + 1)
    arrived, meant = (
        episode[start[:, None] + ahead]
        for start in (rows.step, np.where(rows.relabel, goal_step, rows.step))
    )
    expected = arm.compute_reward(arm.achieved_goal(arrived), arm.desired_goal(meant), kind)
    np.testing.assert_array_equal(new.reward, expected)
    same = unmoved | ~rows.relabel
    np.testing.assert_array_equal(new.reward[same], own.reward[same])
    assert (rows.relabel & unmoved).sum() > 10
    assert (new.reward != own.reward).any()


def test_a_shift_turns_the_circle():
    """Nothing of an observation changes but the target's place, which moves on at its own speed."""
    rows = drawn(3)._replace(relabel=np.ones(200, bool))
    rows = rows._replace(episode=0 * rows.step, env=0 * rows.step)
    own, new = hindsight(GOALS, circle(0.7), rows)
    goal, others = arm.desired_goal(new.obs), np.r_[:26, 29:33]
    np.testing.assert_array_equal(new.obs[..., others], own.obs[..., others])
    angle = 40.0 + 4.0 * 0.7 * (rows.goal_step[:, None] + np.arange(H + 1))
    assert_allclose(goal, arm.target_position(jnp.asarray(angle)), atol=1e-4)
    assert_allclose(jnp.hypot(goal[..., 0], goal[..., 2]), np.full(goal.shape[:2], 8.0), atol=1e-4)
    own, new = hindsight(GOALS, circle(0.0), rows)
    np.testing.assert_array_equal(new.obs, own.obs)


@pytest.mark.parametrize("strategy", ["shift", "future"])
def test_the_behaviour_policy_is_the_denominator_for_shifted_goals_only(strategy):
    """x goes to x + a, a ~ N(k (g - x), 1), for two steps, to be near the goal at the end.

    Weighted by ratios to the behaviour policy (k = 0.5) under the original goals, the returns for
    shifted goals have the mean of the new policy (k = 0.7). Those for achieved goals have not,
    because these goals depend on the actions.
    """
    rng, num = np.random.default_rng(0), 400_000
    goal = rng.choice([-1.0, 1.0], (1, num, 6))
    x, noise, action = np.zeros((1, num, 6)), rng.normal(size=(num, 2)), []
    for j in range(2):
        action.append(0.5 * (goal[0, :, j] - x[0, :, j]) + noise[:, j])
        x[0, :, j + 1] = x[0, :, j] + action[j]
    goals = Goals(
        achieved_goal=lambda obs: obs[..., :1],
        desired_goal=lambda obs: obs[..., 1:],
        with_goal=lambda obs, goal: np.concatenate([obs[..., :1], goal], -1),
        compute_reward=lambda achieved, goal, kind: goal,
        kinds=(),
        moving=True,
    )
    zero = np.zeros(num, int)
    goal_step = rng.integers(0, 4, num) if strategy == "shift" else zero + 2
    rows = bnpo.Rows(zero, np.arange(num), zero, zero == 0, goal_step)
    own, new = hindsight(goals, buffer_of(np.stack([x, goal], -1)), rows, 2, her_strategy=strategy)
    log_weight = 0.0
    for j in range(2):
        pi, behaviour = (
            Gaussian(k * (obs[:, j, 1:] - obs[:, j, :1]), jnp.zeros((num, 1)))
            for k, obs in ((0.7, new.obs), (0.5, own.obs))
        )
        a = action[j][:, None]
        log_weight += np.asarray(bnpo.log_prob_of(pi, a) - bnpo.log_prob_of(behaviour, a))[:, 0]
    weight, loss = np.exp(log_weight), (new.obs[:, 2, 0] - new.obs[:, 2, 1]) ** 2
    mean_of = lambda x: (x.mean(), 3.0 * x.std() / num**0.5)
    mean, margin = mean_of(weight)
    if strategy == "future":
        assert mean > 1.5
        return
    assert abs(mean - 1.0) < margin
    x, g = np.zeros(num), rng.choice([-1.0, 1.0], (3, num))
    for j in range(2):
        x = x + 0.7 * (g[j] - x) + rng.normal(size=num)
    on_policy, own_margin = mean_of((x - g[2]) ** 2)
    mean, margin = mean_of(weight * np.asarray(loss))
    assert abs(mean - on_policy) < margin + own_margin


# --- targets ---


def random_targets(seed, b=6, m=2, chance=0.0):
    rng = np.random.default_rng(seed)
    return {
        "reward": rng.normal(size=(b, H, m)),
        "next_value": rng.normal(size=(b, H, m)),
        "bootstrap": rng.normal(size=(b, m)),
        "n": rng.integers(1, H + 1, b),
        "terminated": rng.random((b, H)) < chance,
    }


def test_one_step_needs_no_value():
    given = random_targets(0) | {"n": np.ones(6, int)}
    target = partial(bnpo.nstep_target, gamma=0.9)
    expected = given["reward"][:, 0] + 0.9 * given["bootstrap"]
    for lam in (0.0, 0.5, 1.0):
        assert_allclose(target(**given, lam=lam), expected)
    moved = given | {"next_value": given["next_value"] + 5.0}
    assert_allclose(target(**moved, lam=0.5), expected)


def test_without_a_trace_decay_rewards_are_summed():
    given = random_targets(1)
    actual = bnpo.nstep_target(**given, gamma=0.9, lam=1.0)
    for b, n in enumerate(given["n"]):
        expected = sum(0.9**j * given["reward"][b, j] for j in range(n))
        assert_allclose(actual[b], expected + 0.9**n * given["bootstrap"][b])


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_the_right_values_are_a_fixed_point(lam):
    given = random_targets(2)
    value = 1 / (1 - 0.9)
    given |= {"reward": np.ones((6, H, 2)), "next_value": np.full((6, H, 2), value)}
    given |= {"bootstrap": np.full((6, 2), value)}
    assert_allclose(bnpo.nstep_target(**given, gamma=0.9, lam=lam), np.full((6, 2), value))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.6))
def test_target_is_value_plus_decayed_errors(seed, gamma, lam, chance):
    """The published form, a sum of temporal differences: the value that it starts from cancels."""
    given = random_targets(seed, chance=chance)
    actual = jax.jit(bnpo.nstep_target)(**given, gamma=gamma, lam=lam)
    for b, n in enumerate(given["n"]):
        value, weight = np.full(2, 3.0), 1.0
        expected = value.copy()
        for j in range(n):
            after = given["bootstrap"][b] if j + 1 == n else given["next_value"][b, j]
            after = 0.0 if given["terminated"][b, j] else after
            expected += weight * (given["reward"][b, j] + gamma * after - value)
            if given["terminated"][b, j]:
                break
            value, weight = given["next_value"][b, j], weight * gamma * lam
        assert_allclose(actual[b], expected, atol=1e-4)


def test_every_n_is_equally_frequent():
    floating, fixed = (bnpo.Config(floating_nstep=x) for x in (True, False))
    n = bnpo.lookaheads(floating, 2048)
    np.testing.assert_array_equal(np.bincount(n), [0, *[205] * 8, *[204] * 2])
    np.testing.assert_array_equal(bnpo.lookaheads(fixed, 5), np.full(5, 10))


@pytest.mark.parametrize(
    ("brain", "minibatches"),
    [
        (PPO_BRAIN, [0, 0, 0, 0, 0, 6] * 2),
        (DDPG_BRAIN, [1, 2] * 6),
        (bnpo.PRESETS["a8"]["brains"][0], [0, 0, 0, 107] * 3),
    ],
)
def test_turns_come_when_they_are_due(brain, minibatches):
    """Minibatches after every ten steps of each environment; 60 steps are an episode."""
    assert np.diff(brain.minibatches(np.arange(0, 130, 10))).tolist() == minibatches
    assert np.diff(brain.minibatches(jnp.arange(0, 130, 10))).tolist() == minibatches


# --- losses ---

WEIGHTED = dataclasses.replace(DDPG_BRAIN, rule="weighted_ddpg")


def test_ppo_is_the_clipped_surrogate():
    """Value and gradient; the baseline is a constant, and only the ratio has a gradient."""
    log_ratio = jnp.log(jnp.array([0.5, 0.9, 1.1, 1.5, 0.5, 1.5, 3.0]))
    target = jnp.array([[2.0, 1.0]] * 4 + [[-1.0, -1.0]] * 3)
    q = jnp.full((7, 2), 0.25)
    advantage = (target - q).sum(-1)
    loss = lambda q, x: bnpo.actor_loss(PPO_BRAIN, q, bnpo.ratio_of(x), target)
    ratio = jnp.exp(log_ratio)
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    assert_allclose(loss(q, log_ratio), -surrogate.mean())
    theirs = lambda x: ppo.policy_loss(x, jnp.zeros(7), advantage, 0.2)[0]
    assert_allclose(jax.grad(loss, 1)(q, log_ratio), jax.grad(theirs)(log_ratio), atol=1e-6)
    q_grad, grad = jax.grad(loss, (0, 1))(q, log_ratio)
    assert_allclose(q_grad, jnp.zeros_like(q))
    expected = -ratio * advantage / 7
    # beyond the clip range in the direction of the advantage
    assert_allclose(grad, expected.at[jnp.array([3, 4])].set(0.0))


def test_at_the_behaviour_policy_ppo_is_the_policy_gradient():
    rng = np.random.default_rng(0)
    mean, action = jnp.float32(rng.normal(size=(2, 5, 4)))
    target, q = jnp.float32(rng.normal(size=(2, 5, 3)))
    log_prob = bnpo.log_prob_of(Gaussian(mean, jnp.zeros((5, 4))), action)

    def loss(mean, reduce):
        now = bnpo.log_prob_of(Gaussian(mean, jnp.zeros((5, 4))), action)
        log_ratio = getattr(now - log_prob, reduce)(-1)
        return bnpo.actor_loss(PPO_BRAIN, q, bnpo.ratio_of(log_ratio), target)

    advantage = (target - q).sum(-1)
    plain = jax.grad(
        lambda m: -(advantage * Gaussian(m, jnp.zeros((5, 4))).log_prob(action)).mean()
    )(mean)
    for reduce, factor in (("sum", 1.0), ("mean", 0.25)):
        assert_allclose(loss(mean, reduce), -advantage.mean())
        assert_allclose(jax.grad(loss)(mean, reduce), factor * plain)


def test_ddpg_climbs_the_critic():
    """The target shifts the loss and leaves its gradient alone; there is no ratio."""
    rng = np.random.default_rng(1)
    q, target = jnp.float32(rng.normal(size=(2, 5, 3)))
    loss = lambda q, x: bnpo.actor_loss(DDPG_BRAIN, q, x, target)
    q_grad, ratio_grad = jax.grad(loss, (0, 1))(q, jnp.full(5, 3.0))
    assert_allclose(q_grad, np.full((5, 3), -1 / 5))
    assert_allclose(ratio_grad, np.zeros(5))
    assert_allclose(loss(q, jnp.ones(5)), -(q - target).sum(-1).mean())


def test_weighted_ddpg_weighs_the_gradient_of_the_critic():
    log_ratio = jnp.log(jnp.array([0.5, 1.0, 1.5, 200.0]))
    q, target = jnp.array([[1.0], [1.0], [-1.0], [-1.0]]), jnp.zeros((4, 1))
    loss = lambda q, x: bnpo.actor_loss(WEIGHTED, q, bnpo.ratio_of(x), target)
    weight = jnp.array([0.5, 1.0, 1.5, 100.0])  # the smaller product of both
    assert_allclose(loss(q, log_ratio), -(weight * q[:, 0]).mean(), rtol=1e-4)
    q_grad, ratio_grad = jax.grad(loss, (0, 1))(q, log_ratio)
    assert_allclose(q_grad[:, 0], -weight / 4, rtol=1e-4)
    assert_allclose(ratio_grad, np.zeros(4))


@pytest.mark.parametrize("brain", [PPO_BRAIN, WEIGHTED], ids=lambda brain: brain.rule)
def test_an_infinite_ratio_has_no_gradient(brain):
    """exp(200) is infinite; the other rows learn nevertheless."""
    ppo_rule = brain.rule == "ppo"
    log_ratio, q = jnp.array([200.0, 0.0, -200.0]), jnp.zeros((3, 1))
    for gain, total in ((1.0, 1.2 + 1.0 + 0.0), (-1.0, -100.0 - 1.0 - 0.8)):
        target = jnp.full((3, 1), gain if ppo_rule else -gain)
        loss = lambda q, x, y=target: bnpo.actor_loss(brain, q, bnpo.ratio_of(x), y)
        value, grads = jax.value_and_grad(loss, (0, 1))(q, log_ratio)
        assert_allclose(value, -total / 3, rtol=1e-4)
        assert jnp.isfinite(grads[0]).all()
        assert_allclose(grads[1], [0.0, -gain / 3 if ppo_rule else 0.0, 0.0])


def test_log_probabilities_add_up():
    rng = np.random.default_rng(2)
    mean, log_std, action = jnp.float32(rng.normal(size=(3, 5, 4)))
    policy = Gaussian(mean, log_std)
    each = bnpo.log_prob_of(policy, action)
    assert each.shape == (5, 4)
    assert_allclose(each.sum(-1), policy.log_prob(action))


def test_the_critic_learns_what_a_distribution_is_worth():
    """One state, r = a, no future: the reward of samples gives Q(mean) = mean."""
    critic = bnpo.Critic(bnpo.Config(hidden=(16,)), 1)
    mean, obs = jnp.tile(jnp.array([-1.0, 0.0, 1.0]), 1000)[:, None], jnp.ones((3000, 1))
    policy = Gaussian(mean, jnp.zeros_like(mean))
    optimizer = optax.adam(5e-3)

    def step(carry, key):
        params, opt_state = carry
        action = mean + jax.random.normal(key, mean.shape)
        loss = lambda params: ((critic.apply(params, obs, policy) - action) ** 2).mean()
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def fit(key):
        params = critic.init(key, obs, policy)
        keys = jax.random.split(key, 400)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    params = fit(jax.random.key(0))
    learned = critic.apply(params, obs[:3], jax.tree.map(lambda x: x[:3], policy))
    assert_allclose(learned[:, 0], [-1.0, 0.0, 1.0], atol=0.05)


def test_what_the_critic_takes():
    """The mean and std, whatever the action; or an action, by default the mean."""
    obs, policy = jnp.ones((1, 2)), Gaussian(jnp.full((1, 1), 0.5), jnp.zeros((1, 1)))
    moved, wider = (
        policy._replace(mean=policy.mean + 1.0),
        policy._replace(log_std=jnp.ones((1, 1))),
    )
    for critic_input in ("distribution", "action"):
        critic = bnpo.Critic(bnpo.Config(hidden=(8,), critic_input=critic_input), 1)
        params = critic.init(jax.random.key(0), obs, policy)
        q = lambda *args: float(critic.apply(params, obs, *args)[0, 0])  # noqa: B023
        assert q(moved) != q(policy)
        assert (q(wider) != q(policy)) == (critic_input == "distribution")
        assert (q(policy, moved.mean) == q(policy)) == (critic_input == "distribution")
        assert (q(policy, moved.mean) == q(moved)) == (critic_input == "action")


def test_the_std_stays_between_bounds():
    actor = bnpo.Actor(bnpo.Config(hidden=(4,)), 2)
    noise = (jnp.ones((3, 4)), jnp.ones((4, 2)))
    params = actor.init(jax.random.key(0), jnp.ones((5, 3)), noise)["params"]
    for log_std, expected in ((0.0, 1.0), (100.0, math.e), (-100.0, 1 / math.e)):
        changed = {"params": params | {"log_std": jnp.full(2, log_std)}}
        std = jnp.exp(actor.apply(changed, jnp.ones((5, 3)), noise).log_std)
        assert_allclose(std, np.full((5, 2), expected))
    noisy, silent = (
        actor.apply({"params": params}, jnp.ones((5, 3)), x).mean
        for x in (noise, jax.tree.map(jnp.zeros_like, noise))
    )
    shifted = {k: v + 0.017 if "kernel" in k else v for k, v in params.items()}
    still = actor.apply({"params": shifted}, jnp.ones((5, 3)), jax.tree.map(jnp.zeros_like, noise))
    assert_allclose(noisy, still.mean)
    assert (noisy != silent).all()
    squashing = bnpo.Actor(bnpo.Config(hidden=(4,), tanh_mean=True), 2)
    squashed = squashing.apply({"params": params}, jnp.ones((5, 3)), noise)
    assert_allclose(squashed.mean, jnp.tanh(noisy))


def test_a_quadratic_critic_is_climbed():
    """Q = -(mean - b)^2 - (std - e)^2: the gradient that the parameters of the policy get."""
    mean, rho, b, e = jnp.array([[0.5], [-1.0]]), 0.3, 1.5, 0.7

    def loss(mean, rho):
        std = jnp.exp(jnp.tanh(rho))
        q = -((mean - b) ** 2) - (std - e) ** 2
        return bnpo.actor_loss(DDPG_BRAIN, q, jnp.ones(2), jnp.ones((2, 1)))

    mean_grad, rho_grad = jax.grad(loss, (0, 1))(mean, rho)
    std = math.exp(math.tanh(rho))
    assert_allclose(mean_grad, 2 * (mean - b) / 2)
    assert_allclose(rho_grad, 2 * (std - e) * std * (1 - math.tanh(rho) ** 2))


# --- natural gradient ---


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
    kl = lambda x: bnpo.gaussian_kl(policy_of(params), policy_of(unravel(x))).mean()
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
    assert_allclose(bnpo.gaussian_kl(policy_of(params), policy_of(new)).mean(), delta, rtol=0.05)
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


# --- configuration ---


def with_brain(k, **changes):
    """The default configuration with changes of one brain."""
    brains = list(bnpo.Config().brains)
    brains[k] = dataclasses.replace(brains[k], **changes)
    return {"brains": tuple(brains)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"brains": ()}, r"brains=\(\): at least one is needed"),
        ({"brains": ({"rule": "ppo"},)}, "brains="),
        (
            with_brain(1, turn_interval=0),
            r"brains\[1\].turn_interval=0: it should be greater than 0",
        ),
        (
            with_brain(0, her_ratio=12.0),
            r"brains\[0\].her_ratio=12.0: it should be less than or equal",
        ),
        (with_brain(1, her_ratio=math.nan), r"brains\[1\].her_ratio=nan"),
        (with_brain(0, learning_rate="1"), r"brains\[0\].learning_rate='1'"),
        (with_brain(0, rule="sac"), r"brains\[0\].rule='sac': it should be 'ppo', 'ddpg' or"),
        (with_brain(0, mean_only=True), r"brains\[0\].mean_only=True: rule='ppo' has no gradient"),
        (with_brain(1, turn_minibatches=0.0), r"brains\[1\].turn_minibatches=0.0"),
        (
            {"total_timesteps": 3_600},
            r"brains\[0\] never learns: it needs 3 of 3 episodes before its first turn",
        ),
        (
            with_brain(1, turn_interval=20_000),
            r"brains\[1\] never .* turn every 20000 steps: lower",
        ),
        ({"max_nstep": 60}, "max_nstep=60: it should be less than num_steps=60"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        common.check(bnpo.Config(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", dataclasses.fields(bnpo.Brain), ids=lambda field: field.name)
def test_every_field_of_a_brain_has_bounds(field):
    value = getattr(PPO_BRAIN, field.name)
    wrong = [None, "no such word"] if isinstance(value, (bool, str)) else [None, "1", -1, math.nan]
    for bad in wrong:
        with pytest.raises(ValueError, match=rf"brains\[0\].{field.name}="):
            common.check(bnpo.Config(**with_brain(0, **{field.name: bad})))


NO_HER = with_brain(1, her_ratio=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "cartpole"}, "discrete actions"),
        (
            {"env": "pendulum"},
            "has no goals: add --reward-kind env --brains.0.her-ratio 0 --brains.1.her-ratio 0",
        ),
        ({"env": "pendulum", "reward_kind": "env"}, "has no goals: add"),
        ({"env": "pendulum", **NO_HER}, "has no goals: add"),
        ({"her_strategy": "future"}, "gives constant goals: take 'shift'"),
        ({"env": "tiny:seek", "reward_kind": "sparse"}, "'sparse': choose from env, proxy"),
    ],
)
def test_what_an_environment_lacks_is_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        bnpo.make_env(bnpo.Config(**changes))
    assert "\n" not in str(error.value)


def test_a_task_without_goals_is_accepted_as_the_error_says():
    env = bnpo.make_env(bnpo.Config(env="pendulum", reward_kind="env", **NO_HER))
    assert env.max_steps == 60


def test_derived_sizes_of_the_published_setting():
    config = bnpo.Config()
    assert [config.window(brain) for brain in config.brains] == [5, 200]
    assert [config.warmup(brain) for brain in config.brains] == [3, 2]
    assert (config.buffer_episodes, config.num_updates) == (200, 320)


@pytest.mark.parametrize("preset", bnpo.PRESETS)
def test_a_run_is_read_from_its_json(preset):
    """Brains come back from config.json as what they were."""
    config = bnpo.config_for("arm/reacher-moving", preset)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert rundir.from_json(bnpo.Config, saved) == config
    saved["brains"][0]["her_ratio"] = 2.0
    with pytest.raises(ValueError, match=r"brains.0.her_ratio=2.0"):
        rundir.from_json(bnpo.Config, saved)


def test_flags_change_one_brain():
    flags = ["--brains.1.learning-rate", "0.5", "--brains.0.natural-gradient"]
    config = cli.parse("bnpo", bnpo.Config, bnpo.PRESETS, [*flags, "--gamma", "0.9"])[0]
    ppo_brain = dataclasses.replace(PPO_BRAIN, natural_gradient=True)
    ddpg_brain = dataclasses.replace(DDPG_BRAIN, learning_rate=0.5)
    assert config == bnpo.Config(brains=(ppo_brain, ddpg_brain), gamma=0.9)
    flags = ["--preset", "a4", "--brains.0.clip-eps", "0.1"]
    config = cli.parse("bnpo", bnpo.Config, bnpo.PRESETS, flags)[0]
    assert config.brains == (dataclasses.replace(PPO_BRAIN, clip_eps=0.1),)
    with pytest.raises(ValueError, match=r"unknown argument '--brains\.1\.clip-eps'"):
        cli.parse("bnpo", bnpo.Config, bnpo.PRESETS, ["--preset", "a4", "--brains.1.clip-eps", "1"])


@pytest.mark.parametrize(
    ("preset", "recalc_delay", "optim_epochs", "learning_repeat"),
    [("a1", 1, 2, 3), ("a2", 5, 2, 3), ("a2b", 5, 2, 3), ("a8", 2, 3, 140)],
)
def test_minibatches_of_the_published_settings(preset, recalc_delay, optim_epochs, learning_repeat):
    """The author's round is one minibatch once in `recalc_delay` + 1 times, else `optim_epochs`."""
    config = bnpo.config_for("arm/reacher-moving", preset)
    of_a_round = (1 + recalc_delay * optim_epochs) / (recalc_delay + 1)
    expected = learning_repeat // optim_epochs * of_a_round
    assert config.brains[-1].turn_minibatches == pytest.approx(expected, rel=0.01)
