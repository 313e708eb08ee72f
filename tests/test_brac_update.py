"""Behaviour regularised actor-critic: what its critic of a divergence learns, gradient steps by
hand, a bandit, sweeps with clones.
"""

import dataclasses
import json
import math
import re
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from algos import brac, launch

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_brac_update")

assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
config_of = partial(tiny.config_of, "brac")
CLONED = {"divergence": "kl", "behavior": "clones"}


# --- the critic of a divergence ---


def test_divergence_loss_by_hand():
    """g = a between the points 0.4 and -0.3: the bound 0.7, and a slope of 1 costs nothing."""
    own, given, weight = jnp.full((3, 1), 0.4), jnp.full((3, 1), -0.3), jnp.full((3, 1), 0.5)
    loss = lambda scale: brac.divergence_loss(
        "wasserstein", lambda action: scale * action[:, 0], own, given, weight
    )
    assert_close(loss(1.0), (-0.7, 0.0))
    assert_close(loss(3.0), (20.0 - 2.1, 20.0), rtol=1e-4)


@pytest.mark.parametrize("penalised", [False, True])
def test_a_trained_critic_gives_the_divergence(penalised):
    """KL(N(0.5, 1) || N(0, 1)) = 0.125; it is not exceeded under the penalty on slopes."""
    network, optimizer = brac.MLP((32,), 1), optax.adam(3e-3)
    critic_of = lambda params: lambda action: network.apply(params, action)[:, 0]
    draws = lambda key, n: jax.random.normal(key, (2, n, 1)) + jnp.array([0.5, 0.0])[:, None, None]

    def step(carry, key):
        params, opt_state = carry
        key_draw, key_between = jax.random.split(key)
        own, given = draws(key_draw, 512)
        weight = jax.random.uniform(key_between, (512, 1))

        def loss_fn(params):
            loss, penalty = brac.divergence_loss("dual_kl", critic_of(params), own, given, weight)
            return loss if penalised else loss - penalty

        direction, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
        return (optax.apply_updates(params, direction), opt_state), None

    @jax.jit
    def bound(key):
        key_init, key_steps, key = jax.random.split(key, 3)
        params = network.init(key_init, jnp.zeros((1, 1)))
        keys = jax.random.split(key_steps, 600)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        own, given = map(critic_of(params), draws(key, 200_000))
        return brac.dual_divergence("dual_kl", own, given).mean()

    low, high = (0.105, 0.145) if not penalised else (0.05, 0.145)
    assert low < bound(jax.random.key(0)) < high


# --- gradient steps ---

RATES = {"critic": 1e-2, "actor": 3e-3, "divergence": 1e-2, "alpha": 2e-2, "temperature": 2e-2}
BY_HAND = config_of(
    critic_lr=1e-2, learning_rate=3e-3, multiplier_lr=2e-2, polyak_tau=0.3, gamma=0.9,
    gradient_steps=3, divergence_steps=2, warm_start=0, batch_size=8, alpha=0.7, value_penalty=0.6,
    temperature=0.3, min_weight=0.75, target_entropy_mult=0.7, target_divergence=0.05,
    train_alpha=True, train_temperature=True,
)  # fmt: skip


def rows_of(seed=0, n=64):
    dataset = tiny.transitions(n, seed=seed)
    columns = dataset._asdict() | {"clone": None}
    return brac.Batch(*(jax.tree.map(jnp.asarray, columns[name]) for name in brac.Batch._fields))


def actor_of(config, seed):
    """Parameters of a policy that is nobody's."""
    return brac.Actor(config, 1).init(jax.random.key(seed), jnp.zeros((1, 4)))


def scaled(tree, by):
    return jax.tree.map(lambda x: by * x, tree)


