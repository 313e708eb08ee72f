"""A launch: what it leaves and prints, ctrl-C, crashes, resuming, dead seeds."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from launching import FLAGS, checkpoint, content, run, session_of, start, strict_json
from tiny import assert_same, lines_of

from algos import ppo
from algos.launch import cli, logs, policies, render, report, rundir, session

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


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
    assert [x["global_step"] for x in lines] == [0, 96, 96, 192, 192, 192]
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
    np.testing.assert_allclose(lines[-1]["final/episodic_return"], final)
    assert done["results"][0]["per_seed"] == pytest.approx(final.tolist())
    assert done["results"][0]["iqm"] == pytest.approx(report.iqm(final))
    assert (done["steps"], done["alive"]) == (192, 2)
    assert done["seconds"].keys() == {"compile", "train", "eval", "wall"}


def test_what_a_run_says(whole):
    run_dir, said = whole
    assert re.match(
        r"ppo on gymnax/CartPole-v1, \d x cpu\n2 seeds x 192 steps \(6 updates of 32\)\n", said
    )
    assert str(run_dir) in said
    lines = said.splitlines()
    steps = [line for line in lines if " | IQM " in line]
    assert [line.split(" | ")[0] for line in steps] == ["0/192", "96/192", "192/192"]
    assert re.fullmatch(
        r"96/192 \| IQM \d+\.?\d* \[\d.*, \d.*\] \| \S+ steps/s, all seeds \| \d:\d\d left",
        steps[1],
    )
    assert sum("[worst seed, best seed]" in line for line in lines) == 1
    assert sum(line.startswith("last evaluation took ") for line in lines) == 1
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


def test_quiet(tmp_path):
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))
    assert (status, said) == (0, "")
    assert (tmp_path / "run" / "done.json").exists()


# --- ctrl-C, crash, resume ---


def interrupt_at(monkeypatch, update, number=signal.SIGINT):
    """Send this process a signal after `update` updates."""
    monkeypatch.setattr(session, "SLICE_SECONDS", 0.0)
    calls = []

    def advance(log, steps):
        calls.append(steps)
        if len(calls) == update:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(logs.Log, "advance", advance)


@pytest.mark.parametrize(
    ("update", "number"),
    [
        (5, signal.SIGTERM),  # between evaluations
        *(pytest.param(update, signal.SIGINT, marks=pytest.mark.slow) for update in (3, 6)),
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
    for record, wanted in zip(lines_of(run_dir), lines_of(whole[0]), strict=True):
        assert record.keys() == wanted.keys()
        for name in record.keys() - {"charts/SPS"}:
            if not name.startswith("time/"):
                assert record[name] == pytest.approx(wanted[name], rel=1e-4, nan_ok=True), name
    seconds = strict_json(run_dir / "done.json")["seconds"]
    assert seconds["wall"] > sum(seconds[part] for part in ("compile", "train", "eval"))


def test_resumed_after_a_crash_nothing_is_logged_twice(whole, copy):
    """What the crashed run logged after its last checkpoint is done again, and logged once."""
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 192, "cut')
    status, said = run("--resume", str(copy))
    assert status == 0
    assert said.count("[worst seed, best seed]") == 1
    assert_same(checkpoint(copy), checkpoint(whole[0]))
    assert [x["global_step"] for x in lines_of(copy)] == [0, 96, 96, 192, 192, 192]
    np.testing.assert_array_equal(rundir.read_run(copy).returns, rundir.read_run(whole[0]).returns)


def test_an_interrupted_run_is_not_resumed_with_fewer_steps_than_it_has(tmp_path, monkeypatch):
    """Its last evaluation would be of two policies."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    before = content(run_dir)
    status, said = run("--resume", str(run_dir), "--total-timesteps", "96")
    assert status == 2
    assert said == (
        f"error: {run_dir} has 5 updates, more than the 3 of --total-timesteps 96: raise it\n"
    )
    assert content(run_dir) == before


def test_a_longer_run_with_a_schedule_says_that_the_schedule_changes(tmp_path):
    run_dir = tmp_path / "run"
    run(*FLAGS, "--anneal-lr", "--total-timesteps", "32", "--run-dir", str(run_dir))
    status, said = run("--resume", str(run_dir), "--total-timesteps", "64")
    assert status == 0
    assert "anneal_lr: from here on towards the new end" in said
    assert "continues after 32 steps of each row\n" in said
    _, said = run("--resume", str(run_dir))
    assert "is complete (64 steps)" in said
    assert "anneal" not in said


