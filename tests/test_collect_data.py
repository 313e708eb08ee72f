"""Collecting datasets: shares, noise, what a row holds at the end of an episode, resuming."""

import functools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

import envs
from algos import sac
from algos.launch import datasets, policies, rundir
from experiments import collect_data
from experiments.collect_data import Part

pytestmark = pytest.mark.xdist_group("test_collect_data")


def export(name, folder, **changes):
    """A run directory with the policy of an untrained agent; returns the policy's file."""
    config = tiny.config_of(name, **changes)
    algo = tiny.build(name, config)
    policy = algo.policy_of(jax.jit(algo.init)(jax.random.key(0)))
    folder.mkdir(parents=True)
    described = {"algo": name, "config": vars(config), "launch": {}, "rows": {}}
    rundir.write_json(folder / "config.json", described)
    rundir.save_arrays(folder / "policy_s000.npz", rundir.flatten(policy), {"seed": 0})
    return str(folder / "policy_s000.npz")


# --- mixtures ---


def test_counts():
    three = collect_data.parts_of("eps1", "p")
    assert collect_data.counts_of(1_000_000, three) == [200_000, 400_000, 400_000]
    assert collect_data.counts_of(7, three) == [1, 2, 4]
    assert collect_data.counts_of(7, collect_data.parts_of("pure", "p")) == [7]
    with pytest.raises(ValueError, match=r"--steps 3 are too few: the parts would get \[0, 1, 2\]"):
        collect_data.counts_of(3, three)


def test_types_of_data():
    noise = {"eps1": (0.1, 0), "eps3": (0.3, 0), "gaussian1": (0, 0.1), "gaussian3": (0, 0.3)}
    assert collect_data.parts_of("pure", "p") == [Part(4, "p")]
    for kind, (eps, std) in noise.items():
        assert collect_data.parts_of(kind, "p") == [Part(2), Part(4, "p"), Part(4, "p", eps, std)]
    assert {*noise, "pure"} == {*collect_data.TYPES}