def by_hand(config, state, rows, clone):
    """Parameters and target critics after an update, from the formulas of the docstring."""
    actor, dual = brac.Actor(config, 1), brac.Critic(config, 1)
    critic = brac.Critic(config, config.num_critics)
    adam = {name: optax.adam(RATES[name], eps=1e-7) for name in state.opt_state}
    mixed = lambda q: 0.75 * reduce(jnp.minimum, q) + 0.25 * reduce(jnp.maximum, q)

    def density(policy, u):
        z = (u - policy.mean) / policy.std
        log_normal = -0.5 * z**2 - jnp.log(policy.std) - 0.5 * math.log(2 * math.pi)
        return (log_normal - jnp.log(1 - jnp.tanh(u) ** 2)).sum(-1)

    def drawn(params, obs, key):
        policy = actor.apply(params, obs)
        u = policy.mean + policy.std * jax.random.normal(key, policy.mean.shape)
        return policy, u, density(policy, u)

    def divergence(params, policy, u, obs, action, key):
        if config.divergence == "dual_kl":
            h = lambda a: jnp.log1p(jnp.exp(dual.apply(params["divergence"], obs, a)[0]))
            return jnp.log(h(jnp.tanh(u)) + 1e-8) + 1 - h(action)
        noise = jax.random.normal(jax.random.split(key)[0], (4, *u.shape))
        own = policy.mean + policy.std * noise
        clipped = jnp.arctanh(jnp.clip(jnp.tanh(own), -0.999, 0.999))
        return (density(policy, own) - density(actor.apply(clone, obs), clipped)).mean(0)

    def critic_loss(p, params, target, batch, t, key):
        key_draw, key = jax.random.split(key)
        policy, u, log_prob = drawn(params["actor"], batch.next_obs, key_draw)
        d = divergence(params, policy, u, batch.next_obs, batch.next_action, key)
        v = mixed(critic.apply(target, batch.next_obs, jnp.tanh(u)))
        v += -params["temperature"] * log_prob - 0.6 * params["alpha"] * d
        y = batch.reward + jnp.where(batch.terminated, 0.0, 0.9 * v)
        q = critic.apply(p, batch.obs, batch.action)
        return sum(((q_i - y) ** 2).mean() for q_i in q)

    def policy_loss(p, params, target, batch, t, key):
        key_draw, key = jax.random.split(key)
        policy, u, log_prob = drawn(p, batch.obs, key_draw)
        d = divergence(params, policy, u, batch.obs, batch.action, key)
        q = mixed(critic.apply(params["critic"], batch.obs, jnp.tanh(u)))
        seen = jnp.where(t > 0, q, 0.0)
        return (params["temperature"] * log_prob + params["alpha"] * d - seen).mean()

    def divergence_loss(p, params, target, batch, t, key):
        key_draw, key = jax.random.split(key)
        policy, u, _ = drawn(params["actor"], batch.obs, key_draw)
        d = divergence({"divergence": p}, policy, u, batch.obs, batch.action, None).mean()
        share, own = jax.random.uniform(key, (8, 1)), jnp.tanh(u)
        slope = jax.vmap(jax.grad(lambda a, obs: dual.apply(p, obs, a)[0]))(
            (1 - share) * own + share * batch.action, batch.obs
        )
        return 5 * (jnp.maximum(jnp.abs(slope[:, 0]) - 1, 0) ** 2).mean() - d

    def alpha_loss(p, params, target, batch, t, key):
        key_draw, key = jax.random.split(key)
        policy, u, _ = drawn(params["actor"], batch.obs, key_draw)
        return -p * (divergence(params, policy, u, batch.obs, batch.action, key) - 0.05).mean()

    def temperature_loss(p, params, target, batch, t, key):
        return p * (-drawn(params["actor"], batch.obs, key)[2] + 0.7).mean()

    losses = [critic_loss, policy_loss, divergence_loss, alpha_loss, temperature_loss]

    @jax.jit
    def step(params, target, opt, batches, t, key):
        target = jax.tree.map(lambda t, p: 0.7 * t + 0.3 * p, target, params["critic"])
        keys = jax.random.split(key, 6)
        todo = [(name, *x, 0) for name, *x in zip(RATES, losses, keys, strict=False)]
        todo.append(("divergence", divergence_loss, jax.random.split(keys[5], 1)[0], 1))
        for name, loss, key, i in todo:
            if name in opt:
                batch = jax.tree.map(lambda x: x[i], batches)  # noqa: B023
                grads = jax.grad(loss)(params[name], params, target, batch, t, key)
                direction, moments = adam[name].update(grads, opt[name])
                params = params | {name: optax.apply_updates(params[name], direction)}
                opt = opt | {name: moments}
        return params, target, opt

    _, key_index, key_steps = jax.random.split(state.key, 3)
    shape = 3, 2 if "divergence" in state.params else 1, 8
    index = jax.random.randint(key_index, shape, 0, len(rows.obs))
    params, target = state.params, state.target_params["critic"]
    opt = {name: adam[name].init(params[name]) for name in adam}
    for t, key in enumerate(jax.random.split(key_steps, 3)):
        batches = jax.tree.map(lambda x: x[index[t]], rows)  # noqa: B023
        params, target, opt = step(params, target, opt, batches, t, key)
    return params, target


