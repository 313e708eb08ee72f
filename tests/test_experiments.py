"""Render, evaluate and benchmark, on runs written by hand and on the smallest ones."""

import dataclasses
import importlib.metadata
import itertools
import json
import re
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import envs
from algos.launch import policies, program, render, report, rundir
from envs import viewer
from experiments import benchmark, evaluate, export, peer_cleanrl, peers
from experiments import render as render_tool

EVALS = 3


def write_run(
    path, env="cartpole", labels=("",), seeds=(0, 1, 2, 3), done=True, offset=0.0, algo="ppo"
):
    """A run directory without policies: return 10 x seed + evaluation + offset, dead where None."""
    alive = [i for i in seeds if i is not None]
    rows = [(label, seed) for label in labels for seed in seeds]
    path.mkdir(parents=True)
    launch = {"seed": alive[0], "num_seeds": len(seeds)}
    numbers = [-1 if seed is None else seed for _, seed in rows]
    description = {
        "algo": algo,
        "config": dataclasses.asdict(tiny.config_of("ppo", env=env)),
        "launch": launch,
        "rows": {"seeds": numbers, "labels": [label for label, _ in rows]},
    }
    rundir.write_json(path / "config.json", description)
    rundir.write_json(path / "meta.json", {"num_devices": 2, "device": "cpu", "commit": "a"})
    base = np.array([np.nan if seed is None else 10.0 * seed + offset for _, seed in rows])
    returns = [np.stack([base + i - 0.5, base + i + 0.5], 1) for i in range(EVALS)]
    steps, seconds = [0, 100, 200], [0.0, 1.0, 2.0]
    evals = {"steps": steps, "seconds": seconds, "returns": returns, "lengths": returns}
    rundir.write_evals(path, evals)
    if done:
        rundir.write_json(path / "done.json", {"seconds": {"train": 2.0, "compile": 30.0}})
    return path


def tables_of(capsys):
    """Cells of the Markdown tables that were printed, without their heads."""
    cells_of = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
    parts = itertools.groupby(capsys.readouterr().out.splitlines(), lambda x: x.startswith("|"))
    tables = [[*map(cells_of, lines)] for is_table, lines in parts if is_table]
    for table in tables:
        assert len({len(row) for row in table}) == 1
    return [table[2:] for table in tables]


def table_of(capsys):
    """Cells of the first table that was printed."""
    return tables_of(capsys)[0]


# --- render ---


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        ([3.0, 1.0, 5.0, 2.0, 4.0], {"best": 2, "median": 0, "worst": 1}),
        ([3.0, np.nan, 5.0, np.nan, 4.0], {"best": 2, "median": 4, "worst": 0}),
        ([1.0, 2.0], {"best": 1, "worst": 0}),
        ([np.nan, 2.0], {"best": 1}),
    ],
)
def test_ranked(final, expected):
    assert render.ranked(np.array(final)) == expected


def test_ranked_with_nobody_alive():
    with pytest.raises(ValueError, match="no seed is alive"):
        render.ranked(np.array([np.nan]))


def write_policies(path, seeds, env="cartpole"):
    """Policies of untrained networks, as a launch exports them."""
    config, interface = tiny.config_of("ppo", env=env), policies.interface_of(envs.make(env, 1))
    algo = tiny.build("ppo", config)
    for i in seeds:
        policy = jax.jit(lambda key: algo.policy_of(algo.init(key)))(jax.random.key(i))
        file = path / f"policy_s{i:03d}.npz"
        policies.save_policy(file, rundir.flatten(policy), "ppo", config, interface, {"step": 150})


