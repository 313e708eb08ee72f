"""The host side: command line, run directory, resume, ctrl-C, logging, bad input, many devices.

Everything launches the same tiny PPO, so that it compiles once.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from tiny import assert_close, assert_same, lines_of

from algos import launch, ppo
from algos.launch import cli, logs, program, report, rows, rundir, session

ROOT = Path(__file__).parents[1]
FLAGS = [*tiny.flags_of(tiny.config_of("ppo")), "--num-seeds", "2", "--eval-episodes", "2"]
FLAGS += ["--num-evals", "2", "--checkpoint-every", "1", "--final-episodes", "6"]

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


def run(*argv):
    """Launch in this process; returns exit status and stderr."""
    stderr, status = io.StringIO(), 0
    with contextlib.redirect_stderr(stderr):
        try:
            launch.main("ppo", [*argv])
        except SystemExit as error:
            status = error.code
    return status, stderr.getvalue()


def parse(*argv):
    return cli.parse("ppo", ppo.Config, ppo.PRESETS, [*argv])


def content(folder):
    """Bytes of all files below a folder."""
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def checkpoint(run_dir, update=6):
    with np.load(run_dir / "checkpoints" / f"{update:09d}.npz") as file:
        return {name: file[name] for name in file.files if name != "__meta__"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed, and what it said."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    status, said = run(*FLAGS, "--run-dir", str(run_dir))
    assert status == 0
    return run_dir, said


@pytest.fixture
def copy(whole, tmp_path):
    """The run as a crash before its end would have left it, with its checkpoint in the middle."""
    run_dir = tmp_path / "copy"
    shutil.copytree(whole[0], run_dir)
    (run_dir / "done.json").unlink()
    (run_dir / "checkpoints" / "000000006.npz").unlink()
    return run_dir


# --- command line ---


def test_defaults_then_task_preset_then_named_presets_then_flags():
    config, _ = parse("--env", "cartpole")
    assert dataclasses.asdict(config).items() >= ppo.PRESETS["cartpole"].items()
    config, chosen = parse("--env", "cartpole", "--preset", "cartpole_ppo", "--gamma", "0.5")
    expected = ppo.PRESETS["cartpole"] | ppo.PRESETS["cartpole_ppo"] | {"gamma": 0.5}
    assert dataclasses.asdict(config).items() >= expected.items()
    assert chosen.preset == ("cartpole_ppo",)
    config, _ = parse("--preset", "mujoco_ppo", "cartpole_ppo", "--env", "cartpole")
    assert dataclasses.asdict(config).items() >= ppo.PRESETS["cartpole_ppo"].items()


def test_a_preset_applies_under_every_name_of_its_task():
    for name in ("pendulum", "gymnax/Pendulum-v1"):
        assert cli.preset_of(name, {"pendulum": {"gamma": 0.9}}) == {"gamma": 0.9}
    assert cli.preset_of("brax/ant?backend=spring", {"ant": {"gamma": 0.9}}) == {"gamma": 0.9}
    assert cli.preset_of("acrobot", {"pendulum": {"gamma": 0.9}}) == {}


def test_help_shows_the_values_that_would_run(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help", "--env", "pendulum")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    value = str(ppo.PRESETS["pendulum"]["total_timesteps"])
    assert value in text
    assert value != str(ppo.Config.total_timesteps)
    for field in [*dataclasses.fields(ppo.Config), *dataclasses.fields(cli.Launch)]:
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize("dash", ["-", "_"])
@pytest.mark.parametrize("join", [" ", "="])
def test_spellings_of_a_flag(dash, join):
    flags = f"--env{join}inverted_pendulum --run{dash}dir{join}a_b/c_d --num{dash}envs{join}8"
    config, chosen = parse(*flags.split())
    assert (config.env, chosen.run_dir, config.num_envs) == ("inverted_pendulum", "a_b/c_d", 8)


def test_counts_may_be_written_as_people_write_them():
    config, chosen = parse("--total-timesteps", "1e6", "--num-envs=1_6", "--num-seeds", "1e1")
    assert (config.total_timesteps, config.num_envs, chosen.num_seeds) == (1_000_000, 16, 10)
    assert parse("--hidden", "1e2", "64")[0].hidden == (100, 64)


# --- bad input ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env", "cartpoel"], r"unknown environment 'cartpoel'.*cartpole"),
        (["--env", "gymnax/Nothing"], r"unknown environment"),
        (["--env", "no_such_module:make"], r"no_such_module:make.*PYTHONPATH"),
        (["--env", "ant?backend=sprung"], r"backend='sprung' must be one of .*spring"),
        (["--env", "ant?back=spring"], r"unknown option 'back'"),
        (["--preset", "mujoco_pp"], r"unknown preset 'mujoco_pp'.*mujoco_ppo"),
        (["--num-seed", "3"], r"unknown argument '--num-seed'.*--num-seeds"),
        (["--frobnicate"], r"unknown argument '--frobnicate'"),
        (["stray"], r"unknown argument 'stray'"),
        (["--num-minibatches", "7"], r"num_minibatches=7 does not divide"),
        (["--num-seeds", "0"], r"--num-seeds"),
        (["--num-evals", "0"], r"--num-evals"),
        (["--num-envs", "0"], r"num_envs"),
        (["--num-steps", "0"], r"num_steps"),
        (["--num-minibatches", "0"], r"num_minibatches"),
        (["--total-timesteps", "0"], r"total_timesteps"),
        (["--sweep", "num_envs=1,2"], r"cannot sweep over 'num_envs': .*learning_rate"),
        (["--sweep", "gamma"], r"'gamma'"),
        (["--sweep", "gamma=0.9,high"], r"'gamma=0.9,high'"),
        (["--sweep", "gamma=0.9,0.90"], r"repeats"),
        (["--sweep", "gamma=0.9", "gamma=0.8"], r"repeats"),
        (["--sweep", "gamma=0.9,nan"], r"finite"),
        (["--gamma", "7"], r"gamma=7.0: it should be less than or equal to 1"),
        (["--learning-rate", "-1"], r"learning_rate=-1.0: it should be greater than or equal to 0"),
        (["--learning-rate", "nan"], r"learning_rate=nan"),
        (["--noise-interval", "0"], r"noise_interval=0"),
        (
            ["--anneal-lr", "True"],
            r"--anneal-lr takes no value: write --anneal-lr or --no-anneal-lr",
        ),
        (["--anneal-lr=True"], r"--anneal-lr takes no value"),
        (["--num-envs", "8", "16"], r"unknown argument '16': it is the value of no flag"),
        (["--stop-at-return", "nan"], r"--stop-at-return nan: a finite number"),
        (
            ["--total-timesteps", "1e13"],
            r"total_timesteps=10000000000000 makes .* fewer than 2\*\*31",
        ),
        (["--seed", "-1"], r"--seed -1: seeds from 0 to 2\*\*32 - 1"),
        (["--seed", "4294967295", "--num-seeds", "2"], r"--seed 4294967295: .* not 4294967296"),
        (["--final-episodes", "0"], r"--final-episodes 0"),
        (["--checkpoint-every", "-1"], r"--checkpoint-every -1: at least 0"),
        (["--resume", "nowhere"], r"nowhere is not a run directory"),
        (["--resume"], r"--resume"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said = run("--verbose", "0", *argv)
    assert status == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


def test_whoever_changes_an_algorithm_can_see_where_it_fails(tmp_path):
    flags = [*FLAGS, "--num-minibatches", "7", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="num_minibatches=7"):
        run(*flags, "--verbose", "2")


def test_a_value_of_the_wrong_type_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        parse("--num-envs", "many")
    assert exit_info.value.code == 2
    assert "many" in "".join(capfd.readouterr())


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "envs.playground", raising=False)
    monkeypatch.setitem(sys.modules, "mujoco_playground", None)
    status, said = run("--env", "playground/CheetahRun")
    assert status == 2
    assert 'pip install -e ".[playground]"' in said.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_unwritable_run_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "file" / "run"))
    assert status == 2
    assert said.startswith("error: ")
    assert "file" in said
    assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_never_overwritten(whole):
    before = content(whole[0])
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(whole[0]))
    assert (status, said.count("\n")) == (2, 1)
    assert "already holds a run" in said
    assert content(whole[0]) == before


def test_two_launches_never_share_a_directory(tmp_path, monkeypatch):
    """Another launch takes the directory while this one still loads its task."""
    run_dir = tmp_path / "run"
    make_program = session.make_program

    def overtaken(*args):
        run_dir.mkdir()
        (run_dir / "config.json").write_text("theirs")
        return make_program(*args)

    monkeypatch.setattr(session, "make_program", overtaken)
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    assert status == 2
    assert said.startswith("error: ")
    assert (run_dir / "config.json").read_text() == "theirs"
    assert {x.name for x in run_dir.iterdir()} == {"config.json", ".lock"}


def truncate(run_dir):
    path = rundir.checkpoints(run_dir)[-1]
    path.write_bytes(path.read_bytes()[:-200])


def corrupt(run_dir):
    path = rundir.checkpoints(run_dir)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def foreign(run_dir):
    (run_dir / "config.json").write_text('{"model_type": "bert"}')


def unreadable(run_dir):
    (run_dir / "config.json").write_text('{"algo": "ppo", ')


def no_checkpoint(run_dir):
    """Of a run that had reached its end."""
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "done.json").write_text("{}")


def other_algorithm(run_dir):
    saved = json.loads((run_dir / "config.json").read_text()) | {"algo": "bpo"}
    (run_dir / "config.json").write_text(json.dumps(saved))


def other_shape(run_dir):
    saved = json.loads((run_dir / "config.json").read_text())
    saved["config"]["hidden"] = [16]
    (run_dir / "config.json").write_text(json.dumps(saved))


def other_version(run_dir):
    saved = json.loads((run_dir / "config.json").read_text())
    saved["config"]["clip_epsilon"] = 0.2
    (run_dir / "config.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("harm", "flags", "message"),
    [
        (truncate, [], r"000000003.npz is damaged"),
        (corrupt, [], r"000000003.npz is damaged"),
        (foreign, [], r"not a run directory"),
        (unreadable, [], r"not a run directory"),
        (no_checkpoint, [], r"no checkpoint"),
        (other_algorithm, [], r"is a run of bpo"),
        (other_shape, [], r"does not fit .*\[2, 4, 8\], not float32\[2, 4, 16\]"),
        (other_version, [], r"clip_epsilon"),
        (None, ["--gamma", "0.5"], r"gamma=0.5, the run has 0.99"),
        (None, ["--env", "pendulum"], r"env='pendulum', the run has 'cartpole'"),
        (None, ["--num-seeds", "3"], r"num_seeds=3, the run has 2"),
        (None, ["--sweep", "gamma=0.5"], r"sweep="),
        (None, ["--preset", "mujoco_ppo"], r"the run has"),
        (None, ["--run-dir", "elsewhere"], r"run_dir='elsewhere'"),
    ],
)
def test_a_resume_that_cannot_be_exact_is_refused(copy, harm, flags, message, monkeypatch):
    monkeypatch.chdir(copy.parent)
    if harm:
        harm(copy)
    before = content(copy.parent)
    status, said = run("--resume", str(copy), "--verbose", "0", *flags)
    assert status == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert content(copy.parent) == before


def test_resuming_a_complete_run_says_so(whole):
    before = content(whole[0])
    status, said = run("--resume", str(whole[0]), "--verbose", "0")
    assert status == 2
    assert "complete" in said
    assert "--total-timesteps" in said
    assert content(whole[0]) == before


def test_a_resumed_run_may_be_longer(copy):
    config, chosen = parse("--resume", str(copy), "--total-timesteps", "999", "--num-evals", "5")
    assert config == tiny.config_of("ppo", total_timesteps=999)
    assert (chosen.num_seeds, chosen.num_evals, chosen.run_dir) == (2, 5, str(copy))


def test_a_run_directory_may_be_named_in_several_ways(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    (copy.parent / "link").symlink_to(copy)
    for name in ("copy/", "./copy", "link", str(copy)):
        assert parse("--resume", "copy", "--run-dir", name)[0] == tiny.config_of("ppo")


def test_the_files_that_a_run_learned_from_may_have_moved():
    """What is in them must be the same: rundir.check_data compares digests."""
    saved = tiny.config_of("brac")
    cli.check_resumable(saved, dataclasses.replace(saved, dataset="moved.npz", behavior="moved"))
    with pytest.raises(ValueError, match="gamma"):
        cli.check_resumable(saved, dataclasses.replace(saved, dataset="moved.npz", gamma=0.5))


# --- the run directory and the console ---


def test_what_a_run_leaves(whole):
    run_dir, _ = whole
    saved = json.loads((run_dir / "config.json").read_text())
    assert rundir.from_json(ppo.Config, saved["config"]) == tiny.config_of("ppo")
    assert saved["rows"] == {"seeds": [0, 1], "labels": ["", ""]}
    meta = json.loads((run_dir / "meta.json").read_text())
    assert meta.keys() >= {"command", "commit", "versions", "device", "num_devices", "cores"}
    assert meta["versions"]["jax"] == jax.__version__
    assert (run_dir / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")

    lines = lines_of(run_dir)
    assert [x["global_step"] for x in lines] == [0, 96, 96, 192, 192]
    evals = [x for x in lines if "eval/episodic_return" in x]
    run = rundir.read_run(run_dir)
    for i, line in enumerate(evals):
        np.testing.assert_allclose(line["eval/episodic_return"], run.returns[:, i].mean(1))
    training = [x for x in lines if "losses/policy_loss" in x]
    assert all(len(x["losses/policy_loss"]) == 2 for x in training)
    assert training[0]["charts/learning_rate"] == pytest.approx(
        [3e-4 * (1 + 5 / 6 + 4 / 6) / 3] * 2
    )
    assert training[0]["health/seeds_alive"] == 2
    assert not any(name.startswith("episodes/") for name in training[0])
    assert training[1]["time/train"] > training[0]["time/train"]

    done = strict_json(run_dir / "done.json")
    assert run.final.shape == (2, 6)
    np.testing.assert_array_equal(run.final[:, :2], run.returns[:, -1])
    final = run.final.mean(1)
    assert done["episodes"] == 6
    assert done["results"][0]["per_seed"] == pytest.approx(final.tolist())
    assert done["results"][0]["iqm"] == pytest.approx(report.iqm(final))
    assert (done["steps"], done["alive"]) == (192, 2)
    assert done["seconds"].keys() == {"compile", "train", "eval", "wall"}


def strict_json(path):
    """JSON as other languages read it, which know no NaN."""

    def refuse(text):
        raise AssertionError(f"{text} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_a_run_says(whole):
    run_dir, said = whole
    assert "ppo on gymnax/CartPole-v1: 2 seeds x 192 steps (6 updates of 32)" in said
    assert str(run_dir) in said
    lines = said.splitlines()
    steps = [line for line in lines if " | IQM " in line]
    assert [line.split(" | ")[0] for line in steps] == ["0/192", "96/192", "192/192"]
    assert re.fullmatch(
        r"96/192 \| IQM \d+\.?\d* \[\d.*, \d.*\] \| \S+ steps/s, all seeds \| \d:\d\d left",
        steps[1],
    )
    assert sum("[worst seed, best seed]" in line for line in lines) == 1
    assert all(len(line) <= 78 for line in lines if str(run_dir) not in line), lines
    assert "losses/" not in said


def test_default_run_directory():
    """It names the task, the algorithm and the seeds, and differs where any setting differs."""
    config = tiny.config_of("ppo")
    path = session.default_run_dir("ppo", config, cli.Launch(seed=3, num_seeds=16))
    assert path.startswith("runs/gymnax-CartPole-v1/ppo/")
    assert "_s3x16_" in path
    other = session.default_run_dir("ppo", config, cli.Launch(seed=3, num_seeds=16, num_evals=7))
    assert path.split("_")[-1] != other.split("_")[-1]
    config = tiny.config_of("ppo", env="brax/hopper?backend=spring&iterations=2")
    path = session.default_run_dir("ppo", config, cli.Launch(seed=3, num_seeds=16, num_evals=7))
    assert path.startswith("runs/brax-hopper-backend-spring-iterations-2/ppo/")
    assert path.split("_")[-1] != other.split("_")[-1]


def session_of(**flags):
    """A launch of five seeds that has not begun."""
    five = rows.Rows(np.arange(5), {}, [""] * 5)
    return session.Session("ppo", tiny.config_of("ppo"), cli.Launch(**flags), five)


def test_quiet(tmp_path):
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))
    assert (status, said) == (0, "")
    assert (tmp_path / "run" / "done.json").exists()


# --- ctrl-C, crash, resume ---


def interrupt_at(monkeypatch, update, number=signal.SIGINT):
    """Send this process a signal after `update` updates; 0: while it compiles."""
    monkeypatch.setattr(session, "SLICE_SECONDS", 0.0)
    if update == 0:
        compile_ahead = session.compile_ahead

        def interrupted(*args):
            os.kill(os.getpid(), number)
            return compile_ahead(*args)

        monkeypatch.setattr(session, "compile_ahead", interrupted)
        return
    calls = []

    def advance(log, steps):
        calls.append(steps)
        if len(calls) == update:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(logs.Log, "advance", advance)


@pytest.mark.parametrize(
    ("update", "number"),
    [
        (3, signal.SIGTERM),
        *(pytest.param(update, signal.SIGINT, marks=pytest.mark.slow) for update in (0, 6)),
    ],
)
def test_interrupted_and_resumed_is_the_same_run(whole, tmp_path, monkeypatch, update, number):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, update, number)
        status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    assert status == 130
    assert f"--resume {run_dir}" in said
    assert not (run_dir / "done.json").exists()
    assert rundir.checkpoints(run_dir)[-1].name == f"{update:09d}.npz"
    described = (run_dir / "config.json").read_bytes()

    status, said = run("--resume", str(run_dir))
    assert status == 0, said
    assert_same(checkpoint(run_dir), checkpoint(whole[0]))
    mine, other = rundir.read_run(run_dir), rundir.read_run(whole[0])
    for field in ("steps", "returns", "lengths"):
        np.testing.assert_array_equal(getattr(mine, field), getattr(other, field))
    assert (run_dir / "config.json").read_bytes() == described
    for path in ("done.json", "policy_s000.npz", "policy_s001.npz", "plots/curve.png"):
        assert (run_dir / path).exists()
    steps = [x["global_step"] for x in lines_of(run_dir) if "eval/episodic_return" in x]
    assert steps == [0, 96, 192]


def test_resumed_after_a_crash_nothing_is_logged_twice(whole, copy):
    """What the crashed run logged after its last checkpoint is done again, and logged once."""
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 192, "cut')
    status, said = run("--resume", str(copy), "--verbose", "0")
    assert (status, said) == (0, "")
    assert_same(checkpoint(copy), checkpoint(whole[0]))
    assert [x["global_step"] for x in lines_of(copy)] == [0, 96, 96, 192, 192]
    np.testing.assert_array_equal(rundir.read_run(copy).returns, rundir.read_run(whole[0]).returns)


def test_a_crash_before_the_first_checkpoint_costs_the_start_only(whole, copy):
    shutil.rmtree(copy / "checkpoints")
    status, said = run("--resume", str(copy), "--verbose", "0")
    assert (status, said) == (0, "")
    assert_same(checkpoint(copy), checkpoint(whole[0]))
    assert [x["global_step"] for x in lines_of(copy)] == [0, 96, 96, 192, 192]


@pytest.mark.slow
def test_a_longer_run_forgets_the_end_of_the_shorter(whole, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    longer = ["--resume", str(run_dir), "--verbose", "0", "--total-timesteps", "256"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)  # after the last of its eight updates, before its end
        status, _ = run(*longer)
    assert status == 130
    assert not (run_dir / "done.json").exists()
    status, said = run("--resume", str(run_dir), "--verbose", "0")
    assert (status, said) == (0, "")
    assert strict_json(run_dir / "done.json")["steps"] == 256
    meta = strict_json(run_dir / "meta.json")
    assert meta["command"] == strict_json(whole[0] / "meta.json")["command"]
    assert len(meta["resumed"]) == 2


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_an_evaluation_can_be_interrupted(whole, tmp_path, monkeypatch, number):
    """The first, one in the middle, the last, and one of the parts that follow it."""
    run_dir, begun = tmp_path / "run", []
    with monkeypatch.context() as patch:
        compile_ahead = session.compile_ahead
        patch.setattr(session, "EVAL_STEPS", 3)

        def compiled(*args):
            made = compile_ahead(*args)

            def begin(keys):
                if len(begun) == number:
                    os.kill(os.getpid(), signal.SIGINT)
                begun.append(keys)
                return made.begin(keys)

            return made._replace(begin=begin)

        patch.setattr(session, "compile_ahead", compiled)
        status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    assert status == 130, said
    assert len(begun) == number + 1
    assert not (run_dir / "done.json").exists()
    status, said = run("--resume", str(run_dir), "--verbose", "0")
    assert (status, said) == (0, "")
    mine, other = rundir.read_run(run_dir), rundir.read_run(whole[0])
    for field in ("steps", "returns", "lengths", "final"):
        np.testing.assert_array_equal(getattr(mine, field), getattr(other, field))
    assert_same(checkpoint(run_dir), checkpoint(whole[0]))


def test_second_interrupt_stops_at_once():
    """A shell that goes away hangs up twice: that is one wish to stop."""
    stopping = session_of(verbose=0)
    stopping.on_signal(signal.SIGHUP, None)
    stopping.on_signal(signal.SIGHUP, None)
    stopping.on_signal(signal.SIGTERM, None)
    assert stopping.stop
    with pytest.raises(KeyboardInterrupt):
        stopping.on_signal(signal.SIGINT, None)


@pytest.mark.parametrize(
    ("where", "error", "status", "message"),
    [
        ("make_program", KeyboardInterrupt(), 130, r"stopped before the start\n"),
        ("trace", KeyboardInterrupt(), 130, r"stopped at once; go on with --resume \S+run\n"),
        ("trace", OSError(28, "No space left"), 1, r"error: .*No space left: .* --resume \S+run\n"),
    ],
)
def test_an_early_end_is_one_line(tmp_path, monkeypatch, where, error, status, message):
    run_dir = tmp_path / "run"

    def fail(*_):
        raise error

    monkeypatch.setattr(session, where, fail)
    ended, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    assert ended == status
    assert re.fullmatch(message, said), said
    with pytest.raises(type(error)):
        run(*FLAGS, "--verbose", "2", "--run-dir", str(tmp_path / "other"))


def test_a_launch_that_failed_lets_go_of_its_directory(tmp_path, monkeypatch):
    """Notebooks keep the last exception, and with it all that its frames hold."""
    run_dir = tmp_path / "run"

    def broken(*_):
        raise RuntimeError("broken")

    for where in ("trace", "restored"):
        with monkeypatch.context() as patch:
            patch.setattr(session, "trace", broken)
            if where == "restored":
                patch.setattr(rundir, "check_data", broken)
            flags = ["--resume", str(run_dir)] if where == "restored" else [*FLAGS]
            flags += ["--run-dir", str(run_dir), "--verbose", "0"]
            with pytest.raises(RuntimeError, match="broken") as kept:
                run(*flags)
        rundir.lock(run_dir).release()
        assert kept.value


def test_a_terminal_that_is_closed_stops_and_saves(whole, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    handler = signal.getsignal(signal.SIGHUP)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGHUP)
        status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    assert (status, signal.getsignal(signal.SIGHUP)) == (130, handler)
    assert f"stopped and saved; go on with --resume {run_dir}" in said
    assert rundir.checkpoints(run_dir)[-1].name == "000000003.npz"


def test_what_cannot_be_resumed_does_not_advise_it(tmp_path, monkeypatch):
    """Of Atari games, whose emulators are in no checkpoint."""
    make_program = session.make_program
    monkeypatch.setattr(
        session, "make_program", lambda *args: make_program(*args)._replace(stateful=True)
    )
    interrupt_at(monkeypatch, 3)
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))
    assert status == 130
    assert "stopped and saved; cartpole cannot be resumed" in said
    assert "--resume" not in said


def test_interrupt_from_a_terminal(tmp_path):
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--no-anneal-lr", "--total-timesteps", "100000000", "--num-evals", "1000"]
    process = start(*flags, "--run-dir", str(run_dir))
    for line in process.stderr:
        if " | IQM " in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == 130
    assert "stopped and saved" in said
    assert "Traceback" not in said
    assert len(rundir.checkpoints(run_dir)) >= 1
    assert not (run_dir / "done.json").exists()


def start(*flags, **variables):
    """`python algos/ppo.py` as a process; its results are compared to rounding only."""
    variables = {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | variables
    environment = {k: v for k, v in (os.environ | variables).items() if v}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "algos" / "ppo.py"), *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


# --- rows: seeds and swept values ---


def test_rows_of_a_sweep():
    config = tiny.config_of("ppo")
    sweep = ("learning_rate=1e-3,2e-3", "gamma=0.9,0.99")
    swept = rows.make_rows(cli.Launch(seed=5, num_seeds=2, sweep=sweep), config, ppo.TRACEABLE)
    assert swept.seeds.tolist() == [5, 6] * 4
    np.testing.assert_allclose(swept.hparams["learning_rate"], np.repeat([1e-3, 2e-3], 4))
    np.testing.assert_allclose(swept.hparams["gamma"], np.tile(np.repeat([0.9, 0.99], 2), 2))
    assert swept.labels[2] == swept.labels[3] == "learning_rate=0.001 gamma=0.99"
    plain = rows.make_rows(cli.Launch(seed=5, num_seeds=2), config, ppo.TRACEABLE)
    assert (plain.seeds.tolist(), plain.hparams, plain.labels) == ([5, 6], {}, ["", ""])


def test_dead_seeds_are_named_and_left_out(whole, tmp_path):
    run_dir = tmp_path / "run"
    status, said = run(*FLAGS, "--sweep", "learning_rate=3e-4,1e30", "--run-dir", str(run_dir))
    assert status == 0
    for seed in (0, 1):
        dead = [x for x in said.splitlines() if x.startswith(f"seed {seed}") and "dead" in x]
        assert len(dead) == 1
        assert "learning_rate=1e+30" in dead[0]
    assert "  learning_rate=0.0003 | IQM" in said
    assert "  learning_rate=1e+30 | no seed is alive" in said

    swept, plain = rundir.read_run(run_dir), rundir.read_run(whole[0])
    assert swept.labels == ["learning_rate=0.0003"] * 2 + ["learning_rate=1e+30"] * 2
    np.testing.assert_allclose(swept.returns[:2], plain.returns, rtol=1e-3)
    assert np.isfinite(swept.returns[:, 0]).all()
    assert np.isnan(swept.returns[2:, 1:]).all()
    state = checkpoint(run_dir)
    assert_close(
        {k: v[:2] for k, v in state.items() if "params" in k},
        {k: v for k, v in checkpoint(whole[0]).items() if "params" in k},
        rtol=1e-3,
        atol=1e-4,
    )
    last = [x for x in lines_of(run_dir) if "losses/policy_loss" in x][-1]
    assert last["health/seeds_alive"] == 2
    assert last["health/finite"] == [1, 1, 0, 0]
    assert last["losses/policy_loss"][2:] == [None, None]
    assert None not in last["losses/policy_loss"][:2]
    done = strict_json(run_dir / "done.json")
    assert done["alive"] == 2
    good, bad = done["results"]
    assert good["iqm"] == pytest.approx(report.iqm(plain.final.mean(1)), rel=1e-3)
    assert (bad["label"], bad["iqm"]) == ("learning_rate=1e+30", None)
    assert bad["per_seed"] == [None, None]


def test_a_launch_ends_when_every_seed_is_dead(tmp_path):
    run_dir = tmp_path / "run"
    status, said = run(*FLAGS, "--sweep", "learning_rate=1e29,1e30", "--run-dir", str(run_dir))
    assert status == 3
    assert "no seed is alive" in said
    assert [x["global_step"] for x in lines_of(run_dir)] == [0, 96, 96]
    assert strict_json(run_dir / "done.json")["alive"] == 0


# --- devices and hosts ---


@pytest.mark.slow  # one more process that compiles
def test_eight_devices_and_the_compilation_cache(whole, tmp_path):
    """One seed on each of eight devices; the cache goes to its place under the user's folder."""
    run_dir = tmp_path / "run"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    variables = {"XLA_FLAGS": flags, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    variables |= {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": ""}
    process = start(*FLAGS, "--num-seeds", "8", "--run-dir", str(run_dir), **variables)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert "on 8 x cpu" in said
    assert json.loads((run_dir / "meta.json").read_text())["num_devices"] == 8
    first = {k: v[:2] if v.ndim else v for k, v in checkpoint(run_dir).items()}
    assert_close(first, checkpoint(whole[0]), rtol=1e-3, atol=1e-4)
    assert rundir.read_run(run_dir).returns.shape == (8, 3, 2)
    assert any((tmp_path / "cache" / "purepo").iterdir())


MANY_FACTORS = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
mesh, row = jax.sharding.Mesh(jax.local_devices(), "row"), jax.sharding.PartitionSpec("row")
factors = lambda a: jax.lax.fori_loop(0, 50, lambda i, a: a + 0 * jnp.linalg.cholesky(a), a)
factors = jax.shard_map(factors, mesh=mesh, in_specs=row, out_specs=row, check_vma=False)
jax.block_until_ready(jax.jit(factors)(jnp.broadcast_to(jnp.eye(14), (4096, 14, 14))))
"""


def test_physics_of_many_environments_does_not_hang_on_several_devices():
    """Batched Cholesky as MJX calls it; jaxlib 0.10 would wait for ever."""
    variables = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", MANY_FACTORS], env=variables, timeout=60)
    assert done.returncode == 0


@pytest.mark.slow  # two more processes that compile
def test_two_hosts_are_one_launch(whole, tmp_path):
    run_dir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        start(
            *FLAGS, "--num-seeds", "4", "--run-dir", str(run_dir),
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "192/192 | IQM" in said[0]
    assert "192" not in said[1]  # only the first host prints
    first = {k: v[:2] if v.ndim else v for k, v in checkpoint(run_dir).items()}
    assert_close(first, checkpoint(whole[0]), rtol=1e-3, atol=1e-4)
    run = rundir.read_run(run_dir)
    assert run.seeds.tolist() == [0, 1, 2, 3]
    assert run.returns.shape == (4, 3, 2)
    assert np.isfinite(run.returns).all()
    np.testing.assert_allclose(run.returns[:2], rundir.read_run(whole[0]).returns, rtol=1e-3)


def test_rows_are_shared_by_hosts_in_order(monkeypatch):
    six = rows.Rows(np.arange(6), {"gamma": np.linspace(0, 1, 6)}, list("abcdef"))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    mine = rows.local(six)
    assert (mine.seeds.tolist(), mine.labels) == ([2, 3], ["c", "d"])
    np.testing.assert_allclose(mine.hparams["gamma"], [0.4, 0.6])
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="6 rows cannot be shared by 4 hosts"):
        rows.local(six)


# --- what reads a run ---


def test_a_policy_that_is_not_there(whole):
    with pytest.raises(ValueError, match=r"policy_s007.npz does not exist; there: policy_s000.npz"):
        rundir.load_policy(whole[0] / "policy_s007.npz")
    with pytest.raises(ValueError, match="not a run directory"):
        rundir.read_run(whole[0] / "plots")


def test_curves_and_groups(whole):
    run = rundir.read_run(whole[0])
    middle, lo, hi = report.curve_of(run.returns)
    np.testing.assert_allclose(middle, run.returns.mean((0, 2)))
    assert ((lo <= middle) & (middle <= hi)).all()
    swept = run._replace(labels=["b", "a"])
    assert [(x, i.tolist()) for x, i in report.groups(swept)] == [("b", [0]), ("a", [1])]


def test_a_policy_says_what_observations_it_takes(whole):
    act = rundir.load_policy(whole[0] / "policy_s000.npz")
    assert act([0.0, 0.1, 0.0, 0.1]).shape == ()
    assert act(np.zeros((3, 4))).shape == (3,)
    for shape in ((3,), (2, 3), (2, 2, 4), ()):
        with pytest.raises(ValueError, match=r"obs has shape .*: \[4\] or \[N, 4\] is wanted"):
            act(np.zeros(shape))
    with pytest.raises(ValueError, match=r"is a folder, name a policy; there: policy_s000.npz"):
        rundir.load_policy(whole[0])


def test_a_policy_of_an_older_version_can_be_loaded(copy):
    """Its config.json may have fields that are gone."""
    observation = np.zeros(4)
    expected = rundir.load_policy(copy / "policy_s000.npz")(observation)
    other_version(copy)
    assert rundir.load_policy(copy / "policy_s000.npz")(observation) == expected


def test_another_schedule_of_evaluations_goes_on_from_where_the_run_is():
    """Six updates of 32 steps; three are done, evaluated at 0, 2 and 3."""
    resumed = session_of(num_evals=6)
    resumed.update, resumed.evals = 3, {"steps": [0, 64, 96]}
    assert [point for _, point in resumed.eval_points()] == [4, 5, 6]
    resumed.evals = {"steps": [0, 64]}  # interrupted before the evaluation at 3
    assert [point for _, point in resumed.eval_points()] == [3, 4, 5, 6]
    resumed = session_of(num_evals=10**9)
    assert [point for _, point in resumed.eval_points()] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("main_thread", [True, False])
def test_a_notebook_gets_its_signal_handlers_back(tmp_path, monkeypatch, main_thread):
    """After an error in the middle too; a launch in another thread sets none."""
    handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    showwarning = warnings.showwarning

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(session, "trace", broken)
    flags = [*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run")]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = run if main_thread else lambda *argv: pool.submit(run, *argv).result()
        with pytest.raises(RuntimeError, match="broken"):
            call(*flags)
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert warnings.showwarning is showwarning


# --- settings of jax ---


def test_double_precision_is_refused(tmp_path):
    with jax.enable_x64(True), pytest.raises(ValueError, match="JAX_ENABLE_X64 is set"):
        program.setup_jax(1)


@pytest.mark.parametrize(
    ("name", "value"), [("jax_disable_jit", True), ("jax_numpy_dtype_promotion", "strict")]
)
def test_modes_of_jax_that_programs_cannot_have_are_refused(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        with pytest.raises(ValueError, match=f"{name.upper()} is set: unset it"):
            program.setup_jax(1)
    finally:
        jax.config.update(name, before)


def test_settings_that_are_made_before_jax_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    try:
        program.setup_jax(1)
        assert jax.config.values[name] == before  # the user's choice stays
        jax.config.update(name, None)
        program.setup_jax(1)
        assert jax.config.values[name] == str(tmp_path / "purepo")
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
        with pytest.raises(ValueError, match="not 'JAX_NUM_PROCESSES'"):
            program.setup_jax(1)
        monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        with pytest.raises(ValueError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID are to be num"):
            program.setup_jax(1)
    finally:
        jax.config.update(name, before)