def test_a_copied_file_does_not_start_the_original(tmp_path, monkeypatch, capsys):
    """Wherever it is; a script that only calls the original may have any name."""
    folder = Path(session.__file__).parents[1]
    main = sys.modules["__main__"]
    for copy, move in (
        (folder / "mine.py", ""),
        (tmp_path / "mine.py", f"move it to {folder} and "),
    ):
        monkeypatch.setattr(main, "__file__", str(copy), raising=False)
        session.check_script("ppo")
        with monkeypatch.context() as patch:
            patch.setattr(main, "make_train", None, raising=False)
            patch.setattr(sys, "argv", [str(copy), "--run-dir", str(tmp_path / "run")])
            with pytest.raises(SystemExit):
                session.main("ppo")
            said = "error: mine.py ends with launch.main('ppo'), which would run algos/ppo.py: "
            assert capsys.readouterr().err == f"{said}{move}write launch.main('mine')\n"
            patch.setattr(main, "__file__", str(folder / "mine.py"))
            session.check_script("mine")


def test_a_policy_has_the_return_that_tables_quote(whole):
    final = rundir.read_run(whole[0]).final.mean(-1)
    about = [policies.describe_policy(whole[0] / f"policy_s00{i}.npz") for i in (0, 1)]
    np.testing.assert_allclose([x["return"] for x in about], final)


@pytest.mark.slow
def test_a_longer_run_forgets_the_end_of_the_shorter(whole, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    (run_dir / "videos").mkdir()
    for name in ("best_s000.gif", "worst_s001.html", "mine.gif"):
        (run_dir / "videos" / name).touch()
    longer = ["--resume", str(run_dir), "--verbose", "0", "--total-timesteps", "256"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)  # after the last of its eight updates, before its end
        status, _ = run(*longer)
    assert status == 130
    assert not (run_dir / "done.json").exists()
    assert not (run_dir / "final.npz").exists()
    assert [x.name for x in (run_dir / "videos").iterdir()] == ["mine.gif"]
    assert render.render_run(run_dir) == []  # its policies are those of the shorter run
    assert f"{run_dir} has not ended" in capsys.readouterr().err
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_a_signal_stops_at_once(tmp_path, monkeypatch, number):
    monkeypatch.setattr(session, "compile_ahead", lambda *_: os.kill(os.getpid(), number))
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))
    assert (status, said) == (130, f"stopped at once; go on with --resume {tmp_path / 'run'}\n")
    assert not rundir.checkpoints(tmp_path / "run")


def test_second_interrupt_stops_at_once():
    """A shell that goes away hangs up twice: that is one wish to stop."""
    stopping = session_of(verbose=0)
    stopping.unsaved = True
    stopping.on_signal(signal.SIGHUP, None)
    stopping.on_signal(signal.SIGHUP, None)
    stopping.on_signal(signal.SIGTERM, None)
    assert stopping.stop
    with pytest.raises(KeyboardInterrupt):
        stopping.on_signal(signal.SIGINT, None)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, r"stopped at once; go on with --resume \S+run\n"),
        (OSError(28, "No space left"), 1, r"error: .*No space left: .* --resume \S+run\n"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            1,
            r"error: Unable to allocate 9 TiB: start .*\n",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 9 bytes.\nmore"),
            1,
            r"error: INTERNAL: Out of memory allocating 9 bytes: start a smaller run: fewer .*\n",
        ),
    ],
)
def test_an_early_end_is_one_line(tmp_path, monkeypatch, error, status, message):
    run_dir = tmp_path / "run"

    def fail(*_):
        raise error

    monkeypatch.setattr(session, "trace", fail)
    ended, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    assert ended == status
    assert re.fullmatch(message, said), said
    with pytest.raises(type(error)):
        run(*FLAGS, "--verbose", "2", "--run-dir", str(tmp_path / "other"))


def test_an_evaluation_that_lacks_memory_ends_the_run(tmp_path, monkeypatch):
    """Numpy waits for ever for what has failed, so the error must be asked for."""

    class Lost:
        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: Out of memory")

    compile_ahead = session.compile_ahead
    play = lambda *args: {"": Lost()}
    compiled = lambda *args: compile_ahead(*args)._replace(play=play)
    monkeypatch.setattr(session, "compile_ahead", compiled)
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))
    assert status == 1
    assert said.startswith("error: INTERNAL: Out of memory: start a smaller run")


def test_a_lack_of_memory_before_the_run_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")

    monkeypatch.setattr(session, "make_program", fail)
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("error: RESOURCE_EXHAUSTED: Out of memory: start a smaller run")


def test_errors_of_the_program_are_no_lack_of_memory(tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(session, "trace", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))


def test_a_complete_run_without_pictures_has_nothing_left_to_do(tmp_path):
    (tmp_path / "done.json").touch()
    done = SimpleNamespace(run_dir=tmp_path, launch=SimpleNamespace(render=False))
    assert session.Session.advice.fget(done) == "the run is complete"