def test_render_cartpole(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    write_policies(run, (0, 2, 3))  # of 4 seeds the upper of the middle ones is drawn
    said: list[str] = []
    paths = render.render_run(run, said.append)
    videos = run / "videos"
    assert paths == [videos / f"{x}.gif" for x in ("best_s003", "median_s002", "worst_s000")]
    assert said[0] == f"best: seed 3, final return 32.0, {paths[0]}"
    assert capsys.readouterr() == ("", "")
    for path in paths:
        with Image.open(path) as image:
            assert 5 < image.n_frames < 500


def test_played_episodes_are_those_of_an_evaluation():
    """Lengths agree with stepping by hand, and frames stop where the episode does."""
    env = envs.make("cartpole", 2, stagger=False, reset_mode="cached")
    acts = [lambda obs: jnp.int32(0), lambda obs: jnp.int32(obs[2] > 0)]
    frames, lengths = jax.device_get(render.play(env, acts, jax.random.key(1)))
    np.testing.assert_array_equal(frames[0, 0], frames[0, 1])  # the same start
    assert lengths[0] < lengths[1]
    key_reset, _ = jax.random.split(jax.random.key(1))
    obs, state = env.reset(key_reset)
    for t in range(lengths[0]):
        np.testing.assert_allclose(frames[t, 0], obs[0], rtol=1e-5)
        key, actions = jax.random.key(0), jnp.zeros(2, jnp.int32)
        obs, state, _, terminated, _, _ = env.step(key, state, actions)
        assert bool(terminated[0]) == (t == lengths[0] - 1)


def test_pictures_are_of_the_final_ranking_and_of_one_episode_each(tmp_path, monkeypatch):
    """Not of the last evaluation's ranking; episodes begin at their start and stop at their end."""
    run = write_run(tmp_path / "run")
    write_policies(run, range(4))
    final = np.repeat([[9.0], [1.0], [2.0], [3.0]], 6, 1)
    rundir.write_final(run, {"returns": final, "lengths": final})
    lengths, drawn, options = np.array([9, 6, 3]), [], []
    make, play, write = envs.make, render.play, viewer.write_gif
    monkeypatch.setattr(render, "play", lambda *args: (jax.device_get(play(*args))[0], lengths))
    monkeypatch.setattr(
        viewer, "write_gif", lambda images, *args: drawn.append(len(images)) or write(images, *args)
    )
    monkeypatch.setattr(
        render.envs, "make", lambda *args, **more: options.append(more) or make(*args, **more)
    )
    paths = render.render_run(run)
    assert [path.stem for path in paths] == ["best_s000", "median_s003", "worst_s001"]
    assert drawn == lengths.tolist()
    assert options[0]["stagger"] is False


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys):
    for env in ("probe/value", "cartpole"):  # no drawing; no policies
        run = write_run(tmp_path / env.replace("/", "-"), env=env)
        assert render.render_run(run) == []
        assert re.match(
            "not rendered: (probe/value has no drawing|.*policy_s003)", capsys.readouterr().err
        )
    with pytest.raises(ValueError, match="not a run directory"):
        render.render_run(tmp_path)


@pytest.mark.slow
def test_render_brax(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "none")  # as on a machine without any GL library
    name = "inverted_pendulum?backend=spring"
    run = write_run(tmp_path / "run", env=name, seeds=(0,))
    write_policies(run, (0,), env=name)
    (path,) = render.render_run(run)
    assert path == run / "videos" / "best_s000.html"
    assert "<canvas" in path.read_text()


# --- evaluate ---


def test_policies_are_evaluated_again(tmp_path, capsys, monkeypatch):
    """By their own networks, on episodes that a loop by hand plays too; dead rows stay dead."""
    monkeypatch.setattr(evaluate, "SLICE", 3)  # shorter than any episode
    run, result = write_run(tmp_path / "run", seeds=(0, None, 2, 3)), tmp_path / "result.json"
    write_policies(run, (0, 2, 3))
    evaluate.main([str(run), "--episodes", "5", "--seed", "7", "--json", str(result)])
    env = envs.make("cartpole", 5, stagger=False)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    expected = []
    for i in (0, 2, 3):
        act, key = policies.load_policy(run / f"policy_s{i:03d}.npz"), jax.random.key(7)
        key = jax.random.fold_in(key, i)
        (obs, state), length = reset(jax.random.split(key)[0]), np.zeros(5)
        alive = np.ones(5, bool)
        while alive.any():
            length += alive
            obs, state, _, terminated, truncated, _ = step(key, state, act(obs))
            alive &= ~np.array(terminated | truncated)
        expected.append(length.mean())
    assert len(set(expected)) == 3
    saved = json.loads(result.read_text())
    (row,) = saved["rows"]
    assert row["per_seed"] == pytest.approx([expected[0], None, *expected[1:]], rel=1e-6)
    assert (row["n"], row["alive"], saved["episodes"], saved["seed"]) == (4, 3, 5, 7)
    assert row["steps"] == 150  # when they were exported, not of the last evaluation
    assert {"command", "commit", "versions"} <= saved.keys()
    assert table_of(capsys)[0][3].startswith(f"{report.iqm(np.array(expected)):.1f} [")
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--json", str(result)])
    assert "result.json exists: choose another name, or --force" in capsys.readouterr().err
    assert json.loads(result.read_text()) == saved
    evaluate.main([str(run), "--episodes", "2", "--json", str(result), "--force"])
    assert json.loads(result.read_text())["episodes"] == 2


