"""What a launch leaves when it ends early, and what --resume makes of it."""

import shutil
import signal

import jax
import numpy as np
import pytest
from launching import FLAGS, checkpoint, content, events, run, session_of
from tiny import assert_same, lines_of

from algos.launch import logs, rows, rundir, session

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


def test_a_crash_before_the_first_checkpoint_costs_the_start_only(whole, copy):
    shutil.rmtree(copy / "checkpoints")
    rundir.rewind(copy, 2, 96, write=True)
    begun = session_of(verbose=0)
    begun.run_dir, begun.rows = copy, rows.Rows(np.arange(2), {}, [""] * 2)
    begun.restore()
    assert not (copy / "eval.npz").exists()  # it would say more than the new start has done
    crashed = logs.EventFile(copy / "tensorboard", -1)
    crashed.write(0, {"eval/episodic_return": -1.0})
    crashed.close()
    (path,) = (copy / "tensorboard").iterdir()
    path.rename(path.with_name("events.out.tfevents.0"))  # long ago
    status, said = run("--resume", str(copy), "--tensorboard")
    assert status == 0
    assert f"{copy} has no checkpoint: it starts again" in said.splitlines()
    assert_same(checkpoint(copy), checkpoint(whole[0]))
    assert [x["global_step"] for x in lines_of(copy)] == [0, 96, 96, 192, 192, 192]
    shown = [step for step, tag, _ in events(copy) if tag == "eval/episodic_return"]
    assert shown == [0, 96, 192]


def test_a_copy_without_checkpoints_keeps_its_curve(copy):
    """A run that got this far has written checkpoints: without them it is a copy."""
    shutil.rmtree(copy / "checkpoints")
    before = content(copy)
    status, said = run("--resume", str(copy))
    assert status == 2
    message = f"error: {copy} has 3 evaluations and no checkpoint, as a copy has: start a new run"
    assert said.splitlines()[-1].startswith(message)
    assert content(copy) == before


def test_a_run_that_saves_only_at_its_end_begins_again(copy):
    """After a crash it has evaluations and no checkpoint, and is no copy."""
    shutil.rmtree(copy / "checkpoints")
    described = rundir.read_json(copy / "config.json")
    described["launch"]["checkpoint_every"] = 0
    rundir.write_json(copy / "config.json", described)
    status, said = run("--resume", str(copy))
    assert status == 0
    assert "has no checkpoint: it starts again" in said


def test_a_folder_with_other_arrays_is_not_written_to(tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.ones(1))
    before = content(tmp_path)
    status, said = run(*FLAGS, "--run-dir", str(tmp_path))
    assert (status, said) == (
        2, f"error: {tmp_path} is not empty (mine.npz): choose another --run-dir\n"
    )  # fmt: skip
    assert content(tmp_path) == before


def test_a_run_whose_seeds_all_died_is_complete(tmp_path):
    """It is saved when they are dead, whatever the interval of checkpoints is."""
    flags = ["--learning-rate", "1e30", "--max-grad-norm", "1e30", "--checkpoint-every", "0"]
    status, _ = run(*FLAGS, *flags, "--run-dir", str(tmp_path / "run"))
    assert status == 3
    before = content(tmp_path)
    status, said = run("--resume", str(tmp_path / "run"))
    assert status == 2
    assert said.endswith(f"\nerror: {tmp_path / 'run'} is complete: every seed died\n")
    assert content(tmp_path) == before
    (tmp_path / "run" / "done.json").unlink()  # killed before its end
    num_lines = len(lines_of(tmp_path / "run"))
    status, _ = run("--resume", str(tmp_path / "run"))
    assert status == 3  # no dead seed was trained on
    assert len(lines_of(tmp_path / "run")) == num_lines


def test_a_restored_state_is_not_beside_another_one(whole, copy, monkeypatch):
    """The first state is gone when the saved one comes to the device."""
    kernels = lambda: sum(x.shape == (2, 4, 8) for x in jax.live_arrays())
    held, place, before = [], session.place, kernels()

    def placed(tree, shardings):
        held.append(kernels() - before)
        return place(tree, shardings)

    assert (2, 4, 8) in {x.shape for x in jax.tree.leaves(checkpoint(whole[0]))}
    monkeypatch.setattr(session, "place", placed)
    assert run("--resume", str(copy))[0] == 0
    assert held == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_the_pictures_says_that_the_rest_is_done(tmp_path, monkeypatch, number):
    """The first signal ends them, as nothing is left to save."""
    interrupt = lambda *_: signal.raise_signal(number)
    monkeypatch.setattr(session.render, "render_run", interrupt)
    succeeded, close = [], logs.Log.close
    monkeypatch.setattr(logs.Log, "close", lambda log, x: succeeded.append(x) or close(log, x))
    run_dir = tmp_path / "run"
    status, said = run(*FLAGS, "--render", "--verbose", "0", "--run-dir", str(run_dir))
    assert (status, succeeded) == (130, [True])
    assert said.endswith(f"complete: draw it with python experiments/render.py {run_dir}\n")


def test_pictures_are_left_out_after_a_signal(tmp_path, monkeypatch):
    """One that comes while the curve is drawn."""
    plot = session.report.plot_curves

    def interrupt(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return plot(*args, **options)

    monkeypatch.setattr(session.report, "plot_curves", interrupt)
    run_dir = tmp_path / "run"
    status, said = run(*FLAGS, "--render", "--verbose", "0", "--run-dir", str(run_dir))
    assert status == 0
    last = f"stopped; the run is complete: draw it with python experiments/render.py {run_dir}"
    assert said.splitlines()[-1] == last
    assert not (run_dir / "videos").exists()