def test_a_run_without_its_evaluations_is_not_resumed(copy):
    (copy / "eval.npz").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()}
    status, said = run("--resume", str(copy), "--verbose", "0")
    assert (status, said) == (2, f"error: {copy} has no eval.npz: its curve so far is lost\n")
    assert before == {path: path.read_bytes() for path in before}


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
    run_dir = tmp_path / "run"
    assert f"stopped and saved; cartpole cannot be resumed, its policies are in {run_dir}" in said
    assert not rundir.checkpoints(run_dir)
    _, record = rundir.load_arrays(run_dir / "policy_s001.npz")
    assert (record["step"], record["return"]) == (3 * 32, None)
    assert "--resume" not in said

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "trace", interrupt)
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "other"))
    assert (status, said) == (130, "stopped at once; cartpole cannot be resumed\n")


def test_a_closed_pipe_ends_the_help(tmp_path, monkeypatch, capsys):
    """`--help | head -1`: no error, and Python's own flush at its end finds no broken pipe."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    with pytest.raises(SystemExit) as end:
        session.main("ppo", ["--help"])
    assert end.value.code == 0
    sys.stdout.close()
    assert capsys.readouterr().err == ""


def test_only_a_new_run_is_told_that_it_has_no_preset(tmp_path):
    run_dir = str(tmp_path / "run")
    said = "ppo has no preset for this task"
    assert said in run(*FLAGS, "--env", "probe/value", "--run-dir", run_dir)[1]
    longer = run("--resume", run_dir, "--total-timesteps", "384")[1]
    assert "384" in longer
    assert said not in longer


def test_advice_can_be_pasted(tmp_path):
    stopped = session_of(run_dir=str(tmp_path / "a run"))
    stopped.program = SimpleNamespace(stateful=False)
    assert stopped.advice == f"go on with --resume '{tmp_path}/a run'"


@pytest.mark.parametrize(
    ("seeds", "interval"),
    [
        ("5", r"95 % interval \[\d+\.\d+, \d+\.\d+\]"),
        ("2", r"lowest and highest seed \[\d+\.\d+, \d+\.\d+\]"),
        ("1", ""),
    ],
)
def test_last_lines_of_a_launch(tmp_path, seeds, interval):
    """One seed has no interval, and that of up to four is their range. The worst seed is named."""
    _, said = run(*FLAGS, "--num-seeds", seeds, "--run-dir", str(tmp_path / "run"))
    lines = said.splitlines()
    (i,) = (i for i, x in enumerate(lines) if x.startswith("final greedy return"))
    number = r"\d+\.\d+"
    assert re.fullmatch(
        f"final greedy return: IQM {number}{interval and ', ' + interval}", lines[i]
    )
    done = rundir.read_run(tmp_path / "run")
    worst = report.number(
        done.final.mean(-1).min(), report.decimals(report.iqm(done.final.mean(-1)))
    )
    assert lines[i + 1].startswith(f"  worst seed: {worst}; seeds alive: {seeds} of {seeds}; ")


def test_interrupt_of_the_imports(tmp_path):
    process = start(*FLAGS, "--run-dir", str(tmp_path / "run"), PYTHONPROFILEIMPORTTIME="1")
    for line in process.stderr:
        if line.endswith("jax._src.config\n"):  # one of many that are still to come
            break
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == -signal.SIGINT
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("seeds", ["1", "2"])
def test_a_launch_heeds_both_interrupts_within_an_update(tmp_path, seeds):
    """Of a minute, with calls of MuJoCo through Python; on one device and on two."""
    flags = ["--env", "gym/Hopper-v5", "--num-seeds", seeds, "--num-steps", "100000"]
    flags += ["--total-timesteps", "10000000", "--run-dir", str(tmp_path / "run")]
    process = start(*flags)
    for line in process.stderr:
        if " | IQM " in line:
            break
    time.sleep(2)  # into the first rollout
    limit = threading.Timer(20, process.kill)
    limit.start()
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "ctrl-C again" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130
    limit.cancel()
    assert said.startswith(f"stopped at once; go on with --resume {tmp_path / 'run'}\n")


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


def test_a_run_that_goes_on_with_another_file_says_so(tmp_path, capsys):
    resumed = session_of(resume=str(tmp_path), run_dir=str(tmp_path))
    rundir.write_json(tmp_path / "meta.json", {"source": "of another ppo.py"})
    for said in ("algos/ppo.py has changed: from here on the new file learns\n", ""):
        resumed.write_description([])
        assert capsys.readouterr().err == said