def test_an_evaluation_can_be_stopped(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_run", interrupt)
    with pytest.raises(SystemExit, match="130"):
        evaluate.main([str(write_run(tmp_path / "run"))])
    assert capsys.readouterr().err == "stopped: nothing is kept\n"


def test_what_cannot_be_evaluated_is_one_line(tmp_path, capsys, monkeypatch):
    dead = write_run(tmp_path / "dead", seeds=(0, 1))
    nothing = [np.full((2, 2), np.nan)]
    times = {"steps": [0], "seconds": [0.0]}
    rundir.write_evals(dead, times | {"returns": nothing, "lengths": nothing})
    for path, message in (
        (tmp_path, "not a run directory"),
        (write_run(tmp_path / "run"), "there: no policies"),
        (dead, "no seed is alive"),
    ):
        with pytest.raises(SystemExit) as status:
            evaluate.main([str(path)])
        assert status.value.code == 2
        assert message in capsys.readouterr().err
    for flags, message in (
        (["--episodes", "0"], "--episodes 0: at least 1"),
        (["--seed", "4294967296"], "argument --seed: 4294967296: 0 to 2**32 - 1 are possible"),
        (["--seed=-1"], "argument --seed: -1: 0 to 2**32 - 1 are possible"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main([str(path), *flags])
        assert message in capsys.readouterr().err

    def make(*_, **__):
        raise ImportError("Atari games need ale-py")

    write_policies(tmp_path / "run", range(4))
    monkeypatch.setattr(envs, "make", make)
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "run")])
    assert "need ale-py" in capsys.readouterr().err


def test_broken_physics_is_said(tmp_path, capsys):
    """`breaking` breaks in the second step of every episode, which ends it."""
    run = write_run(tmp_path / "run", env="test_records:breaking", seeds=(0, 1))
    write_policies(run, range(2), env="test_records:breaking")
    evaluate.main([str(run), "--episodes", "5"])
    said = capsys.readouterr().err
    assert "\n10 steps had a reward or observation that is not finite" in f"\n{said}"


def test_a_task_that_has_changed_is_refused(tmp_path, capsys):
    """By its sizes, before anything compiles: policies of CartPole in a run of another task."""
    run = write_run(tmp_path / "run")
    write_policies(run, range(4))
    final = np.zeros((4, 6))
    rundir.write_final(run, {"returns": final, "lengths": final})
    described = json.loads((run / "config.json").read_text())
    described["config"]["env"] = "pendulum"
    rundir.write_json(run / "config.json", described)
    message = (
        r"policy_s000.npz is for observations of size 4 and 2 discrete actions, but "
        r"gymnax/Pendulum-v1 has observations of size 3 and actions of size 1: train a policy"
    )
    with pytest.raises(SystemExit):
        evaluate.main([str(run)])
    assert re.search(message, capsys.readouterr().err)
    assert render.render_run(run) == []
    assert re.search(f"not rendered: .*{message}", capsys.readouterr().err)


