"""Grids of runs: what is run, in which order, what is refused, and what is there at the end."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest
from test_experiments import write_run

from algos.launch import cli, report, rundir
from experiments import grid, runner

PPO, BPO = "ppo/gymnax/CartPole-v1", "bpo/gymnax/CartPole-v1"


def launch_of(argv):
    """(algorithm, its configuration, flags of the launch) of a command line."""
    algo = Path(argv[1]).stem
    module = importlib.import_module(f"algos.{algo}")
    return algo, *cli.parse(algo, module.Config, module.PRESETS, argv[2:])


@pytest.fixture
def ran(monkeypatch):
    """Command lines of the launches, which end at once and leave what a launch would leave."""
    ran = []

    def run(argv):
        ran.append(argv)
        algo, config, launch = launch_of(argv)
        path = Path(launch.run_dir)
        if launch.resume:
            (path / "done.json").write_text('{"seconds": {"train": 2.0, "compile": 30.0}}')
            return
        write_run(path, config.env, seeds=range(launch.seed, launch.seed + launch.num_seeds))
        last = rundir.read_run(path)
        rundir.write_final(path, {"returns": last.final, "lengths": last.lengths[:, -1]})
        saved = rundir.read_description(path) | {"algo": algo, "config": dataclasses.asdict(config)}
        rundir.write_json(path / "config.json", saved | {"launch": dataclasses.asdict(launch)})

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(grid, "check_apart", lambda todo: None)
    return ran


def run_grid(folder, *flags, algos=("ppo", "bpo"), tasks=("cartpole",), num_seeds=2):
    argv = ["--algos", *algos, "--envs", *tasks, "--num-seeds", str(num_seeds)]
    grid.main([*argv, "--out", str(folder), *flags])


def test_every_algorithm_runs_on_every_task(tmp_path, ran):
    run_grid(tmp_path, "--gamma", "0.9", tasks=("cartpole", "pendulum", "gymnax/CartPole-v1"))
    found = [launch_of(argv) for argv in ran]
    assert [(algo, config.env, config.gamma) for algo, config, _ in found] == [
        ("ppo", "gymnax/CartPole-v1", 0.9),
        ("ppo", "gymnax/Pendulum-v1", 0.9),
        ("bpo", "gymnax/CartPole-v1", 0.9),
        ("bpo", "gymnax/Pendulum-v1", 0.9),
    ]
    assert {launch.num_seeds for *_, launch in found} == {2}
    assert found[0][2].run_dir == str(tmp_path / PPO)


def test_complete_launches_are_skipped_and_stopped_ones_resumed(tmp_path, ran):
    run_grid(tmp_path)
    run_grid(tmp_path)
    assert len(ran) == 2
    (tmp_path / BPO / "done.json").unlink()
    run_grid(tmp_path)
    assert ran[2][2:] == ["--resume", str(tmp_path / BPO)]
    assert len(ran) == 3


def test_seeds_are_added(tmp_path, ran, capsys):
    run_grid(tmp_path)
    run_grid(tmp_path, "--seed", "2", num_seeds=3, algos=("ppo",))
    assert launch_of(ran[2])[2].run_dir == str(tmp_path / f"{PPO}_s2")
    table = (tmp_path / "table.md").read_text()
    assert "| ppo | gymnax/CartPole-v1 | 5/5 |" in table
    run_grid(tmp_path)  # the first seeds again: nothing to do
    assert len(ran) == 3


def test_figure_and_table_are_of_all_runs(tmp_path, ran, capsys, monkeypatch):
    drawn, real = [], report.plot_curves

    def plot(entries, path, xs):
        drawn.extend((entry.label, entry.task) for entry in entries)
        real(entries, path, xs=xs)

    monkeypatch.setattr(report, "plot_curves", plot)
    run_grid(tmp_path, tasks=("cartpole", "pendulum"))
    tasks = "gymnax/CartPole-v1", "gymnax/Pendulum-v1"
    assert drawn == [(algo, task) for algo in ("ppo", "bpo") for task in tasks]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n") == 2 + 4 + 1 + 2 + 2  # returns, and bpo minus ppo
    assert "| bpo | ppo | gymnax/Pendulum-v1 | 0.0 [" in table
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert [row["per_seed"] for row in numbers] == [[2.0, 12.0]] * 4
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text('{"model": 1}')  # of somebody else
    run_grid(tmp_path, algos=("bpo",), tasks=("acrobot",))  # beside what is there
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:7]]
    found = [(row[0].removeprefix("| "), row[1]) for row in rows]
    assert found == [("bpo", "gymnax/Acrobot-v1"), *((x, y) for x in ("bpo", "ppo") for y in tasks)]


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ([], {"algos": ("ppo", "bop")}, "--algos bop: did you mean bpo"),
        ([], {"tasks": ("cartpool",)}, "unknown environment 'cartpool'; did you mean cartpole"),
        (["--env", "pendulum"], {}, "--env differs between the launches: give --envs"),
        (["--run_dir=x"], {}, "--run-dir differs between the launches: give --out"),
        (["--gama", "0.9"], {}, "unknown argument '--gama': did you mean --gamma"),
        (["--gamma", "0.5"], {}, "now 0.5): move it away"),
        ([], {"num_seeds": 3}, "has 2 seeds, not 3: give --num-seeds 2; --seed 2 adds others"),
        (["--seed", "1"], {}, "has seed 1 already: give other seeds"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(flags, options, message, tmp_path, ran, capsys):
    run_grid(tmp_path, algos=("ppo",))
    with pytest.raises(SystemExit) as error:
        run_grid(tmp_path, *flags, **options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert len(ran) == 1


def test_a_table_is_checked_before_anything_runs(tmp_path, ran, capsys):
    """By all runs in the folder, also those that are not asked for."""
    write_run(tmp_path / "ppo/gymnax/Pendulum-v1", "pendulum", seeds=(0, 1))
    write_run(tmp_path / "ppo/gymnax/Pendulum-v1_s1", "pendulum", seeds=(1, 2))
    with pytest.raises(SystemExit):
        run_grid(tmp_path)
    assert "Pendulum-v1_s1 has seed 1 again: move it away" in capsys.readouterr().err
    assert ran == []


def test_offline_runs_beside_others_are_drawn_against_seconds(tmp_path, ran, monkeypatch):
    drawn, real = [], report.plot_curves

    def plot(*args, xs):
        drawn.append(xs)
        real(*args, xs=xs)

    monkeypatch.setattr(report, "plot_curves", plot)
    run_grid(tmp_path, algos=("ppo",), tasks=("pendulum",))
    run_grid(tmp_path, "--dataset", "data.npz", algos=("bc",), tasks=("pendulum",))
    assert drawn == [("steps",), ("seconds",)]


@pytest.mark.parametrize(
    ("algo", "argv", "message"),
    [
        ("sac", ["--env", "cartpole"], "sac on TASK: gymnax/CartPole-v1 has discrete actions"),
        ("ppo", ["--gamma", "2"], "ppo on TASK: gamma=2.0"),
        ("ppo", ["--sweep", "hidden=1,2"], "ppo on TASK: cannot sweep over 'hidden'"),
        (
            "bc",
            ["--env", "pendulum", "--dataset", "no.npz"],
            "bc on TASK: dataset .no.npz. does not exist",
        ),
    ],
)
def test_launches_are_checked_as_they_would_check_themselves(algo, argv, message):
    with pytest.raises(ValueError, match=message):
        grid.check(runner.Job("TASK", algo, algo), argv)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_launch_and_says_how_to_go_on(tmp_path, number):
    """Ctrl-C goes to all processes of a terminal; the launch may take its time to save."""
    launch = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], "saved").touch()
    raise SystemExit(130)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
pathlib.Path(sys.argv[1], "started").touch()
time.sleep(60)
"""
    program = f"""
import sys
from experiments import runner
runner.run([sys.executable, "-c", {launch!r}, {str(tmp_path)!r}])
print("ran on")
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=runner.ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "started").exists():
        assert child.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(child.pid, number)
    else:
        child.send_signal(number)
    out, err = child.communicate()
    assert child.returncode == 130
    assert (tmp_path / "saved").exists()
    # A suite that was started with & ignores ctrl-C, and so does the program here.
    err = err.removeprefix("the launch that runs is the last one\n")
    assert err == "stopped: the same command goes on\n"
    assert "ran on" not in out


@pytest.mark.parametrize("status", [0, 3])
def test_ctrl_c_ends_it_though_the_launch_is_complete(status, capsys, signals):
    """A signal to this program alone; the launch interrupts it and ends."""
    launch = f"import os, signal, sys; os.kill(os.getppid(), signal.SIGINT); sys.exit({status})"
    with pytest.raises(SystemExit, match="130"):
        runner.run([sys.executable, "-c", launch])
    said = "the launch that runs is the last one\nstopped: the same command goes on\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("status", [0, 3])
def test_a_signal_ends_it_though_the_launch_is_complete(status, capsys, signals):
    """The launch gets it too, and had nothing left to save."""
    launch = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    with pytest.raises(SystemExit, match="130"):
        runner.run([sys.executable, "-c", launch])
    assert capsys.readouterr().err == "stopped: the same command goes on\n"


def test_missing_seeds_are_named_as_one_launch_takes_them(tmp_path, monkeypatch, capsys):
    """Of 0 to 31 there are 0 to 7 and 16 to 23."""
    seeds = {"run": [*range(8)], "run_s16": [*range(16, 24)]}
    monkeypatch.setattr(runner, "launches", lambda run_dir, name: [*seeds])
    monkeypatch.setattr(rundir, "read_description", lambda x: {"rows": {"seeds": seeds[x]}})
    runner.name_missing_seeds(tmp_path, tmp_path, range(32))
    message = f"{tmp_path} is complete: --seed 8 --num-seeds 8 adds 8 seeds\n"
    assert capsys.readouterr().err == message


def heeds_ctrl_c(job, argv):
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        raise ValueError("heeds it")


def test_ctrl_c_is_for_the_grid_and_not_for_the_process_of_the_checks(monkeypatch):
    """Which would print a traceback beside the one line."""
    monkeypatch.setattr(grid, "check", heeds_ctrl_c)
    handler = signal.getsignal(signal.SIGINT)
    grid.check_apart([(None, [])])
    assert signal.getsignal(signal.SIGINT) == handler


def test_an_interrupt_of_the_checks_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(todo):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "check_apart", interrupted)
    with pytest.raises(SystemExit) as end:
        grid.main(["--algos", "ppo", "--envs", "cartpole", "--out", str(tmp_path / "grid")])
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped before the start\n"
    assert not (tmp_path / "grid").exists()


def test_a_grid_end_to_end(tmp_path):
    """The smallest launch, in processes of their own."""
    flags = [*launching.FLAGS]
    env = flags.index("--env")
    del flags[env : env + 2]
    argv = ["--algos", "ppo", "--envs", "cartpole", "--out", str(tmp_path), *flags]
    done = subprocess.run(
        [sys.executable, str(runner.ROOT / "experiments" / "grid.py"), *argv],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("runs: 1, complete: 0\n$ python ")
    assert done.stdout.endswith(f"\ncurves: {tmp_path / 'curves.png'}\n")
    assert launching.strict_json(tmp_path / "table.json")[0]["n"] == 2