@pytest.mark.parametrize("changes", [{"num_critics": 3}, CLONED], ids=["dual_kl", "kl"])
def test_gradient_steps_by_hand(changes):
    """Three steps, the first of them warm: every draw, minibatch, parameter in its turn."""
    config = dataclasses.replace(BY_HAND, **changes)
    algo, rows = tiny.build("brac", config), rows_of()
    state = jax.jit(algo.init)(jax.random.key(0))
    # Target critics far from the critics, slopes above 1.
    state = state._replace(target_params=scaled(state.target_params, -2.0))
    if config.dual:
        state.params["divergence"] = scaled(state.params["divergence"], 3.0)
    clone = actor_of(config, 7) if config.cloned else None
    after, metrics = jax.jit(algo.update)(state, rows, clone)
    params, target = by_hand(config, state, rows, clone)
    if config.dual:
        assert metrics["losses/gradient_penalty"] > 0.1
    else:  # nothing of the clone is learned
        assert after.params.keys() == {"actor", "critic", "alpha", "temperature"}
    tiny.assert_close(after.params, params, rtol=1e-3, atol=1e-5)
    tiny.assert_close(after.target_params["critic"], target, rtol=1e-3, atol=1e-5)


def test_multipliers_start_where_they_are_told():
    state = tiny.build("brac", config_of(alpha=0.7, temperature=0.3)).init(jax.random.key(0))
    assert_close([state.params[name] for name in ("alpha", "temperature")], [0.7, 0.3])


def test_what_acts_is_the_online_policy():
    """max_q compares by the online critics; drawn actions are tanh of a Gaussian."""
    config, key = config_of(), jax.random.key(0)
    algo = tiny.build("brac", config)
    state = algo.init(jax.random.key(1))
    policy = algo.policy_of(state._replace(target_params=scaled(state.target_params, -2.0)))
    tiny.assert_same(policy, {name: state.params[name] for name in ("actor", "critic")})
    obs = jax.random.normal(jax.random.key(2), (50, 4))
    distribution = brac.Actor(config, 1).apply(state.params["actor"], obs)
    wanted = np.tanh(distribution.mean + distribution.std * jax.random.normal(key, (50, 1)))
    assert_close(algo.act(policy, obs, key, False), wanted)


