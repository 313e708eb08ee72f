"""Atari games: what ale-py's emulators become in the compiled program."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiments import write_run

import envs
from algos import bpo, launch, p3o, ppo, reppo_discrete
from algos.launch import rundir

gymnasium = pytest.importorskip("gymnasium")
ale = pytest.importorskip("ale_py.vector_env")
atari = pytest.importorskip("envs.atari")

N, T = 4, 600

pytestmark = pytest.mark.xdist_group("atari")


@pytest.fixture(scope="module")
def played():
    """Random actions in Breakout: what every step gave, leaves [T, N, ...], and the actions."""
    env = envs.make("atari/Breakout", N)
    actions = jax.random.randint(jax.random.key(1), (T, N), 0, env.action_size)

    def play(key):
        def step(carry, action):
            obs, state = carry
            new_obs, new_state, *rest = env.step(key, state, action)
            return (new_obs, new_state), (obs, state.fire, new_obs, *rest)

        return jax.lax.scan(step, env.reset(key), actions)[1]

    play = jax.jit(jax.vmap(play))  # as the launcher does with one seed
    first, second = (jax.device_get(play(jax.random.key(0)[None])) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    return jax.tree.map(lambda x: x[0], first), np.asarray(actions)


def test_observations_are_stacked_bytes(played):
    """What follows a step is the next observation, but at a game's end the last one seen."""
    (obs, _, new_obs, *_, info), _ = played
    assert new_obs.dtype == np.uint8
    final = np.where(info["returned"][..., None], obs, new_obs)
    np.testing.assert_array_equal(info["final_observation"], final)
    frames, new_frames = (x.reshape(T, N, 84, 84, 4) for x in (obs, new_obs))
    assert (new_frames[:, :, ..., -1] > 0).any()
    ended = played[0][-1]["returned"]
    np.testing.assert_array_equal(new_frames[~ended][..., :-1], frames[~ended][..., 1:])


def test_parity_with_ale(played):
    """The emulators played from Python, with the same seeds and actions."""
    (_, fire, new_obs, reward, terminated, truncated, _), actions = played
    theirs = ale.AtariVectorEnv(
        "breakout",
        N,
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
        life_loss_info=True,
        reward_clipping=False,
    )
    seeds = jax.random.randint(jax.random.key(0), (N,), 0, 2**31 - 1)
    theirs.reset(seed=np.asarray(seeds))
    for t in range(T):
        obs, score, term, trunc, _ = theirs.step(np.where(fire[t], 1, actions[t]))
        np.testing.assert_array_equal(new_obs[t], atari.flat(obs))
        np.testing.assert_array_equal(reward[t], np.sign(score))
        np.testing.assert_array_equal(terminated[t], term)
        np.testing.assert_array_equal(truncated[t], trunc)


def test_a_life_terminates_and_a_game_returns(played):
    """Five lives a game; the return is the score of all of them, the length their decisions."""
    (_, fire, _, reward, terminated, truncated, info), _ = played
    returned = info["returned"]
    assert returned.any()
    assert not (returned & ~terminated).any()
    assert not truncated.any()
    np.testing.assert_array_equal(fire[1:], (terminated & ~returned)[:-1])
    for n in range(N):
        ends = np.flatnonzero(returned[:, n])
        for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
            assert terminated[start : end + 1, n].sum() == 5
            game = slice(start, end + 1)
            assert info["episode_length"][end, n] == end + 1 - start
            # bricks of the lowest rows, which random actions reach, score 1 each
            assert info["episode_return"][end, n] == reward[game, n].sum()
    np.testing.assert_array_equal(info["env_nan"], False)


