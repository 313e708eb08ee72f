"""What every update does on its way: schedules, clipping, statistics, and its switches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_bpo_update import CHAIN, FROZEN, actor_of, q_network, run, shifted
from tiny import run_update

import envs
from algos import bpo, common, ppo

ONE_STEP = {"num_epochs": 1, "num_minibatches": 1}
SKELETON = ["ppo", "bpo", "p3o", "reppo", "reppo_discrete"]  # the files derived from ppo.py


def config_of(name, **changes):
    return tiny.config_of(
        name, **(({"replay_ratio": 0.0} if name == "p3o" else ONE_STEP) | changes)
    )


def changes_of(after, before):
    """Leaves of the policy's parameters after an update minus those before it."""
    part = lambda state: state.params.get("actor", state.params)  # p3o has one network
    return jax.tree.map(jnp.subtract, part(after), part(before))


@pytest.mark.parametrize("name", SKELETON)
def test_annealing_shortens_the_steps_and_a_rollout_starts_from_refreshed_environments(name):
    config = config_of(name, anneal_lr=True, total_timesteps=6 * 32)
    env = tiny.module_of(name).make_env(config)
    mark = lambda key, state: state.replace(episode_return=state.episode_return + 1000.0)
    algo = tiny.module_of(name).build(config, env._replace(refresh=mark))
    update = jax.jit(algo.update)
    before = jax.jit(algo.init)(jax.random.key(0))
    first, half, late = (update(before._replace(update=jnp.int32(u)))[0] for u in (0, 3, 9))
    tiny.assert_close(
        changes_of(half, before),
        jax.tree.map(lambda x: 0.5 * x, changes_of(first, before)),
        rtol=1e-2,
        atol=1e-6,
    )
    assert (first.env_state.episode_return > 900.0).any()
    moved = jax.tree.leaves(changes_of(late, before))  # in an update after the last one
    assert not any(jnp.any(x) for x in moved)


@pytest.mark.parametrize("name", ["ppo", "bpo", "reppo", "reppo_discrete"])
def test_the_first_gradient_is_as_long_as_the_clip(name):
    _, after, _ = run_update(name, **ONE_STEP, max_grad_norm=1e-3)
    adam = after.opt_state["critic"][1]
    assert optax.global_norm(adam.mu) == pytest.approx(0.1 * 1e-3, rel=1e-3)
    root = jax.tree.map(jnp.sqrt, adam.nu)
    assert optax.global_norm(root) == pytest.approx(0.001**0.5 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["ppo", "bpo"])
def test_the_first_moments_are_those_of_the_weighted_value_loss(name):
    """A critic of 0 whose targets are 1, the reward: its last bias has a gradient of -2 vf_coef."""
    plain = {"symlog_targets": False} if name == "bpo" else {}
    changes = {"gamma": 0.0, "max_grad_norm": 1e6, "vf_coef": 0.3, "normalize_reward": False}
    algo = tiny.build(name, config_of(name, **changes, **plain))
    state = jax.jit(algo.init)(jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, state.params["critic"])
    after, _ = jax.jit(algo.update)(state._replace(params=state.params | {"critic": zero}))
    adam = after.opt_state["critic"][1]
    mean, square = (x["params"]["Dense_0"]["bias"] for x in (adam.mu, adam.nu))
    np.testing.assert_allclose(mean, 0.1 * -2.0 * 0.3, rtol=1e-5)
    np.testing.assert_allclose(square, 0.001 * (2.0 * 0.3) ** 2, rtol=1e-5)


@pytest.mark.parametrize("name", [x for x in tiny.ALGOS if x not in ("bcq", "brac", "bc")])
def test_a_policy_reads_observations_by_its_statistics(name):
    """Where they have another mean, equally shifted observations get the same actions."""
    config = tiny.config_of(name)
    env = tiny.module_of(name).make_env(config)
    algo = tiny.module_of(name).build(config, env)
    policy = jax.jit(lambda key: algo.policy_of(algo.init(key)))(jax.random.key(0))
    stats = common.Stats.empty((env.obs_size,))
    plain = policy | {"obs_stats": stats}
    moved = policy | {"obs_stats": stats._replace(mean=stats.mean + 5.0)}
    obs = jax.random.normal(jax.random.key(1), (64, env.obs_size))
    act = jax.jit(lambda policy, obs: algo.act(policy, obs, jax.random.key(2), True))
    np.testing.assert_allclose(act(moved, obs + 5.0), act(plain, obs), atol=1e-5)
    assert (act(moved, obs) != act(plain, obs)).any()