@pytest.mark.parametrize("divergence", ["mmd", "wasserstein"])
def test_divergences_of_an_update(divergence):
    """Of one gradient step that changes nothing, from the same draws."""
    still = {"critic_lr": 0.0, "learning_rate": 0.0, "gradient_steps": 1, "divergence_steps": 1}
    config = config_of(
        divergence=divergence, behavior="clones" if divergence == "mmd" else "", **still
    )
    algo, rows = tiny.build("brac", config), rows_of()
    state, clone = algo.init(jax.random.key(0)), actor_of(config, 7)
    outside = {"temperature": jnp.float32(-0.3), "alpha": jnp.float32(600.0)}  # of their ranges
    wide = {"actor": scaled(state.params["actor"], 4.0)}  # some actions reach the bounds
    state = state._replace(params=state.params | outside | wide)
    _, metrics = jax.jit(algo.update)(state, rows, clone if config.cloned else None)
    _, key_index, key_steps = jax.random.split(state.key, 3)
    index = jax.random.randint(key_index, (1, 1, 16), 0, 64)[0, 0]
    obs, action = rows.obs[index], rows.action[index]
    keys = jax.random.split(jax.random.split(key_steps, 1)[0], 6)
    actor, normal = brac.Actor(config, 1), jax.random.normal
    policy = actor.apply(state.params["actor"], obs)
    draw = lambda policy, key, *draws: policy.mean + policy.std * normal(key, (*draws, 16, 1))
    key_draw, key_divergence = jax.random.split(keys[1])
    u = draw(policy, key_draw)
    saturated = (abs(np.tanh(u)) > 0.99).mean()
    assert 0.0 < saturated < 1.0
    assert_close(metrics["losses/saturated_fraction"], saturated)
    assert_close(metrics["losses/entropy"], -policy.log_prob(u).mean(), rtol=1e-4)
    values = lambda a: brac.Critic(config, 2).apply(state.params["critic"], obs, a)
    assert_close(metrics["losses/q_data"], values(action).mean(), rtol=1e-4)  # of both critics
    assert_close(metrics["losses/q_policy"], values(jnp.tanh(u)).mean(), rtol=1e-4)
    if divergence == "mmd":
        key_own, key_clone = jax.random.split(key_divergence)
        x = jnp.tanh(draw(policy, key_own, 4))
        y = jnp.tanh(draw(actor.apply(clone, obs), key_clone, 4))
        wanted = brac.squared_mmd(x, y)
    else:
        g = lambda a: brac.Critic(config, 1).apply(state.params["divergence"], obs, a)[0]
        wanted = g(jnp.tanh(u)) - g(action)
        own = jnp.tanh(draw(policy, jax.random.split(keys[2])[0]))
        bound = metrics["losses/gradient_penalty"] - metrics["losses/divergence_loss"]
        assert_close(bound, (g(own) - g(action)).mean(), rtol=1e-4)
    assert_close(metrics["losses/divergence"], wanted.mean(), rtol=1e-4)
    assert_close(metrics["losses/divergence_std"], wanted.std(), rtol=1e-4)
    assert_close(metrics["losses/policy_loss"], 500.0 * wanted.mean(), rtol=1e-4)  # warm
    assert_close([metrics["losses/temperature"], metrics["losses/alpha"]], [0.0, 500.0])


# --- a bandit ---


def test_alpha_goes_from_the_best_action_to_the_clone():
    """Reward -(a - 0.6)^2, one step; the clone is tanh of N(0, 0.5), as are the data."""
    config = config_of(
        **CLONED, env="probe/value-continuous", hidden=(), critic_hidden=(32,), batch_size=32,
        gradient_steps=1000, warm_start=200, critic_lr=1e-2, learning_rate=4e-3,
    )  # fmt: skip
    noise = np.random.default_rng(0).normal(size=(4000, 1))
    action, blind = jnp.float32(np.tanh(0.5 * noise)), jnp.zeros((4000, 1))
    ended = jnp.ones(4000, bool)
    rows = brac.Batch(blind, action, -((action[:, 0] - 0.6) ** 2), ended, blind, action)
    algo = tiny.build("brac", config)
    state = algo.init(jax.random.key(0))
    clone = jax.tree.map(jnp.zeros_like, state.params["actor"])
    raw = math.atanh((math.log(0.5) + 5) / 2.5 - 1)
    clone["params"]["Dense_0"]["bias"] = jnp.array([0.0, raw])

    @jax.jit
    @jax.vmap
    def trained(alpha):
        start = state._replace(params=state.params | {"alpha": alpha})
        learned, _ = algo.update(start, rows, clone)
        return brac.Actor(config, 1).apply(learned.params["actor"], jnp.zeros(1))

    policy = trained(jnp.array([1e-3, 0.1, 0.3, 1.0, 100.0]))
    mode = jnp.tanh(policy.mean[:, 0])
    assert_close(mode[0], 0.6, rtol=0, atol=0.08)
    assert_close(mode[-1], 0.0, rtol=0, atol=0.05)
    assert_close(policy.std[-1, 0], 0.5, rtol=0, atol=0.05)
    assert (jnp.diff(mode) < 0).all()


# --- sweeps with clones ---


def main(*argv):
    launch.main("brac", [*map(str, argv)])


