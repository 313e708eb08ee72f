"""BPO: what an update does to networks, replay buffer and statistics, step by step."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats
from tiny import assert_allclose

from algos import bpo, common
from algos.launch import program

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_bpo_update")


SMALL = bpo.Config(
    num_envs=4,
    num_steps=8,
    num_epochs=2,
    num_minibatches=2,
    num_vf_epochs=3,
    num_vf_minibatches=4,
    num_mu_epochs=1,
    num_mu_minibatches=8,
    replay_rollouts=2,
    hidden=(8, 8),
    learning_rate=1e-2,
    anneal_lr=True,
    total_timesteps=32 * 10,
)
FROZEN = {"learning_rate": 0.0}


@lru_cache
def compiled(config):
    """Compiled `init(key)` and `update(state, hparams)`; compiling takes seconds, so share them."""
    common.check(config)
    env = bpo.make_env(config)
    algo = bpo.build(config, env)
    update = lambda state, hparams: bpo.build(replace(config, **hparams), env).update(state)
    options = {"xla_backend_optimization_level": 0}  # compiles faster
    return jax.jit(algo.init), jax.jit(update, compiler_options=options)


def run(config, num_updates, change=lambda state: state, seed=0, **hparams):
    """States after each update, the first one being the initial state, and metrics."""
    hparams = {"learning_rate": config.learning_rate, "ent_coef": 0.0, "gamma": 0.9} | hparams
    init, update = compiled(config)
    states, metrics = [change(init(jax.random.key(seed)))], []
    for _ in range(num_updates):
        state, metric = update(states[-1], hparams)
        states.append(state)
        metrics.append(metric)
    return states, metrics


def shifted(name, amount=0.3):
    """A change of the initial state: other parameters for network `name`."""

    def change(state):
        leaves, tree = jax.tree.flatten(state.params[name])
        keys = jax.random.split(jax.random.key(9), len(leaves))
        draw = lambda x, key: x + amount * jax.random.normal(key, x.shape)
        moved = tree.unflatten(map(draw, leaves, keys))
        return state._replace(params=state.params | {name: moved})

    return change


def actor_of(config):
    """The policy network of cartpole, its probes, or pendulum."""
    discrete = config.env != "pendulum"
    return bpo.Actor(config, (4,), 2 if discrete else 1, discrete)


def q_network(config, name):
    """The network of "q" or "qhat", likewise."""
    discrete = config.env != "pendulum"
    return bpo.ActionCritic(config, (4,), 2 if discrete else 1, discrete, name == "qhat")


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def counts(state):
    return {name: int(x[1].count) for name, x in state.opt_state.items()}


def test_mu_starts_as_pi():
    states, metrics = run(SMALL, 2)
    state = states[0]
    assert equal(state.params["mu"], state.params["actor"])
    assert equal(state.target_params, {name: state.params[name] for name in ("q", "qhat")})
    assert_allclose(metrics[0]["ratios/mean"], 1.0)
    assert_allclose(metrics[0]["ratios/ess"], 1.0)
    assert metrics[1]["ratios/ess"] < 1.0


def test_gradient_steps_of_an_update():
    states, _ = run(SMALL, 3)
    # 2 x 2 of pi and V; epochs on a replay buffer that holds 1 of 2 rollouts, then 2
    for state, fit, mu in zip(states[1:], (6, 18, 30), (4, 12, 20), strict=True):
        pi = 4 * int(state.update)
        assert counts(state) == {"actor": pi, "critic": pi, "q": fit, "qhat": fit, "mu": mu}


def test_replay_keeps_the_last_rollouts():
    states, _ = run(SMALL, 3)
    T = SMALL.num_steps
    first, second, third = (state.replay for state in states[1:])
    part = lambda replay, i: jax.tree.map(lambda x: x[i * T : (i + 1) * T], replay)
    assert equal(part(first, 0), part(second, 0))
    assert not part(first, 1).obs.any()
    assert equal(part(second, 1), part(third, 1))
    assert not equal(part(second, 0), part(third, 0))  # the oldest went
    # rows are consecutive, and the rollout goes on where the last one ended
    rows = part(third, 0)
    np.testing.assert_array_equal(rows.obs[0], states[2].obs)
    same = ~rows.done[:-1]
    np.testing.assert_array_equal(rows.next_obs[:-1][same], rows.obs[1:][same])


def test_rows_not_yet_filled_are_not_used():
    poison = lambda state: state._replace(
        replay=state.replay._replace(reward=jnp.full_like(state.replay.reward, jnp.nan))
    )
    _, [metric] = run(SMALL, 1, poison)
    assert metric["health/finite"]
    assert jnp.isfinite(jnp.array([metric["losses/q_loss"], metric["losses/qhat_loss"]])).all()


ROWS = replace(SMALL, polyak_tau=0.0, shuffle="rows", num_mu_minibatches=4)


@pytest.mark.parametrize(
    "config",
    [pytest.param(SMALL, id="tau"), pytest.param(ROWS, id="copy", marks=pytest.mark.slow)],
)
def test_target_networks_move_by_tau_or_at_the_end_of_an_epoch(config):
    change = lambda state: state._replace(
        target_params=jax.tree.map(lambda x: x + 1.0, state.target_params)
    )
    states, _ = run(config, 1, change, **FROZEN)
    tau = config.polyak_tau
    remains = (1 - tau) ** counts(states[1])["q"] if tau else 0.0
    for name in ("q", "qhat"):
        online, target = states[1].params[name], states[1].target_params[name]
        assert equal(online, states[0].params[name])
        jax.tree.map(lambda x, y: assert_allclose(y - x, remains), online, target)


CONTINUOUS = replace(
    SMALL, env="pendulum", num_vf_minibatches=2, num_mu_minibatches=2, symlog_targets=False,
    polyak_tau=0.0,
)  # fmt: skip
HELD = replace(CONTINUOUS, clip_traj=True, noise_interval=4)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="transitions"),
        pytest.param(ROWS, id="rows", marks=pytest.mark.slow),
        pytest.param(HELD, id="held"),
    ],
)
def test_surrogate_ratio_is_against_mu(config):
    _, [metric] = run(config, 1, shifted("mu"), **FROZEN)
    assert metric["health/kl_mu_pi"] > 1e-3
    assert_allclose(metric["losses/approx_kl"], metric["health/kl_mu_pi"], rtol=1e-4)


ONE_STEP = {"replay_rollouts": 1, "num_vf_epochs": 1, "num_vf_minibatches": 1, "polyak_tau": 0.0}
LONG = replace(SMALL, num_steps=24, clip_rho=1.4, clip_c=1.1, **ONE_STEP)
LONG_WEIGHTED = replace(LONG, symlog_targets=False, weight_td=True, clip_targets=False)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LONG, id="each"),
        pytest.param(replace(LONG, clip_traj=True), id="product", marks=pytest.mark.slow),
    ],
)
def test_targets_of_an_update(config):
    """V learns the targets that the estimator computes of the rollout, its ratios and its ends."""
    states, [metric] = run(config, 1, shifted("mu"), **FROZEN)
    rows, params = states[1].replay, states[0].params
    assert rows.done.any()
    value, next_value = (
        bpo.Critic(config, (4,)).apply(params["critic"], x) for x in (rows.obs, rows.next_obs)
    )
    log_pi = actor_of(config).apply(params["actor"], rows.obs).log_prob(rows.action)
    args = rows.reward, value, next_value, rows.terminated, rows.done, log_pi - rows.log_prob
    args += 0.9, config.gae_lambda, 1.4, 1.1
    _, target = (bpo.trajectory_estimator if config.clip_traj else bpo.step_estimator)(*args)
    assert_allclose(metric["losses/value_loss"], ((target - value) ** 2).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LONG, id="symlog"),
        pytest.param(LONG_WEIGHTED, id="weighted", marks=pytest.mark.slow),
        pytest.param(replace(CONTINUOUS, **ONE_STEP), id="continuous", marks=pytest.mark.slow),
    ],
)
def test_what_q_and_the_second_moment_learn(config):
    """The regression of Q and of Q^ again: networks, targets, bounds and weights."""
    discrete = config.env == "cartpole"

    def change(state):
        for name in ("mu", "q", "qhat", *(["actor"] if discrete else [])):
            state = shifted(name)(state)
        targets = {k: shifted(k, 0.1)(state).params[k] for k in ("q", "qhat")}
        if not discrete:  # pi is so sure that its samples are its mean
            params = state.params["actor"]["params"] | {"log_std": jnp.array([-12.0])}
            state = state._replace(params=state.params | {"actor": {"params": params}})
        return state._replace(target_params=targets)

    states, [metric] = run(config, 1, change, **FROZEN)
    rows, params, targets = states[1].replay, states[0].params, states[0].target_params
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    actor = actor_of(config)
    pi, next_pi = (actor.apply(params["actor"], x) for x in (rows.obs, rows.next_obs))
    online = config.symlog_targets or discrete
    weight = jnp.ones(len(rows.reward))
    if config.weight_td:
        weight = bpo.td_weight(pi.log_prob(rows.action) - rows.log_prob)

    def check(name, reward, gamma, bounds):
        net = q_network(config, name)
        symlog, symexp = (bpo.symlog, bpo.symexp) if config.symlog_targets else [lambda x: x] * 2
        source = (params if online else targets)[name]
        if discrete:
            out, anchor = (net.apply(x[name], rows.obs) for x in (params, targets))
            chosen = jax.nn.one_hot(rows.action, 2)
            out, anchor = (out * chosen).sum(-1), (anchor * chosen).sum(-1)
            probs = jax.nn.softmax(next_pi.logits)
            next_value = (probs * symexp(net.apply(source, rows.next_obs))).sum(-1)
        else:
            out, anchor = (net.apply(x[name], rows.obs, rows.action) for x in (params, targets))
            next_value = net.apply(source, rows.next_obs, next_pi.mean)
        target = reward + gamma * jnp.where(rows.terminated, 0.0, next_value)
        if config.clip_targets:
            target = jnp.clip(target, *(jnp.array(bounds) / (1 - gamma)))
        pull = (out - anchor) ** 2 if config.symlog_targets else 0.0
        expected = (weight * ((out - symlog(target)) ** 2 + pull)).mean()
        assert_allclose(metric[f"losses/{name}_loss"], expected, rtol=1e-3)
        return symexp(out)

    assert discrete == rows.terminated.any()
    q = check("q", rows.reward, 0.9, states[1].reward_range)
    if config.clip_targets:
        q = jnp.clip(q, *(states[1].reward_range / 0.1))
    # the target network has been copied by then
    r_hat = 2 * rows.reward * q - rows.reward**2
    check("qhat", r_hat, 0.81, (1e-8, states[1].r_hat_max))


CHAIN = replace(LONG, num_mu_minibatches=1)


def test_q_then_the_second_moment_then_mu_are_fitted_to_the_new_policy():
    """One gradient step each. Q^ learns from the new Q; mu learns from the new, clipped Q^."""

    def change(state):
        state = shifted("mu")(shifted("q")(shifted("qhat", 2.6)(state)))
        targets = {name: state.params[name] for name in ("q", "qhat")}
        return state._replace(target_params=targets)

    (before, after), [metric] = run(CHAIN, 1, change, learning_rate=0.3)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after.replay)
    actor, nets = actor_of(CHAIN), {name: q_network(CHAIN, name) for name in ("q", "qhat")}
    taken = jax.nn.one_hot(rows.action, 2)

    def loss_of(name, reward, gamma, low, high, policy):
        values = lambda obs: nets[name].apply(before.params[name], obs)
        probs = jax.nn.softmax(actor.apply(policy, rows.next_obs).logits)
        next_value = (probs * bpo.symexp(values(rows.next_obs))).sum(-1)
        target = reward + gamma * jnp.where(rows.terminated, 0.0, next_value)
        target = jnp.clip(target, low / (1 - gamma), high / (1 - gamma))
        return (((values(rows.obs) * taken).sum(-1) - bpo.symlog(target)) ** 2).mean()

    def check(name, *args):
        old, new = (loss_of(name, *args, state.params["actor"]) for state in (before, after))
        assert abs(old / new - 1) > 3e-3
        assert_allclose(metric[f"losses/{name}_loss"], new, rtol=3e-4)

    check("q", rows.reward, 0.9, *after.reward_range)
    q = (bpo.symexp(nets["q"].apply(after.params["q"], rows.obs)) * taken).sum(-1)
    r_hat = 2 * rows.reward * jnp.clip(q, *(after.reward_range / 0.1)) - rows.reward**2
    assert_allclose(after.r_hat_max, r_hat.max(), rtol=1e-4)
    check("qhat", r_hat, 0.81, 1e-8, after.r_hat_max)
    qhat = bpo.symexp(nets["qhat"].apply(after.params["qhat"], rows.obs))
    bounds = 1e-8 / 0.19, after.r_hat_max / 0.19
    assert (qhat > bounds[1]).any()
    log_pi = jax.nn.log_softmax(actor.apply(after.params["actor"], rows.obs).logits)
    log_mu = jax.nn.log_softmax(actor.apply(before.params["mu"], rows.obs).logits)

    def mu_loss(moment):
        target = jax.nn.softmax(log_pi + 0.5 * jnp.log(jnp.maximum(moment, 1e-6)))
        return -(target * log_mu).sum(-1).mean()

    free, bounded = mu_loss(qhat), mu_loss(jnp.clip(qhat, *bounds))
    assert abs(free / bounded - 1) > 3e-3
    assert_allclose(metric["losses/mu_loss"], bounded, rtol=3e-4)
    qhat = (qhat * taken).sum(-1)
    assert_allclose(metric["health/qhat_below_q2"], (qhat < q**2).mean(), rtol=1e-4)
    correlation = np.corrcoef(qhat, q**2)[0, 1]
    assert_allclose(metric["health/qhat_q2_corr"], correlation, rtol=1e-3)


FREE = replace(CONTINUOUS, **ONE_STEP | {"num_vf_minibatches": 4}, clip_targets=False)


def test_hard_copies_wait_for_the_end_of_an_epoch():
    """A target network that returns 1000 makes the targets of all steps of the epoch."""

    def change(state):
        layers = state.target_params["q"]["params"]
        layers = layers | {"Dense_0": layers["Dense_0"] | {"bias": jnp.array([1000.0])}}
        return state._replace(target_params=state.target_params | {"q": {"params": layers}})

    states, [metric] = run(FREE, 1, change)
    assert_allclose(metric["losses/q_loss"], 900.0**2, rtol=0.1)
    assert equal(states[1].target_params["q"], states[1].params["q"])


def test_mu_acts_and_pi_is_evaluated():
    states, _ = run(SMALL, 1, shifted("mu", 2.0), **FROZEN)
    rows = jax.tree.map(lambda x: x[: SMALL.num_steps], states[1].replay)
    mu = actor_of(SMALL).apply(states[0].params["mu"], rows.obs)
    assert_allclose(rows.log_prob, mu.log_prob(rows.action))
    policy = tiny.build("bpo", SMALL).policy_of(states[0])
    assert equal(policy["actor"], states[0].params["actor"])
    assert not equal(policy["actor"], states[0].params["mu"])


def replay_noise(config, states):
    """Standardised noise of the actions of the first rollout [T, N, action_size]."""
    rows = jax.tree.map(lambda x: x[: config.num_steps], states[1].replay)
    policy = actor_of(config).apply(states[0].params["mu"], rows.obs)
    std = np.exp(policy.log_std)
    density = stats.norm(policy.mean, std).logpdf(rows.action).sum(-1)
    assert_allclose(rows.log_prob, density, rtol=1e-4, atol=1e-4)
    return np.asarray((rows.action - policy.mean) / std)


@pytest.mark.slow  # ppo.py's noise is drawn alike
def test_noise_is_held():
    noise = replay_noise(HELD, run(HELD, 1, shifted("mu"), **FROZEN)[0])
    assert_allclose(np.diff(noise.reshape(2, 4, -1), axis=1), 0.0, atol=1e-3)
    first = noise[::4].ravel()
    assert len(np.unique(first.round(3))) == first.size  # over blocks and environments
    independent = replay_noise(CONTINUOUS, run(CONTINUOUS, 1, shifted("mu"))[0])
    assert (np.abs(np.diff(independent, axis=0)) > 1e-4).all()


FOREVER = replace(SMALL, env="probe/truncation", num_steps=16, normalize_reward=True)


def test_replay_holds_raw_rewards_of_time_limits():
    states, _ = run(FOREVER, 3)
    replay = states[-1].replay
    assert (replay.reward == 1.0).all()
    assert replay.done.any()
    assert not replay.terminated.any()
    assert_allclose(states[-1].reward_range, [0.0, 1.0])


def test_clip_targets_bounds_targets():
    """Rewards of at most 1 add up to no more than 2 at gamma 0.5, whatever the network says."""
    raised = lambda state: state._replace(
        params=state.params | {"q": jax.tree.map(lambda x: x + 5.0, state.params["q"])}
    )
    _, [clipped] = run(FOREVER, 1, raised, gamma=0.5, **FROZEN)
    _, [free] = run(FOREVER, 1, gamma=0.5, **FROZEN)
    assert clipped["health/q_target_clip_fraction"] == 1.0
    assert free["health/q_target_clip_fraction"] == 0.0


@pytest.mark.slow
def test_largest_reward_of_the_second_moment():
    """2 r Q - r^2 with r = 1 and Q in [0, 10], in raw units; nothing of rows not filled yet."""
    states, _ = run(FOREVER, 1, shifted("q"), learning_rate=0.0)
    assert_allclose(states[0].r_hat_max, 1e-8, atol=0)
    one = jax.tree.map(lambda x: x[:16], states[1].replay)
    q = bpo.symexp(q_network(FOREVER, "q").apply(states[1].params["q"], one.obs))
    q = jnp.take_along_axis(jnp.clip(q, 0.0, 10.0), one.action[..., None], -1)[..., 0]
    expected = (2 * q - 1).max()
    assert (jnp.abs(expected) > 1e-3).all()
    assert_allclose(states[1].r_hat_max, jnp.maximum(expected, 1e-8))
    # scaling rewards by 1/2 halves Q's unit, so the same network means four times as much
    halved = lambda state: shifted("q")(state)._replace(
        reward_scale=state.reward_scale._replace(
            stats=state.reward_scale.stats._replace(var=jnp.array(4.0))
        )
    )
    states, _ = run(FOREVER, 1, halved, learning_rate=0.0)
    expected = (2 * 0.5 * jnp.clip(q, 0.0, 5.0) - 0.25).max() * 4
    assert_allclose(states[1].r_hat_max, jnp.maximum(expected, 1e-8), rtol=1e-4)


@lru_cache
def two_step_moments(**changes):
    """Q and Q^ in both states of a task of two steps with reward 1 at the end."""
    config = replace(
        SMALL,
        **{
            "env": "probe/discount",
            "num_envs": 16,
            "num_epochs": 1,
            "num_vf_epochs": 8,
            "learning_rate": 3e-3,
            "anneal_lr": False,
            "hidden": (16, 16),
            **changes,
        },
    )
    state = run(config, 40)[0][-1]
    obs = jnp.array([[0.0], [1.0]])
    value = bpo.symexp if config.symlog_targets else lambda x: x
    nets = {name: q_network(config, name) for name in ("q", "qhat")}
    return [value(net.apply(state.params[name], obs)) for name, net in nets.items()]


@pytest.mark.slow
@pytest.mark.parametrize("symlog", [True, False])
def test_second_moment_is_learned(symlog):
    changes = {} if symlog else {"symlog_targets": False, "polyak_tau": 0.0, "weight_td": True}
    q, qhat = two_step_moments(**changes)
    assert_allclose(q, [[0.9, 0.9], [1.0, 1.0]], atol=0.05)
    assert_allclose(qhat, [[0.81, 0.81], [1.0, 1.0]], atol=0.05)


def test_annealing_follows_progress():
    states, metrics = run(SMALL, 10)
    assert_allclose([m["charts/learning_rate"] for m in metrics], 1e-2 * (1 - np.arange(10) / 10))
    assert not equal(states[-2].params["mu"], states[-1].params["mu"])


@pytest.mark.parametrize(
    ("env", "loss"),
    [("cartpole", "centred"), pytest.param("pendulum", "kl", marks=pytest.mark.slow)],
)
def test_mu_losses_differ_in_what_they_look_at(env, loss):
    config = SMALL if env == "cartpole" else CONTINUOUS
    change = lambda state: shifted("q")(shifted("qhat")(state))
    ends = [run(replace(config, mu_loss=x), 1, change)[0][1] for x in ("kl_qhat", loss)]
    assert not equal(ends[0].params["mu"], ends[1].params["mu"])
    for name in ("actor", "critic", "q", "qhat"):
        assert equal(ends[0].params[name], ends[1].params[name])


@pytest.mark.slow
def test_mu_that_follows_pi_ignores_the_second_moment():
    config = replace(CONTINUOUS, mu_loss="kl")
    plain, other = (run(config, 1, change)[0][1] for change in (lambda s: s, shifted("qhat")))
    assert equal(plain.params["mu"], other.params["mu"])
    assert not equal(plain.params["qhat"], other.params["qhat"])


@pytest.mark.slow
def test_networks_see_clipped_actions():
    """All actions lie beyond the box: nothing that is learned from Q depends on how far."""

    def at(mean):
        def change(state):
            def biased(params):
                layers = params["params"]
                layers = layers | {"Dense_0": layers["Dense_0"] | {"bias": jnp.array([mean])}}
                return {"params": layers | {"log_std": jnp.array([-3.0])}}

            moved = {name: biased(state.params[name]) for name in ("actor", "mu")}
            return state._replace(params=state.params | moved)

        return run(CONTINUOUS, 1, change)[0][1]

    near, far = at(5.0), at(7.0)
    for name in ("q", "qhat"):
        jax.tree.map(
            lambda x, y: assert_allclose(x, y, atol=1e-4), near.params[name], far.params[name]
        )


def test_entropy_bonus_acts_on_mu_alone():
    plain, _ = run(SMALL, 1)
    bonus, _ = run(SMALL, 1, ent_coef=0.5)
    for name in ("actor", "critic", "q", "qhat"):
        assert equal(plain[1].params[name], bonus[1].params[name])
    assert not equal(plain[1].params["mu"], bonus[1].params["mu"])


def test_each_gradient_has_its_norm():
    _, (metrics,) = run(SMALL, 1, vf_coef=0.0)
    assert metrics["losses/critic_grad_norm"] == 0.0 < metrics["losses/actor_grad_norm"]


@pytest.mark.slow  # minutes: every operation is compiled by itself
def test_jit_changes_nothing():
    jitted = run(SMALL, 1, gamma=SMALL.gamma)[0]
    with jax.disable_jit():
        plain, _ = tiny.build("bpo", SMALL).update(jitted[0])
    jax.tree.map(
        lambda x, y: assert_allclose(x, y, rtol=1e-3, atol=1e-4), jitted[1].params, plain.params
    )


@pytest.mark.slow  # a contract of every algorithm, here with more updates than the replay holds
def test_seeds_side_by_side_are_the_seeds_alone():
    algo = tiny.build("bpo", replace(SMALL, gamma=0.9))
    keys = jax.vmap(jax.random.key)(jnp.arange(3, dtype=jnp.uint32))
    axes = program.per_row(bpo.TrainState, 0, None)
    states = jax.vmap(algo.init, out_axes=axes)(keys)
    options = {"xla_backend_optimization_level": 0}
    update = jax.jit(jax.vmap(algo.update, (axes,), (axes, 0)), compiler_options=options)
    for _ in range(3):
        states, _ = update(states)
    alone = run(SMALL, 3, seed=2)[0][-1]
    assert states.update.shape == ()
    jax.tree.map(
        lambda x, y: assert_allclose(x[2], y, rtol=1e-3, atol=1e-4), states.params, alone.params
    )


@pytest.mark.slow
def test_cartpole_is_learned():
    """Mu stays near pi throughout, and its episodes end up as long as pi's."""
    config = bpo.config_for("cartpole")
    keys = jax.vmap(jax.random.key)(jnp.arange(4, dtype=jnp.uint32))
    metrics = jax.jit(jax.vmap(bpo.make_train(config)))(keys)["metrics"]
    assert (jnp.abs(metrics["ratios/mean"] - 1.0) < 0.1).all()
    late = {k: x[:, -100:].sum(-1) for k, x in metrics.items() if k.startswith("episodes/")}
    assert (late["episodes/return"] / late["episodes/count"] > 450).all()


