"""The diagnosis of a BNPO run, on states that are made by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_experiments import write_run

from algos import bnpo
from algos.launch import rundir
from experiments import diagnose_bnpo

pytestmark = pytest.mark.xdist_group("test_diagnose_bnpo")  # one worker makes the fixtures

CONFIG = tiny.config_of("bnpo", hidden=(16,))
NUM_ENVS, NUM_ROWS = 20, 60
NO_NOISE = jnp.zeros((4, 16)), jnp.zeros((16, 2))


@pytest.fixture(scope="module")
def diagnose():
    return jax.jit(diagnose_bnpo.make_diagnose(CONFIG, NUM_ENVS, NUM_ROWS))


@pytest.fixture(scope="module")
def state():
    """Large weights, no parameter noise, target networks equal to the others, a filled replay."""
    algo = tiny.build("bnpo", CONFIG)
    fresh = jax.jit(algo.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: 3.0 * x, fresh.params)
    targets = targets_of(params)
    state = jax.jit(algo.update)(fresh._replace(params=params, target_params=targets))[0]
    no_noise = jax.tree.map(jnp.zeros_like, state.noise)
    return state._replace(params=params, target_params=targets, noise=no_noise)


def targets_of(params):
    """Target networks equal to these."""
    return {"actor0": params["actor"], "actor1": params["actor"], "critic": params["critic"]}


def measure(diagnose, state):
    return {name: float(x) for name, x in diagnose(state, jax.random.key(1)).items()}


def test_what_equals_its_target_is_at_no_distance(diagnose, state):
    found = measure(diagnose, state)
    for name in ("critic - target", "|critic - target|", "KL of the actor from target 1"):
        assert found[f"value/{name}"] == pytest.approx(0.0, abs=1e-5)
    for way in ("greedy", "greedy, another's goal", "sampled", "sampled, least of 20"):
        same = {found[f"return/{name}, {way}"] for name in ("explorer", "target 0", "target 1")}
        assert len(same) == 1
    assert found["return/target 0, greedy"] != found["return/target 0, sampled"]
    assert found["value/std of the critic"] > 0.0


def test_what_differs_from_its_target_is_found(diagnose, state):
    moved = jax.tree.map(lambda x: x, state.params)
    moved["critic"]["params"]["Dense_3"]["bias"] += jnp.array([0.5, -2.0])
    moved["actor"]["params"]["log_std"] += 0.3
    noise = jax.tree.map(lambda x: x + 100.0, state.noise)
    found = measure(diagnose, state._replace(params=moved, noise=noise))
    assert found["value/critic - target"] == pytest.approx(-1.5, abs=1e-4)
    assert found["value/|critic - target|"] == pytest.approx(1.5, abs=1e-4)
    log_std = np.tanh(0.3)  # from 0, of two actions
    kl = 2.0 * (0.5 * np.exp(2.0 * log_std) - log_std - 0.5)
    assert found["value/KL of the actor from target 0"] == pytest.approx(kl, rel=1e-4)
    assert found["return/explorer, greedy"] != found["return/target 0, greedy"]


def test_only_a_policy_that_reads_its_goal_notices_another(diagnose, state):
    found = measure(diagnose, state)
    assert found["return/target 0, greedy"] != found["return/target 0, greedy, another's goal"]
    blind = jax.tree.map(lambda x: x, state.params)
    blind["actor"]["params"]["kernel_0"] = blind["actor"]["params"]["kernel_0"].at[3:].set(0.0)
    found = measure(diagnose, state._replace(params=blind, target_params=targets_of(blind)))
    for name in ("explorer", "target 0", "target 1"):
        assert found[f"return/{name}, greedy"] == found[f"return/{name}, greedy, another's goal"]


def circling():
    """`seek` with a goal on a circle: both parts always pay 1, the task from 90 to 135 degrees."""

    def compute_reward(achieved, goal, kind):
        degrees = jnp.degrees(jnp.arctan2(goal[..., 0], goal[..., 2])) % 360.0
        inside = (degrees >= 90.0) & (degrees < 135.0)
        return 1.0 * inside[..., None] if kind == "env" else jnp.ones((*degrees.shape, 2))

    def desired_goal(obs):
        radians = 50.0 * obs[..., 0]
        return jnp.stack([jnp.sin(radians), radians, jnp.cos(radians)], -1)

    raw, as_it_is = tiny.seek(), lambda obs, goal: obs
    changes = {"compute_reward": compute_reward, "desired_goal": desired_goal}
    return raw._replace(goals=raw.goals._replace(with_goal=as_it_is, **changes))


def test_monte_carlo_and_circle(state):
    config = dataclasses.replace(CONFIG, env="test_diagnose_bnpo:circling")
    found = measure(jax.jit(diagnose_bnpo.make_diagnose(config, NUM_ENVS, NUM_ROWS)), state)
    left = config.num_steps + diagnose_bnpo.TAIL - np.arange(config.num_steps)
    expected = 2.0 * ((1.0 - config.gamma**left) / (1.0 - config.gamma)).mean()
    assert found["value/Monte Carlo"] == pytest.approx(expected, rel=1e-4)
    for k in range(8):
        name = f"circle/{45 * k:03} to {45 * k + 45:03} degrees"
        assert found[f"{name}, paid by the task"] == (k == 2)
        assert found[f"{name}, reward learned from"] == pytest.approx(2.0)


def counting():
    """`seek` with a time limit of 5 steps, whose reward is the number of the step."""
    raw = tiny.seek()

    def reset(key):
        obs, state = raw.reset(key)
        return obs.at[1].set(0.0), (state, jnp.float32(0.0))

    def step(key, state, action):
        obs, inner, reward, _, info = raw.step(key, state[0], action)
        t = state[1] + 1.0
        return obs.at[1].set(t), (inner, t), reward, False, info

    def compute_reward(achieved, goal, kind):
        return jnp.concatenate([achieved, 0.0 * goal], -1)

    goals = raw.goals._replace(compute_reward=compute_reward)
    return raw._replace(reset=reset, step=step, goals=goals, max_steps=5)


def test_monte_carlo_stays_in_one_episode(state):
    config = dataclasses.replace(CONFIG, env="test_diagnose_bnpo:counting")
    found = measure(jax.jit(diagnose_bnpo.make_diagnose(config, NUM_ENVS, NUM_ROWS)), state)
    reward = np.arange(1.0, config.num_steps + diagnose_bnpo.TAIL + 1.0)
    returns = [reward[t:] @ config.gamma ** np.arange(len(reward) - t) for t in range(len(reward))]
    expected = np.mean(returns[: config.num_steps])
    assert found["value/Monte Carlo"] == pytest.approx(expected, rel=1e-4)


def test_the_ratio_is_reduced_as_in_the_run(state):
    """Of 1.15 in each of two dimensions: their mean is within the clip range, their product not."""
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1, :1, :1], x.shape), state.replay)
    inputs = bnpo.normalize(state.obs_stats, same.obs[0, 0, 0])
    policy = bnpo.Actor(CONFIG, 2).apply(state.params["actor"], inputs, NO_NOISE)
    # log pi(a) - log b(a) of the mean a is half the squared distance of the means, in stds.
    moved = policy._replace(
        mean=policy.mean + jnp.sqrt(2.0 * jnp.log(1.15)) * jnp.exp(policy.log_std)
    )
    wide = lambda x, like: jnp.broadcast_to(x, like.shape)
    replay = same._replace(
        policy=jax.tree.map(wide, moved, same.policy),
        action=wide(policy.mean + 1e-3, same.action),
        reward=jnp.full_like(same.reward, 1000.0),
    )
    state, found = state._replace(replay=replay), []
    for reduce in ("mean", "sum"):
        config = dataclasses.replace(CONFIG, ratio_reduce=reduce)
        diagnose = jax.jit(diagnose_bnpo.make_diagnose(config, NUM_ENVS, NUM_ROWS))
        found.append(measure(diagnose, state)["cosine/PPO, PPO"])
    assert found[0] == pytest.approx(1.0, abs=1e-3)
    assert np.isnan(found[1])  # the gradient is 0


def test_monte_carlo_samples(diagnose, state):
    """Rewards change if only the std does."""
    found = []
    for log_std in (-3.0, 3.0):
        actor = state.params["actor"]["params"]
        actor = {"params": actor | {"log_std": jnp.full_like(actor["log_std"], log_std)}}
        targets = targets_of(state.params | {"actor": actor})
        found.append(measure(diagnose, state._replace(target_params=targets)))
    assert found[0]["value/Monte Carlo"] != found[1]["value/Monte Carlo"]
    assert found[0]["return/target 0, greedy"] == found[1]["return/target 0, greedy"]


def test_rewards_are_compared_before_and_after_a_shift(diagnose, state):
    """Nothing that is stored was rewarded; every other goal of an episode would have been."""
    obs = jnp.zeros_like(state.replay.obs)
    replay = state.replay._replace(obs=obs, reward=jnp.zeros_like(state.replay.reward))
    found = measure(diagnose, state._replace(replay=replay))
    assert (found["rewarded/own goal"], found["rewarded/shifted goal"]) == (0.0, 1.0)
    assert (found["rewarded/paid by the task"], found["rewarded/and paid by the task"]) == (
        1.0,
        0.0,
    )


def test_a_shift_takes_goals_of_other_times(diagnose, state):
    """The goal alternates and is achieved at each step: it is not at every second other one."""
    goal = jnp.where(jnp.arange(CONFIG.num_steps + 1) % 2, 0.35, -0.35)
    obs = state.replay.obs.at[..., 1].set(goal).at[..., 3].set(goal)
    found = measure(diagnose, state._replace(replay=state.replay._replace(obs=obs)))
    assert 0.25 < found["rewarded/shifted goal"] < 0.75


def test_ddpg_does_not_look_at_actions(diagnose, state):
    found = measure(diagnose, state)
    replay = state.replay._replace(action=state.replay.action[::-1] - 1.0)
    other = measure(diagnose, state._replace(replay=replay))
    assert other["cosine/DDPG, DDPG"] == pytest.approx(found["cosine/DDPG, DDPG"], abs=1e-5)
    assert other["cosine/PPO, PPO"] != pytest.approx(found["cosine/PPO, PPO"], abs=1e-3)


@pytest.mark.parametrize("reward", [1000.0, -1000.0])
def test_gradients_of_equal_rows(diagnose, state, reward):
    """Halves agree. PPO goes towards an action that was good, DDPG to where Q rises."""
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1, :1, :1], x.shape), state.replay)
    inputs = bnpo.normalize(state.obs_stats, same.obs[0, 0, 0])
    tree = state.params["actor"]["params"]
    policy_of = lambda weights: bnpo.Actor(CONFIG, 2).apply({"params": weights}, inputs, NO_NOISE)

    def q_of(weights):
        policy = policy_of(weights)
        return bnpo.Critic(CONFIG, 2).apply(state.params["critic"], inputs, policy).sum()

    behaviour = jax.tree.map(
        lambda x, y: jnp.broadcast_to(x, y.shape), policy_of(tree), same.policy
    )
    replay = same._replace(policy=behaviour, reward=jnp.full_like(same.reward, reward))
    found = measure(diagnose, state._replace(replay=replay))
    assert found["cosine/PPO, PPO"] == pytest.approx(1.0, abs=1e-3)
    assert found["cosine/DDPG, DDPG"] == pytest.approx(1.0, abs=1e-3)
    slopes = (
        jax.grad(lambda weights: policy_of(weights).log_prob(same.action[0, 0, 0]))(tree),
        jax.grad(q_of)(tree),
    )
    x, y = (np.concatenate([np.ravel(g[f"kernel_{i}"]) for i in range(2)]) for g in slopes)
    expected = np.sign(reward) * (x @ y) / np.linalg.norm(x) / np.linalg.norm(y)
    assert found["cosine/PPO, DDPG"] == pytest.approx(expected, abs=1e-3)


def write_bnpo(path, config, labels=("",)):
    """A run directory of two seeds without checkpoints."""
    run = write_run(path, seeds=(0, 1), labels=labels)
    saved = rundir.read_description(run)
    rundir.write_json(
        run / "config.json", saved | {"algo": "bnpo", "config": dataclasses.asdict(config)}
    )
    return run


def test_a_run_is_read_and_reported(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(CONFIG, env="arm/reacher-static")
    run = write_bnpo(tmp_path / "run", config)
    algo = tiny.build("bnpo", config)
    state = jax.jit(jax.vmap(algo.init))(jax.random.split(jax.random.key(3), 2))
    state = state._replace(update=np.int32(7))
    rundir.save_checkpoint(run, rundir.flatten(state), {"update": 7})

    def make_diagnose(given, num_envs, num_rows):
        assert (given, num_envs, num_rows) == (config, 40, 10)
        return lambda state, key: {
            "x": state.params["actor"]["params"]["kernel_0"][0, 0] + state.update
        }

    monkeypatch.setattr(diagnose_bnpo, "make_diagnose", make_diagnose)
    out = tmp_path / "new" / "found"
    flags = ["--run-dir", str(run), "--out", str(out), "--num-envs", "40", "--num-rows", "10"]
    diagnose_bnpo.main(flags)
    expected = 7 + np.asarray(state.params["actor"]["params"]["kernel_0"])[:, 0, 0]
    saved = json.loads(out.with_suffix(".json").read_text())
    assert saved["seeds"]["x"] == pytest.approx(list(expected))
    table = out.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out
    assert f"| x | {expected.mean():.3g} [" in table
    with pytest.raises(SystemExit):
        diagnose_bnpo.main(flags)
    assert "found.md exists: choose another name, or --force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "labels", "flags", "message"),
    [
        ({}, ("",), [], "is not a run of algos/bnpo.py on the arm"),
        ({"env": "arm/reacher-static"}, ("lr 1", "lr 2"), [], "without a sweep"),
        ({"env": "arm/reacher-static", "critic_input": "action"}, ("",), [], "takes the action"),
        ({"env": "arm/reacher-static"}, ("",), [], "has no checkpoint: train it again"),
        ({}, ("",), ["--num-envs", "30"], "--num-envs 30: a multiple of 20 is needed"),
        ({}, ("",), ["--num-rows", "7"], "--num-rows 7: an even number is needed"),
        ({}, ("",), ["--out", "."], "PosixPath('.') has an empty name"),
    ],
)
def test_what_cannot_be_diagnosed_is_one_line(tmp_path, capsys, changes, labels, flags, message):
    run = write_bnpo(tmp_path / "run", dataclasses.replace(CONFIG, **changes), labels)
    with pytest.raises(SystemExit):
        diagnose_bnpo.main(["--run-dir", str(run), "--out", str(tmp_path / "out"), *flags])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))