def checkpoint(run_dir):
    """The state of all rows after the second update."""
    with np.load(run_dir / "checkpoints" / "000000002.npz") as file:
        return {name: file[name] for name in file.files if name != "__meta__"}


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("divergence", ["kl", pytest.param("mmd", marks=pytest.mark.slow)])
def test_a_sweep_with_clones_is_its_separate_runs(divergence, tmp_path, capsys):
    """50 gradient steps from the command line, resumed as well; with other clones it is refused."""
    run_dir, clones = tmp_path / "run", tiny.write_clones(tmp_path / "clones")
    config = config_of(
        divergence=divergence, behavior=str(clones), gradient_steps=25, total_timesteps=50,
        warm_start=10, alpha=7.0,
    )  # fmt: skip
    argv = ["--seed", 3, "--num-seeds", 2, "--num-evals", 2, "--eval-episodes", 2, "--verbose", 0]
    argv += ["--checkpoint-every", 1, "--run-dir", run_dir]
    sweep = ["--sweep", "alpha=0.5,3", "learning_rate=1e-3,1e-4", "value_penalty=0,1"]
    fields = ("alpha", "learning_rate", "value_penalty")
    main(*tiny.flags_of(config, swept=fields), *argv, *sweep)
    state, rows = checkpoint(run_dir), json.loads((run_dir / "config.json").read_text())["rows"]
    assert len(rows["seeds"]) == 16

    train = jax.jit(brac.make_train(config))
    for i, (seed, label) in enumerate(zip(rows["seeds"], rows["labels"], strict=True)):
        values = {k: jnp.float32(v) for k, v in re.findall("([a-z_]+)=([^ ]+)", label)}
        (data,), (clone,) = tiny.build("brac", config).data([seed])
        alone = train(jax.random.key(seed), values, data, tiny.row(clone, 0))["state"]
        for name, x in tiny.arrays(alone).items():
            swept = state[name][i] if x.ndim < state[name].ndim else state[name]
            np.testing.assert_allclose(swept, x, rtol=1e-3, atol=1e-4, err_msg=f"{label} {name}")

    (run_dir / "done.json").unlink()
    (run_dir / "checkpoints" / "000000002.npz").unlink()
    first, second = (clones / f"policy_s00{i}.npz" for i in (0, 1))
    kept, before = first.read_bytes(), (run_dir / "metrics.jsonl").read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(SystemExit):
        main("--resume", run_dir, "--verbose", 0)
    assert "the dataset or the clones are not those it learned from" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    first.write_bytes(kept)
    main("--resume", run_dir, "--verbose", 0)
    tiny.assert_same(checkpoint(run_dir), state)
    meta = json.loads((run_dir / "meta.json").read_text())
    assert [len(x) for x in meta["data"]] == [64, 64]
    assert meta["resumed"][0]["data"] == meta["data"]


@pytest.mark.parametrize("divergence", ["kl", "mmd"])
def test_no_key_is_used_twice_with_clones(divergence):
    config = config_of(divergence=divergence, behavior="clones", train_alpha=True,
                       target_divergence=0.1)  # fmt: skip
    train = jax.jit(brac.make_train(config))
    twice = lambda key: jax.random.normal(key) + jax.random.normal(key)
    with jax.debug_key_reuse(True):
        with pytest.raises(jax.errors.KeyReuseError):  # the checker sees what it should
            jax.jit(twice).trace(jax.random.key(0))
        traced = train.trace(jax.random.key(0), None, rows_of(), actor_of(config, 7))
    assert traced.out_info["state"].params  # the whole run was traced, with clones


def test_the_target_entropy_is_one_of_each_action():
    """Of two actions: Adam's first moment of the temperature has it, times 0.1."""
    columns = tiny.transitions(64, action_size=2)._asdict() | {"clone": None}
    rows = brac.Batch(*(jax.tree.map(jnp.asarray, columns[name]) for name in brac.Batch._fields))

    def moment(mult):
        changes = {"gradient_steps": 1, "train_temperature": True, "temperature": 0.5}
        config = tiny.config_of("brac", env="tiny:seek", target_entropy_mult=mult, **changes)
        algo = tiny.build("brac", config)
        state = jax.jit(algo.update)(algo.init(jax.random.key(0)), rows)[0]
        return state.opt_state["temperature"].mu

    np.testing.assert_allclose(moment(1.7) - moment(0.7), 0.1 * 2, rtol=1e-4)