NORMAL = replace(LONG, normalize_obs=True, normalize_reward=True)


def test_what_is_learned_is_in_standardised_units():
    """V, Q and Q^ see standardised observations and scaled rewards; rewards seen stay raw."""
    seen = common.Stats(jnp.full(4, 0.02), jnp.full(4, 0.01), jnp.float32(64))
    paid = common.Stats(jnp.float32(0), jnp.float32(4), jnp.float32(64))  # rewards are halved

    def change(state):
        scale = state.reward_scale._replace(stats=paid)
        state = shifted("q", 1.0)(shifted("mu")(state))
        targets = {name: state.params[name] for name in ("q", "qhat")}
        return state._replace(obs_stats=seen, reward_scale=scale, target_params=targets)

    states, [metric] = run(NORMAL, 1, change, **FROZEN)
    rows, params = states[1].replay, states[0].params
    obs, next_obs = seen.normalize(rows.obs), seen.normalize(rows.next_obs)
    critic, actor = bpo.Critic(NORMAL, (4,)), actor_of(NORMAL)
    value, next_value = (critic.apply(params["critic"], x) for x in (obs, next_obs))
    pi, next_pi = (actor.apply(params["actor"], x) for x in (obs, next_obs))
    reward, ends = 0.5 * rows.reward, (rows.terminated, rows.done)
    log_ratio = pi.log_prob(rows.action) - rows.log_prob
    args = reward, value, next_value, *ends, log_ratio, 0.9, NORMAL.gae_lambda, 1.4, 1.1
    _, target = bpo.step_estimator(*args)
    assert_allclose(metric["losses/value_loss"], ((target - value) ** 2).mean(), rtol=1e-4)
    explained = 1 - (target - value).var() / target.var()
    assert_allclose(metric["losses/explained_variance"], explained, rtol=1e-3, atol=1e-4)
    clipped = (jnp.exp(log_ratio) > 1.4).mean()
    assert_allclose(metric["ratios/clip_fraction"], clipped)
    assert_allclose(metric["ratios/max"], jnp.exp(log_ratio).max(), rtol=1e-4)

    def check(name, reward, gamma, low, high):
        net = q_network(NORMAL, name)
        out = (net.apply(params[name], obs) * jax.nn.one_hot(rows.action, 2)).sum(-1)
        probs = jax.nn.softmax(next_pi.logits)
        after = (probs * bpo.symexp(net.apply(params[name], next_obs))).sum(-1)
        target = reward + gamma * jnp.where(rows.terminated, 0.0, after)
        target = jnp.clip(target, low / (1 - gamma), high / (1 - gamma))
        expected = ((out - bpo.symlog(target)) ** 2).mean()
        assert_allclose(metric[f"losses/{name}_loss"], expected, rtol=1e-3)
        return bpo.symexp(out)

    q = check("q", reward, 0.9, *(0.5 * states[1].reward_range))
    assert 0.05 < metric["health/q_target_clip_fraction"] < 0.95
    q = jnp.clip(q, *(0.5 * states[1].reward_range / 0.1))
    r_hat = 2 * reward * q - reward**2
    assert_allclose(states[1].r_hat_max, jnp.maximum(r_hat.max() / 0.25, 1e-8), rtol=1e-4)
    check("qhat", r_hat, 0.81, 1e-8, 0.25 * states[1].r_hat_max)