def test_mixture_of_a_file(tmp_path):
    path = tmp_path / "mixture.json"
    path.write_text('[{"share": 2}, {"share": 3.5, "policy": "a/policy_s001.npz", "eps": 0.2}]')
    policy = str(tmp_path / "a" / "policy_s001.npz")
    assert collect_data.read_mixture(path) == [Part(2), Part(3.5, policy, eps=0.2)]
    path.write_text('[{"policy": "~/policy_s001.npz"}]')
    assert collect_data.read_mixture(path) == [Part(1, str(Path.home() / "policy_s001.npz"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not a mixture"),
        ("[]", "has no parts"),
        ('{"policy": "p"}', "is not a mixture: a list of parts is wanted"),
        ("[3]", "is not a mixture: a list of parts is wanted"),
        ('[{"shar": 2}]', "a part has no shar, but share, policy, eps, std"),
        ('[{"share": 0}]', "share=0: it should be greater than 0"),
        ('[{"share": "2"}]', "share='2': it should be a valid number"),
        ('[{"policy": 3}]', "policy=3: it should be a valid string"),
        ('[{"policy": "p", "eps": 1.5}]', r"eps=1.5: it should be less than or equal to 1"),
        ('[{"eps": 0.5}]', "noise needs a policy"),
    ],
)
def test_bad_mixtures_are_refused(tmp_path, text, message, capsys):
    path = tmp_path / "mixture.json"
    path.write_text(text)
    argv = ["--mixture", str(path), "--env", "pendulum", "--out", str(tmp_path / "out.npz")]
    with pytest.raises(SystemExit) as status:
        collect_data.main(argv)
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert [p.name for p in tmp_path.iterdir()] == ["mixture.json"]


# --- actions ---

N = 20_000


def actions_of(monkeypatch, part):
    """Actions of a part whose policy always does (0.25, -2)."""
    constant = lambda obs, key: jnp.tile(jnp.array([0.25, -2.0]), (len(obs), 1))
    env = SimpleNamespace(action_size=2)
    monkeypatch.setattr(policies, "read_policy", lambda path: (env, None, None))
    monkeypatch.setattr(policies, "check_task", lambda path, known, env: None)
    monkeypatch.setattr(policies, "act_of", lambda *policy: constant)
    act = collect_data.actor_of([Part(1), Part(1, "p"), part], env)
    return np.asarray(act(jnp.zeros((N, 3)), jax.random.key(0), 2))


def test_pure_actions_are_clipped_to_what_is_done(monkeypatch):
    np.testing.assert_array_equal(actions_of(monkeypatch, Part(1, "p")), [[0.25, -1.0]] * N)


def test_uniform_actions(monkeypatch):
    action = actions_of(monkeypatch, Part(1))
    assert all(stats.kstest(x, stats.uniform(-1, 2).cdf).pvalue > 1e-3 for x in action.T)
    assert abs(np.corrcoef(action.T)[0, 1]) < 4 / np.sqrt(N)


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_whole_actions_are_replaced(monkeypatch, eps):
    action = actions_of(monkeypatch, Part(1, "p", eps=eps))
    replaced = action != [0.25, -1.0]
    np.testing.assert_array_equal(replaced[:, 0], replaced[:, 1])
    assert abs(replaced[:, 0].mean() - eps) < 3 * np.sqrt(eps * (1 - eps) / N)
    assert stats.kstest(action[replaced[:, 0], 0], stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("std", [0.1, 0.3])
def test_noise_is_added_and_clipped(monkeypatch, std):
    action = actions_of(monkeypatch, Part(1, "p", std=std))
    assert abs(action).max() <= 0.999
    inside = action[:, 0] < 0.999
    assert abs((action[inside, 0] - 0.25).std() / std - 1) < 0.05
    assert (action[:, 1] == np.float32(-0.999)).mean() == pytest.approx(0.5, abs=0.02)


# --- rows ---


def collect(env, count):
    """Rows of uniform actions, and by how much the progress bar moved."""
    moved: list[int] = []
    act = collect_data.actor_of([Part(1)], env)
    rows = collect_data.make_collect(env, act)(0, count, jax.random.key(0), moved.append)
    return rows, sum(moved)


@pytest.mark.parametrize(
    ("task", "terminates"),
    [("tiny:counter", False), ("probe/termination-continuous", True)],
)
def test_rows_of_a_collection(task, terminates, monkeypatch):
    """250 steps, 3 streams of 84 from 5 environments: what follows a row, at an end and before."""
    monkeypatch.setattr(collect_data, "CHUNK", 20)
    monkeypatch.setattr(collect_data, "STREAM", 80)
    env = envs.make(task, 5, stagger=False)
    dataset, moved = collect(env, 250)
    assert moved == 250
    datasets.check(dataset, "data", env)
    assert len(np.unique(dataset.action, axis=0)) == len(dataset.obs) == 250
    ends = dataset.terminated | dataset.truncated
    assert not (dataset.terminated & dataset.truncated).any()
    same = ~ends[:-1]
    np.testing.assert_array_equal(dataset.next_obs[:-1][same], dataset.obs[1:][same])
    np.testing.assert_array_equal(dataset.next_action[:-1][same], dataset.action[1:][same])
    assert (dataset.next_action[:-1] != dataset.action[1:])[~same].any(1).all()
    cuts = [83, 167, 249]
    length = 8 if terminates else 4
    time = lambda obs: obs.argmax(1) if terminates else obs[:, 0]
    full = np.flatnonzero(ends & ~np.isin(np.arange(250), cuts))
    assert len(full) > 25
    # The reset is nowhere to be seen: the successor of an end is the state that ended.
    np.testing.assert_array_equal(time(dataset.obs)[full], length - 1)
    np.testing.assert_array_equal(time(dataset.obs)[full + 1], 0)
    if terminates:
        assert not dataset.next_obs[full].any()
        np.testing.assert_array_equal(np.flatnonzero(dataset.terminated), full)
    else:
        np.testing.assert_array_equal(time(dataset.next_obs)[full], 4)
        assert not dataset.terminated.any()
    assert ends[cuts].all()
    np.testing.assert_array_equal(time(dataset.obs)[[0, 84, 168]], 0)


def test_broken_physics_is_left_out(monkeypatch):
    """Every fifth step of each stream breaks: it is dropped, and the step before it is cut."""
    make = envs.make("tiny:counter", 2, stagger=False)

    def step(key, state, action):
        state, time = state
        obs, state, reward, _, _, info = make.step(key, state, action)
        broken = jnp.full(2, time % 5 == 4)
        ended = info["returned"] | broken
        return obs, (state, time + 1), reward, broken, ended & ~broken, info | {"env_nan": broken}

    def reset(key):
        obs, state = make.reset(key)
        return obs, (state, jnp.int32(0))

    env = make._replace(reset=reset, step=step)
    monkeypatch.setattr(collect_data, "STREAM", 20)
    dataset, _ = collect(env, 40)
    assert len(dataset.obs) == 32
    assert not dataset.terminated.any()
    row = np.arange(32)
    wanted = row % 4 == 3  # before the broken one, where the episode of four ends too
    np.testing.assert_array_equal(dataset.truncated[wanted], True)
    assert not dataset.truncated.all()


# --- the program ---


def run(*argv):
    collect_data.main([*map(str, argv)])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Uniform actions, and policies of two algorithms on one task."""
    folder = tmp_path_factory.mktemp("policies")
    export("sac", folder / "sac")
    export("ppo", folder / "ppo", env="tiny:balance")
    parts = [
        {"share": 1},
        {"share": 2, "policy": "sac/policy_s000.npz"},
        {"share": 2, "policy": "ppo/policy_s000.npz", "std": 0.1},
    ]
    path = folder / "mixture.json"
    path.write_text(json.dumps(parts))
    return path


def test_interrupted_and_run_again_is_the_same_dataset(mixture, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "data.npz", tmp_path / "whole.npz"
    argv = ["--mixture", mixture, "--steps", 500, "--seed", 3, "--out"]
    run(*argv, whole)
    assert "500 steps of tiny:balance" in capsys.readouterr().out
    calls, write = [], datasets.write

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(datasets, "write", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(*argv, out)
    assert "stopped: the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(SystemExit):
        run(*argv[:-3], "--seed", 4, "--out", out)
    assert "is of another command" in capsys.readouterr().err
    run(*argv, out)
    assert len(calls) == 5  # the first part was there already: two others and the whole
    (dataset, meta), (other, _) = datasets.read(out), datasets.read(whole)
    tiny.assert_same(dataset, other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "whole.npz"]

    assert (meta["env"], meta["seed"]) == ("tiny:balance", 3)
    assert [part["count"] for part in meta["parts"]] == [100, 200, 200]
    assert all(part["returns"]["mean"] >= 8 for part in meta["parts"])
    assert [len(part["sha256"]) for part in meta["parts"]] == [0, 64, 64]
    tiny.assert_same(datasets.load(str(out), envs.make("tiny:balance", 1)), dataset)
    assert (dataset.terminated | dataset.truncated)[[99, 299, 499]].all()
    assert stats.kstest(dataset.action[:100, 0], stats.uniform(-1, 2).cdf).pvalue > 1e-3
    at_bound = np.abs(dataset.action[:, 0]) == np.float32(0.999)  # only PPO's, with its noise
    assert not at_bound[:300].any()
    assert at_bound[300:].mean() > 0.1
    with pytest.raises(SystemExit):
        run(*argv, out)
    assert "exists already" in capsys.readouterr().err


def test_returns_are_those_of_each_part(mixture, tmp_path, monkeypatch):
    evaluate = lambda part, key: np.full(20, float(part))
    monkeypatch.setattr(collect_data, "make_evaluate", lambda env, act: evaluate)
    run("--mixture", mixture, "--steps", 50, "--out", tmp_path / "data.npz")
    parts = datasets.read(tmp_path / "data.npz")[1]["parts"]
    assert [part["returns"]["mean"] for part in parts] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give POLICY, with or without --type, or --mixture"),
        (
            ["--type", "eps1", "--mixture", "mixture.json"],
            "give POLICY, with or without --type, or",
        ),
        (["nowhere/policy_s000.npz"], "does not exist; there: no policies"),
        (["sac/policy_s007.npz"], "does not exist; there: policy_s000.npz"),
        (
            ["sac/policy_s000.npz", "--env", "pendulum"],
            "the tasks gymnax/Pendulum-v1, tiny:balance",
        ),
        (["sac/policy_s000.npz", "--type", "eps1", "--steps", "2"], "are too few"),
        (["sac/policy_s000.npz", "--out", "data.hdf5"], "would be read as HDF5: data.npz"),
        (["sac/policy_s000.npz", "--seed", "4294967296"], "--seed: 4294967296: 0 to 2**32 - 1 are"),
        (["p.npz", "--format", "minari", "--out", "tiny/balance"], "version: tiny/balance-v0"),
        (["p.npz", "--format", "minari", "--out", "my data-v0"], "dataset ID: my data-v0"),
    ],
)
def test_bad_input_is_one_line(mixture, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(mixture.parent)
    with pytest.raises(SystemExit) as status:
        run("--out", tmp_path / "data.npz", *argv)
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_policy_is_known_by_its_content(tmp_path):
    """An interrupted command goes on whatever the path to the policy is."""
    (tmp_path / "p.npz").write_bytes(b"policy")
    (tmp_path / "q.npz").write_bytes(b"policy")
    (tmp_path / "other.npz").write_bytes(b"other")
    part = lambda name: collect_data.Part(policy=str(tmp_path / name))
    of = lambda name: collect_data.describe("hopper", [part(name)], [5], 0)
    meta = {"env": "hopper", "of": of("p.npz"), "returns": {"mean": 1.0}}
    datasets.write(tmp_path / "0.npz", tiny.transitions(5), meta)
    assert collect_data.finished(tmp_path / "0.npz", of("q.npz"))
    with pytest.raises(ValueError, match="is of another command: delete it or choose another"):
        collect_data.finished(tmp_path / "0.npz", of("other.npz"))


def test_a_task_that_has_changed_is_refused(tmp_path, capsys):
    """A policy of `counter` from when it had other sizes; nothing is written."""
    config, env = tiny.config_of("sac", env="tiny:counter"), envs.make("probe/value-continuous", 4)
    algo, path = sac.build(config, env), tmp_path / "policy_s000.npz"
    policy = rundir.flatten(algo.policy_of(algo.init(jax.random.key(0))))
    policies.save_policy(path, policy, "sac", config, policies.interface_of(env), {"seed": 0})
    with pytest.raises(SystemExit):
        run(path, "--steps", 8, "--out", tmp_path / "data.npz")
    assert re.search(
        r"policy_s000.npz is for observations of size 1 and actions of size 1, but tiny:counter "
        r"has observations of size 2 and actions of size 2: train a policy",
        capsys.readouterr().err,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["policy_s000.npz"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "mixture.json").write_text("[{}]")
    out = tmp_path / "data.npz"
    monkeypatch.setattr(datasets, "check", lambda *_: out.write_text("of another program"))
    argv = ["--mixture", tmp_path / "mixture.json", "--env", "tiny:counter", "--steps", 8]
    with pytest.raises(SystemExit):
        run(*argv, "--out", out)
    assert "data.npz exists already" in capsys.readouterr().err
    assert out.read_text() == "of another program"


def test_parts_that_cannot_be_put_together_are_deleted(tmp_path, monkeypatch, capsys):
    """The same command, after the task was mended, collects them again."""

    def refuse(*_):
        raise ValueError("the dataset has no rows")

    (tmp_path / "mixture.json").write_text("[{}]")
    argv = ["--mixture", tmp_path / "mixture.json", "--env", "tiny:counter", "--steps", 8]
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "check", refuse)
        with pytest.raises(SystemExit):
            run(*argv, "--out", tmp_path / "data.npz")
    assert capsys.readouterr().err.endswith("error: the dataset has no rows\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mixture.json"]


def test_a_folder_that_cannot_be_written_to_is_refused(mixture, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        run("--mixture", mixture, "--out", tmp_path / "file" / "data.npz")
    assert "file is no folder that can be written to" in capsys.readouterr().err


def test_one_process_writes_a_dataset(mixture, tmp_path, monkeypatch, capsys):
    """A second one is refused, also if it started before the first one was done."""
    out = tmp_path / "data.npz"
    argv = ["--mixture", mixture, "--steps", 50, "--out", out]
    (tmp_path / "data.npz.parts").mkdir()
    held = rundir.lock(tmp_path / "data.npz.parts")
    with pytest.raises(SystemExit):
        run(*argv)
    assert "data.npz.parts is in use by another process" in capsys.readouterr().err
    held.release()

    def lock(folder):
        out.write_text("of another process")
        return real(folder)

    real = rundir.lock
    monkeypatch.setattr(rundir, "lock", lock)
    with pytest.raises(SystemExit):
        run(*argv)
    assert "data.npz exists already" in capsys.readouterr().err
    assert out.read_text() == "of another process"


def test_returns_are_played_in_slices(monkeypatch):
    """So that ctrl-C is heeded; `counter` ends after 4 steps, each pays 1."""
    slices, advance = [], collect_data.evaluation.advance
    record = lambda *args: slices.append(args[-1]) or advance(*args)
    monkeypatch.setattr(collect_data.evaluation, "advance", record)
    monkeypatch.setattr(collect_data, "CHUNK", 3)
    env = envs.make("tiny:counter", 2, stagger=False)
    act = lambda obs, key, part: jnp.zeros((len(obs), env.action_size))
    evaluate = collect_data.make_evaluate(env, act)
    with jax.disable_jit():
        assert evaluate(0, jax.random.key(0)).tolist() == [4.0, 4.0]
    assert slices == [3, 3]


def test_parts_draw_apart_and_play_whole_episodes(tmp_path):
    """Two equal parts of `counter`, whose episodes have 4 steps of reward 1."""
    mixture, out = tmp_path / "mixture.json", tmp_path / "counter.npz"
    mixture.write_text(json.dumps([{"share": 1}, {"share": 1}]))
    run("--mixture", mixture, "--env", "tiny:counter", "--steps", 40, "--out", out)
    dataset, meta = datasets.read(out)
    assert (dataset.action[:20] != dataset.action[20:]).any(-1).all()
    assert dataset.obs[:4, 0].tolist() == [0, 1, 2, 3]
    assert [part["returns"] for part in meta["parts"]] == 2 * [{"mean": 4.0, "std": 0.0}]


def counter_of(dtype):
    """`counter`, whose observations have another type."""
    raw = tiny.counter()
    cast = lambda obs, *rest: (obs.astype(dtype), *rest)
    return raw._replace(
        reset=lambda key: cast(*raw.reset(key)), step=lambda *args: cast(*raw.step(*args))
    )


integers, flags = (functools.partial(counter_of, dtype) for dtype in (jnp.int32, bool))


@pytest.mark.parametrize(("task", "seen"), [("integers", [0, 1, 2, 3]), ("flags", [0, 1, 1, 1])])
def test_other_observations_are_stored_as_floats(tmp_path, task, seen):
    (tmp_path / "mixture.json").write_text("[{}]")
    argv = ["--env", f"test_collect_data:{task}", "--steps", 8, "--out", tmp_path / "data.npz"]
    run("--mixture", tmp_path / "mixture.json", *argv)
    dataset = datasets.read(tmp_path / "data.npz")[0]
    assert dataset.obs.dtype == dataset.next_obs.dtype == np.float32
    assert dataset.obs[:, 0].tolist() == seen * 2


def test_a_policy_may_be_in_the_home_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        run("~/policy_s000.npz", "--out", tmp_path / "data.npz")
    assert str(tmp_path / "policy_s000.npz") in capsys.readouterr().err


def test_a_part_that_is_none_is_refused(tmp_path):
    datasets.write(tmp_path / "0.npz", tiny.transitions(4), {"env": "tiny:balance"})
    with pytest.raises(ValueError, match="is of another command"):
        collect_data.finished(tmp_path / "0.npz", {"env": "tiny:balance"})
    assert collect_data.finished(tmp_path / "1.npz", {}) is None


def test_uniform_actions_need_a_task(tmp_path, capsys):
    path = tmp_path / "mixture.json"
    path.write_text("[{}]")
    with pytest.raises(SystemExit):
        run("--mixture", path, "--out", tmp_path / "data.npz")
    assert "give --env" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--mixture", path, "--env", "cartpole", "--out", tmp_path / "data.npz")
    assert "discrete actions" in capsys.readouterr().err


def test_minari_datasets_that_we_write_are_read(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path = tmp_path / "mixture.json"
    path.write_text("[{}]")
    argv = ["--mixture", path, "--env", "tiny:balance", "--steps", 200]
    run(*argv, "--format", "minari", "--out", "tiny/balance-v0")
    found = minari.load_dataset("tiny/balance-v0")
    assert found.total_steps == 200
    run(*argv, "--out", tmp_path / "data.npz")
    env = envs.make("tiny:balance", 1)
    ours = datasets.load(str(tmp_path / "data.npz"), env)
    theirs = datasets.load("minari:tiny/balance-v0", env)
    # All but the last step of the stream, which was cut.
    assert ours.terminated.sum() > 3
    tiny.assert_same(theirs.obs, ours.obs[:199])
    tiny.assert_same(theirs.next_obs, ours.next_obs[:199])
    tiny.assert_same(theirs.terminated, ours.terminated[:199])
    going_on = ~theirs.terminated
    tiny.assert_same(theirs.next_action[going_on], ours.next_action[:199][going_on])
    with pytest.raises(SystemExit):
        run(*argv, "--format", "minari", "--out", "tiny/balance-v0")


def test_a_minari_dataset_has_actions_of_the_tasks_range(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "mixture.json").write_text("[{}]")
    argv = ["--mixture", tmp_path / "mixture.json", "--env", "pendulum", "--steps", 300]
    run(*argv, "--format", "minari", "--out", "tiny/pendulum-v0")
    found = minari.load_dataset("tiny/pendulum-v0")
    assert (found.action_space.low, found.action_space.high) == ([-2.0], [2.0])
    actions = np.concatenate([episode.actions for episode in found])
    assert 1.5 < np.abs(actions).max() <= 2.0
    env = envs.make("pendulum", 1)
    assert np.abs(datasets.load("minari:tiny/pendulum-v0", env).action).max() <= 1.0


def test_an_interrupted_minari_dataset_is_written_again(tmp_path, monkeypatch, capsys):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "mixture.json").write_text("[{}]")
    argv = ["--mixture", tmp_path / "mixture.json", "--env", "tiny:counter", "--steps", 8]
    argv += ["--format", "minari", "--out", "counter-v0"]
    write = minari.create_dataset_from_buffers

    def interrupted(*args, **kwargs):
        write(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(minari, "create_dataset_from_buffers", interrupted)
    with pytest.raises(SystemExit) as status:
        run(*argv)
    assert status.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(minari, "create_dataset_from_buffers", write)
    run(*argv)
    assert minari.load_dataset("counter-v0").total_steps == 8


def test_minari_is_named_if_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "minari", None)
    argv = ["--env", "pendulum", "--format", "minari", "--out", "a-v0"]
    path = tmp_path / "mixture.json"
    path.write_text("[{}]")
    with pytest.raises(SystemExit):
        run("--mixture", path, *argv)
    assert 'pip install -e ".[minari]"' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mixture.json"]


def test_the_seed_changes_the_data(tmp_path):
    (tmp_path / "mixture.json").write_text("[{}]")
    argv = ["--mixture", tmp_path / "mixture.json", "--env", "tiny:counter", "--steps", 8, "--out"]
    for seed in (0, 1):
        run(*argv, tmp_path / f"{seed}.npz", "--seed", seed)
    one, other = (datasets.read(tmp_path / f"{seed}.npz")[0] for seed in (0, 1))
    assert (one.action != other.action).all()


def test_a_stream_that_ends_with_its_episode_is_not_cut():
    env = envs.make("probe/termination-continuous", 1, stagger=False)
    dataset, _ = collect(env, 8)
    assert dataset.terminated.tolist() == [False] * 7 + [True]
    assert not dataset.truncated.any()


def test_broken_steps_are_counted(tmp_path):
    (tmp_path / "mixture.json").write_text("[{}]")
    argv = ["--env", "test_broken_physics:breakable", "--steps", 40, "--out", tmp_path / "data.npz"]
    run("--mixture", tmp_path / "mixture.json", *argv)
    dataset, meta = datasets.read(tmp_path / "data.npz")
    assert meta["parts"][0]["broken"] == 40 - len(dataset.obs) > 0
