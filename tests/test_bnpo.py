"""BNPO: hindsight, targets, losses of the brains, natural gradient, settings."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_allclose

from algos import bnpo, ppo
from algos.bnpo import DDPG_BRAIN, PPO_BRAIN
from algos.common import Gaussian
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
    loss = lambda q, x: bnpo.policy_loss(PPO_BRAIN, q, bnpo.ratio_of(x), target)
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
        return bnpo.policy_loss(PPO_BRAIN, q, bnpo.ratio_of(log_ratio), target)

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
    loss = lambda q, x: bnpo.policy_loss(DDPG_BRAIN, q, x, target)
    q_grad, ratio_grad = jax.grad(loss, (0, 1))(q, jnp.full(5, 3.0))
    assert_allclose(q_grad, np.full((5, 3), -1 / 5))
    assert_allclose(ratio_grad, np.zeros(5))
    assert_allclose(loss(q, jnp.ones(5)), -(q - target).sum(-1).mean())


def test_weighted_ddpg_weighs_the_gradient_of_the_critic():
    log_ratio = jnp.log(jnp.array([0.5, 1.0, 1.5, 200.0]))
    q, target = jnp.array([[1.0], [1.0], [-1.0], [-1.0]]), jnp.zeros((4, 1))
    loss = lambda q, x: bnpo.policy_loss(WEIGHTED, q, bnpo.ratio_of(x), target)
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
        loss = lambda q, x, y=target: bnpo.policy_loss(brain, q, bnpo.ratio_of(x), y)
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
        return bnpo.policy_loss(DDPG_BRAIN, q, jnp.ones(2), jnp.ones((2, 1)))

    mean_grad, rho_grad = jax.grad(loss, (0, 1))(mean, rho)
    std = math.exp(math.tanh(rho))
    assert_allclose(mean_grad, 2 * (mean - b) / 2)
    assert_allclose(rho_grad, 2 * (std - e) * std * (1 - math.tanh(rho) ** 2))


def test_initial_weights():
    """Uniform up to sqrt(3 / inputs) in the actor, and up to 3e-3 in the critic's last layer."""
    config, obs = bnpo.Config(hidden=(40, 30)), jnp.zeros((1, 20))
    noise = jnp.zeros((20, 40)), jnp.zeros((40, 30)), jnp.zeros((30, 4))
    actor = bnpo.Actor(config, 4).init(jax.random.key(0), obs, noise)["params"]
    for i, inputs in enumerate((20, 40, 30)):
        bound = math.sqrt(3 / inputs)
        assert 0.9 * bound < jnp.abs(actor[f"kernel_{i}"]).max() <= bound
    policy = Gaussian(jnp.zeros((1, 4)), jnp.zeros((1, 4)))
    critic = bnpo.Critic(config, 9).init(jax.random.key(0), obs, policy)["params"]
    last = critic[f"Dense_{len(critic) - 1}"]["kernel"]
    assert 2.5e-3 < jnp.abs(last).max() <= 3e-3


def test_parameter_noise_may_be_held_for_several_episodes():
    """For 16 steps, which are two episodes."""
    algo = tiny.build("bnpo", tiny.config_of("bnpo", param_noise_interval=16))
    state = algo.init(jax.random.key(0))
    noise = jax.jit(lambda update: algo.update(state._replace(update=update))[0].noise)
    redrawn = [any(bool(x.any()) for x in noise(jnp.int32(i))) for i in range(3)]
    assert redrawn == [True, False, True]