def test_a_time_limit_truncates(monkeypatch):
    """After FRAMES frames a game of Pong is not lost: it is cut off, and a new one begins."""
    monkeypatch.setattr(atari, "FRAMES", 400)
    monkeypatch.setattr(atari, "_pool", atari._pool.__wrapped__)  # emulators of this test alone
    env = envs.make("atari/Pong", 2)
    assert env.max_steps == 100

    def step(state, key):
        _, state, _, terminated, truncated, info = env.step(key, state, jnp.zeros(2, jnp.int32))
        return state, (terminated, truncated, info["returned"], info["episode_length"])

    @jax.jit
    def play(key):
        return jax.lax.scan(step, env.reset(key)[1], jax.random.split(key, 210))[1]

    terminated, truncated, returned, length = jax.device_get(play(jax.random.key(0)))
    assert not terminated.any()
    np.testing.assert_array_equal(returned, truncated)
    assert truncated.sum(0).tolist() == [2, 2]
    assert length[truncated].max() <= env.max_steps
    for n in range(2):
        first, second = np.flatnonzero(truncated[:, n])
        assert length[first, n] == first + 1
        assert length[second, n] == second - first


def test_training_and_evaluation_do_not_share_emulators():
    one, other = (envs.make("atari/Pong", 2, stagger=stagger) for stagger in (True, False))
    handles = [np.asarray(env.reset(jax.random.key(0))[1].handle) for env in (one, other)]
    assert (handles[0] != handles[1]).any()


def test_several_seeds_are_refused():
    env = envs.make("atari/Breakout", N)
    with pytest.raises(ValueError, match="one seed in a program, not 2"):
        jax.vmap(env.reset)(jax.random.split(jax.random.key(0)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("atari/Breakot", "did you mean .*atari/Breakout"),
        ("atari/Pong?frameskip=2", "unknown option 'frameskip'"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        envs.make(name, 2)


def test_every_listed_game_exists():
    roms = pytest.importorskip("ale_py.roms").get_all_rom_ids()
    names = {"".join(word.capitalize() for word in rom.split("_")) for rom in roms}
    assert names == set(envs.TASKS["atari"])


def test_missing_ale_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "envs.atari")
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[atari\]"'):
        envs.make("atari/Pong", 1)


@pytest.mark.parametrize(
    ("seeds", "resume", "message"),
    [((0, 1), False, "serve one row, not 2"), ((0,), True, "in no checkpoint")],
)
def test_what_a_launch_cannot_do_is_one_line(seeds, resume, message, tmp_path, capsys):
    """Neither several seeds nor a resumed run; nothing is written."""
    run_dir = tmp_path / "run"
    flags = ["--env", "atari/Pong", "--num-seeds", str(len(seeds)), "--run-dir", str(run_dir)]
    if resume:
        write_run(run_dir, seeds=seeds, done=False, algo="p3o")
        saved = rundir.read_json(run_dir / "config.json")
        config = dataclasses.asdict(p3o.config_for("atari/Pong"))
        rundir.write_json(run_dir / "config.json", saved | {"config": config})
        flags = ["--resume", str(run_dir)]
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(SystemExit) as exit_info:
        launch.main("p3o", [*flags, "--verbose", "0"])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: atari/Pong")
    assert message in said
    assert said.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize("algorithm", [ppo, bpo, reppo_discrete])
def test_networks_for_small_images_refuse_games(algorithm):
    with pytest.raises(ValueError, match=r"atari/Pong has large images: run it with algos/p3o.py"):
        algorithm.make_env(algorithm.config_for("atari/Pong"))
    algorithm.make_env(algorithm.config_for("breakout"))  # MinAtar


def test_an_update_of_p3o_on_a_game():
    """Bytes in the replay, rewards clipped, one row under the vmap."""
    sizes = {"num_envs": 2, "num_steps": 4, "total_timesteps": 80, "hidden": (8,)}
    replay = {"replay_fraction": 0.3, "sample_mult": 1}
    config = p3o.config_for("atari/Breakout", **sizes, **replay)
    algo = p3o.build(config, p3o.make_env(config))

    def run(key):
        state, metrics = jax.lax.scan(
            lambda state, _: algo.update(state), algo.init(key), length=config.num_updates
        )
        return state, metrics

    state, metrics = jax.jit(jax.vmap(run))(jax.random.key(0)[None])
    assert state.replay.obs.dtype == jnp.uint8
    assert state.replay.obs.shape == (1, 3 * 2, 5, 84 * 84 * 4)
    assert np.asarray(metrics["health/finite"]).all()
    assert metrics["replay/count"].sum() > 0