# --- benchmark ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--envs", "cartpol"], "did you mean"),
        (["--algos", "common"], "--algos common: choose from bc, bcq"),
        (["--algos", "ppo.py"], "--algos ppo.py: did you mean ppo"),
        (["--presets", "mujoco_pp"], "--presets mujoco_pp: did you mean mujoco_ppo"),
        (["--algos", "bc"], "--algos bc: it is offline, and only online algorithms are timed"),
        (["--budget", "0"], "--budget and --limit must be above 0"),
        (["--seeds", "0"], "must be at least 1"),
        (["--out", __file__], "test_experiments.py exists: choose another name, or --force"),
        (["--peer", "sbx"], "--peer and --peer-python go together"),
        (["--peer", "sbx", "--peer-python", "python", "--envs", "ant"], "leave out --envs"),
        (["--peer", "sbx", "--peer-python", "python", "--budget", "5"], "leave out --budget"),
    ],
)
def test_benchmark_refuses(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.parse(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_case_imports_no_other_algorithm(monkeypatch):
    """Its start-up is measured."""
    monkeypatch.setattr(benchmark.importlib, "import_module", None)
    assert benchmark.parse(["--case", '["ppo"]']).case == ["ppo"]


def test_benchmark_goes_through_the_second_half_of_a_run():
    """At the start there may be a warm-up, and each update may have gradient steps of its own."""
    seen = []

    def train(state, hparams, num_updates):
        seen.append(state.update.tolist())
        return state._replace(update=state.update + num_updates), {}

    case = object.__new__(benchmark.Case)
    case.config, case.hparams = tiny.config_of("ppo"), {}
    case.program, case.update = SimpleNamespace(train=train), 3
    state = jax.eval_shape(tiny.build("ppo", case.config).init, jax.random.key(0))
    case.state = state._replace(update=jnp.int32(0))
    assert case.config.num_updates == 6
    for num_updates in (1, 1, 2, 1):
        case.train(num_updates)
    assert seen == [3, 4, 3, 5]  # 5 and 6 would be too many


def test_benchmark_times_enough_updates(monkeypatch):
    """Updates that take a second each are timed one by one, 50 of them."""
    config = SimpleNamespace(num_updates=1000, num_envs=1, num_steps=1)
    lab = SimpleNamespace(config=config, steps=1, seconds={}, rows=SimpleNamespace(seeds=[0]))
    lab.train = lab.play = lambda num_updates: None
    monkeypatch.setattr(benchmark, "Case", lambda **case: lab)
    monkeypatch.setattr(benchmark, "seconds_of", lambda function, *args: 1.0)
    measured = benchmark.measure({}, 60.0, 0.0)
    assert measured["rates"] == {"environment": 1.0, "training": 1.0}
    assert len(measured["samples"]["training"]) == 50


COLD = {"startup": 30.0, "trace": 3.0, "compile": 20.0}
WARM = {
    **{"startup": 9.5, "trace": 3.0, "compile": 1.0, "evaluation": 1.5},
    **{"rates": {"environment": 4000.0, "training": 1000.0}, "sizes": [8, 32]},
    **{"device": "cpu", "devices": 2},
}


def test_benchmark_measures_every_case(monkeypatch, tmp_path, capsys):
    seen = []

    def in_own_process(case, budget, limit):
        seen.append((case["algo"], case["env"], case["num_seeds"]))
        measured = {"error": "no time"} if case["num_seeds"] == 1 else {"cold": COLD, "warm": WARM}
        return case | measured

    monkeypatch.setattr(benchmark, "in_own_process", in_own_process)
    out = tmp_path / "new" / "out.json"
    flags = ["--envs", "cartpole", "ant", "--algos", "ppo", "--seeds", "1", "16"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *flags, "--out", str(out)])
    benchmark.main()
    assert seen == [("ppo", env, seeds) for env in ("cartpole", "ant") for seeds in (1, 16)]
    rows = table_of(capsys)
    assert rows[0][3] == "no time"
    assert rows[1][2:] == [
        *("16 x 8 x 32", "2 x cpu", "30.0", "9.5", "3.0 + 20.0", "3.0 + 1.0"),
        *("4,000", "1,000", "1.5"),
    ]
    measured = json.loads(out.read_text())
    assert {"command", "commit", "versions", "cores", "cases"} <= measured.keys()
    assert [case.get("error") for case in measured["cases"]] == ["no time", None] * 2


def test_a_failing_case_is_reported(tmp_path):
    case = {"algo": "ppo", "env": "nothing", "presets": [], "num_seeds": 1}
    error = benchmark.in_own_process(case, 1.0, 60.0)["error"]
    assert "unknown environment 'nothing'" in error
    assert benchmark.in_own_process(case, 1.0, 0.01)["error"] == "nothing after 0 s"


@pytest.mark.slow
def test_a_case_is_measured_cold_and_warm():
    case = {"algo": "ppo", "env": "cartpole", "presets": [], "num_seeds": 2}
    measured = benchmark.in_own_process(case, 1.0, 300.0)
    assert measured["cold"]["startup"] > measured["warm"]["startup"] > 0
    rates = measured["warm"]["rates"]
    assert rates["environment"] > rates["training"] > 0


SIDE = """
import json, sys
given = json.loads(sys.argv[-1])
print("a line of a library")
print(json.dumps({{"given": given}}), flush=True)
for _ in sys.stdin:
    print(json.dumps({{"seconds": 2.0, "steps": {steps}}}), flush=True)
"""


def test_both_sides_of_a_contest_work_in_turn(tmp_path, monkeypatch):
    (tmp_path / "benchmark.py").write_text(SIDE.format(steps=600))
    (tmp_path / "peer_sbx.py").write_text(SIDE.format(steps=200))
    monkeypatch.setattr(peers, "HERE", tmp_path)
    contest = next(peers.ppo([8]))
    found = peers.hold("sbx", sys.executable, contest, 3, 60.0)
    assert found["rates"] == {"ours": [300.0] * 3, "sbx": [100.0] * 3}
    assert found["processes"]["sbx"]["given"] == contest.theirs | {"hidden": [64, 64]}
    assert peers.markdown("sbx", [found]).splitlines()[-1] == (
        "| PPO, Hopper-v5 | 8 | 300 | 100 | 3.00 [3.00, 3.00] |"
    )


SCRIPT = """
import sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
assert flags["--env-id"] == "Hopper-v5" and flags["--num-envs"] == "16", flags
assert int(flags["--total-timesteps"]) == 4 * 16 * int(flags["--num-steps"]), flags
print("SPS: 100")
print("SPS: 512")
"""


def test_cleanrl_is_timed_by_the_last_rate_that_its_script_prints(tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(peer_cleanrl, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")  # torch is not ours
    monkeypatch.setattr(sys, "argv", ["", json.dumps(next(peers.ppo([1])).theirs)])
    monkeypatch.setattr(sys, "stdin", [""])
    peer_cleanrl.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"seconds": 16.0, "steps": 8192}


def test_a_side_that_ends_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "benchmark.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(peers, "HERE", tmp_path)
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="ended or took too long"):
        peers.hold("sbx", sys.executable, next(peers.ppo([1])), 1, 60.0)
    assert threading.active_count() == threads  # no timer is left, for which Python would wait
    args = benchmark.parse(["--peer", "sbx", "--peer-python", sys.executable, "--seeds", "1"])
    found = list(benchmark.cases(args))
    assert len(found) == 2  # the first failure does not end the others
    assert all("ended or took too long" in case["error"] for case in found)
    assert peers.markdown("sbx", found).count("took too long") == 2


@pytest.mark.parametrize("peer", peers.PEERS)
def test_both_sides_of_a_contest_have_the_same_sizes(peer):
    for contest in peers.PEERS[peer]([1, 8]):
        changes = contest.ours["changes"]
        assert changes["num_envs"] > 1
        shared = changes.keys() & contest.theirs
        assert shared == changes.keys()
        assert {name: contest.theirs[name] for name in shared} == changes
        seeds = contest.theirs.get("num_seeds", contest.num_seeds)
        assert contest.ours["num_seeds"] == contest.num_seeds == seeds


@pytest.mark.parametrize(
    ("tool", "flags"), [(evaluate, []), (export, ["--out", "x.onnx"]), (render_tool, [])]
)
def test_tools_set_jax_up_as_launches_do(tool, flags, tmp_path, monkeypatch, capsys):
    def refuse(num_rows):
        raise ValueError("JAX_ENABLE_X64 is set")

    monkeypatch.setattr(program, "setup_jax", refuse)
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(write_run(tmp_path / "run")), *flags])
    assert "error: JAX_ENABLE_X64 is set" in capsys.readouterr().err


def test_policies_are_evaluated_on_whole_episodes(tmp_path):
    """By their returns: 4 steps of reward 3."""
    task = "test_evaluation:generous"
    run, result = write_run(tmp_path / "run", task, seeds=(0, 1)), tmp_path / "result.json"
    write_policies(run, (0, 1), task)
    evaluate.main([str(run), "--episodes", "9", "--json", str(result)])
    assert json.loads(result.read_text())["rows"][0]["per_seed"] == [12.0, 12.0]