@pytest.mark.parametrize("module", [ppo, bpo], ids=["ppo", "bpo"])
def test_advantages_are_standardised_in_each_minibatch(module, monkeypatch):
    original = module.policy_loss

    def spy(log_prob, old_log_prob, advantage, clip_eps):
        loss, aux = original(log_prob, old_log_prob, advantage, clip_eps)
        return loss, aux | {"losses/mean": advantage.mean(), "losses/std": advantage.std()}

    monkeypatch.setattr(module, "policy_loss", spy)
    name = module.__name__.split(".")[1]
    algo = tiny.build(name, tiny.config_of(name))
    run = jax.jit(lambda key: algo.update(algo.init(key))[1])
    metrics = run(jax.random.key(0))
    assert metrics["losses/mean"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["losses/std"] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("name", ["ppo", "reppo", "reppo_discrete"])
def test_minibatches_are_shuffled(name):
    """Without steps, a second epoch has other minibatches of the same rollout."""
    changes = {"learning_rate": 0.0, "num_minibatches": 4}
    once, twice = (run_update(name, num_epochs=n, **changes)[2] for n in (1, 2))
    mean = "losses/value_loss" if name == "ppo" else "losses/value_error"
    assert twice[mean] == pytest.approx(once[mean], rel=1e-4)
    ratio = twice["losses/critic_grad_norm"] / once["losses/critic_grad_norm"]
    assert abs(ratio - 1.0) > 1e-4


@pytest.mark.parametrize("name", ["ppo", "bpo"])
def test_minibatches_are_of_rows_or_of_transitions(name):
    changes = {"learning_rate": 0.0, "num_minibatches": 4}
    norms = [
        run_update(name, shuffle=unit, **ONE_STEP | changes)[2]["losses/critic_grad_norm"]
        for unit in ("rows", "transitions")
    ]
    assert abs(norms[0] / norms[1] - 1.0) > 1e-4


@pytest.mark.parametrize("name", tiny.ALGOS)
def test_an_optimiser_may_see_the_parameters(name, monkeypatch):
    kind = "scale_by_rms" if name == "p3o" else "scale_by_adam"
    scale, decay = getattr(optax, kind), optax.add_decayed_weights(0.1)
    chained = lambda *args, **kwargs: optax.chain(scale(*args, **kwargs), decay)
    monkeypatch.setattr(optax, kind, chained)
    algo = tiny.build(name, tiny.config_of(name))
    shared, own = algo.data(np.array([0]))
    data = *shared, *jax.tree.map(lambda x: x[0], own)
    state = jax.eval_shape(algo.init, jax.random.key(0))
    assert jax.eval_shape(algo.update, state, *data)[0].opt_state == state.opt_state


@pytest.mark.parametrize("name", [*SKELETON, "sac"])
def test_each_environment_has_noise_of_its_own(name):
    """All see the same; `env_nan` counts the actions that are those of the first environment."""
    kind = "tiny:counter_discrete" if name == "reppo_discrete" else "tiny:counter"
    env = envs.make(kind, 4, stagger=False)

    def step(key, state, action):
        *rest, info = env.step(key, state, action)
        same = (action == action[:1]).reshape(4, -1).all(1)
        return *rest, info | {"env_nan": same}

    algo = tiny.module_of(name).build(tiny.config_of(name, env=kind), env._replace(step=step))
    metrics = jax.jit(lambda key: algo.update(algo.init(key))[1])(jax.random.key(0))
    assert 8 <= metrics["health/env_nan"] < 32


# --- bpo ---


def test_bpos_centred_moment_is_that_of_q_and_qhat():
    config = replace(CHAIN, mu_loss="centred")
    change = lambda state: shifted("mu")(shifted("q")(shifted("qhat", 1.0)(state)))
    (_, after), [metrics] = run(config, 1, change, **FROZEN)
    obs, params = after.replay.obs.reshape(-1, 4), after.params
    q, qhat = (bpo.symexp(q_network(config, x).apply(params[x], obs)) for x in ("q", "qhat"))
    gamma = 0.9  # that of `run`
    q = jnp.clip(q, *(after.reward_range / (1 - gamma)))
    qhat = jnp.clip(qhat, 1e-8 / (1 - gamma**2), after.r_hat_max / (1 - gamma**2))
    value = bpo.Critic(config, (4,)).apply(params["critic"], obs)[:, None]
    moment = jnp.maximum(jnp.maximum(qhat, 1e-6) - 2 * value * q + value**2, 1e-6)
    logits = [actor_of(config).apply(params[x], obs).logits for x in ("actor", "mu")]
    log_pi, log_mu = map(jax.nn.log_softmax, logits)
    target = jax.nn.softmax(log_pi + 0.5 * jnp.log(moment))
    expected = -(target * log_mu).sum(-1).mean()
    assert metrics["losses/mu_loss"] == pytest.approx(expected, rel=1e-4)


def test_bpos_entropy_bonus_raises_the_entropy_of_mu():
    entropies = []
    for ent_coef in (0.0, 10.0):
        _, after, _ = run_update("bpo", ent_coef=ent_coef)
        actor = bpo.Actor(tiny.config_of("bpo"), (4,), 2, True)
        obs = jax.random.normal(jax.random.key(0), (64, 4))
        entropies.append(actor.apply(after.params["mu"], obs).entropy().mean())
    assert entropies[1] > entropies[0]


@pytest.mark.parametrize("clip_traj", [False, True])
def test_bpos_estimator_is_that_of_its_switch(clip_traj, monkeypatch):
    used = []
    for name in ("step_estimator", "trajectory_estimator"):
        function = getattr(bpo, name)
        spy = lambda *args, name=name, function=function: used.append(name) or function(*args)
        monkeypatch.setattr(bpo, name, spy)
    algo = tiny.build("bpo", tiny.config_of("bpo", clip_traj=clip_traj))
    state = jax.eval_shape(algo.init, jax.random.key(0))
    jax.eval_shape(algo.update, state)
    assert used == ["trajectory_estimator" if clip_traj else "step_estimator"]


def test_bpos_annealed_clip_range_is_half_of_the_first_one_half_way():
    common_changes = {"total_timesteps": 6 * 32, "anneal_lr": False, "learning_rate": 0.02}
    found = []
    for changes in ({"anneal_clip": True, "clip_eps": 0.2}, {"clip_eps": 0.1}):
        algo = tiny.build("bpo", tiny.config_of("bpo", num_epochs=4, **common_changes, **changes))
        run = jax.jit(
            lambda key, algo=algo: algo.update(algo.init(key)._replace(update=jnp.int32(3)))
        )
        after, metrics = run(jax.random.key(0))
        found.append(after.params["actor"])
    tiny.assert_close(*found)
    assert metrics["losses/clip_fraction"] > 0.05


# --- reppo ---


def test_reppos_multipliers_have_a_rate_of_their_own():
    moved = []
    for mult in (1.0, 3.0):
        before, after, _ = run_update("reppo", **ONE_STEP, dual_lr_mult=mult)
        duals = [state.params["actor"]["duals"] for state in (after, before)]
        moved.append(jax.tree.map(jnp.subtract, *duals))
    tiny.assert_close(moved[1], jax.tree.map(lambda x: 3.0 * x, moved[0]), rtol=1e-3, atol=1e-7)


def test_reppos_entropy_target_is_for_each_dimension():
    """Its target is between once and twice the entropy per dimension, of which there are two."""
    changes = {"env": "tiny:seek", **ONE_STEP}
    entropy = run_update("reppo", **changes)[2]["losses/entropy"]
    before, after, _ = run_update("reppo", **changes, target_entropy_mult=-float(entropy) / 1.5)
    logs = [state.params["actor"]["duals"]["temperature"] for state in (before, after)]
    assert (logs[1] > logs[0]) == (entropy > 0)  # the target is 4 / 3 of the entropy


def test_reppos_auxiliary_loss_has_its_weight():
    metrics = run_update("reppo", **ONE_STEP, critic_loss="mse", aux_loss_mult=0.25)[2]
    expected = metrics["losses/value_error"] + 0.25 * metrics["losses/aux_loss"]
    assert metrics["losses/aux_loss"] > 0.0
    assert metrics["losses/qf_loss"] == pytest.approx(expected, rel=1e-4)
