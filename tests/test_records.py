"""What a run records: returns, lengths, seeds, broken steps and seconds."""

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from launching import FLAGS, run, session_of, strict_json
from tiny import lines_of

from algos.launch import logs, rundir, session

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


def test_what_a_run_records(tmp_path):
    """Of a task whose rewards are not 1, and a first seed that is not 0."""
    flags = ["--env", "test_evaluation:generous", "--seed", "5", "--checkpoint-every", "0"]
    run(*FLAGS, *flags, "--run-dir", str(tmp_path / "run"))
    found = rundir.read_run(tmp_path / "run")
    assert (found.lengths == 4).all()
    assert (found.returns == 12).all()
    lengths = [x.get("eval/episodic_length") for x in lines_of(tmp_path / "run")]
    assert [x for x in lengths if x] == [[4, 4]] * 3
    meta = rundir.load_arrays(tmp_path / "run" / "policy_s000.npz")[1]
    assert meta["seed"] == 5
    assert [x.name for x in rundir.checkpoints(tmp_path / "run")] == ["000000006.npz"]


def test_a_run_that_fails_at_its_end_is_closed_as_failed(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left")

    closed = []
    monkeypatch.setattr(rundir, "write_final", fail)
    monkeypatch.setattr(logs.Log, "close", lambda log, complete: closed.append(complete))
    assert run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))[0] == 1
    assert closed == [False]


@pytest.mark.parametrize(
    ("every", "saved"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6])]
)
def test_a_checkpoint_every_few_evaluations_and_at_the_end(tmp_path, monkeypatch, every, saved):
    """Six updates with an evaluation after each."""
    found = []
    monkeypatch.setattr(session.Session, "save", lambda self, _: found.append(self.update))
    flags = ["--num-evals", "6", "--checkpoint-every", str(every), "--verbose", "0"]
    run(*FLAGS, *flags, "--run-dir", str(tmp_path / "run"))
    assert found == saved


def test_the_last_episodes_are_not_one_part_repeated(whole):
    final = rundir.read_run(whole[0]).final.reshape(2, 3, 2)  # seeds, parts, episodes
    assert all(len(np.unique(parts, axis=0)) > 1 for parts in final)


def test_an_evaluation_waits_for_every_policy(monkeypatch):
    """Episodes of the further policy here take three slices, those of the main one a single one."""
    monkeypatch.setattr(session, "SLICE_SECONDS", 0.0)
    Play = namedtuple("Play", "alive returns lengths broken")
    left = {"": 1, "max_q": 3}

    def plays():
        shape, ones = (5, 2), np.ones((5, 2), int)
        return {
            name: Play(np.full(shape, n > 0), np.full(shape, 0.0 if n else 7.0), ones, ones[:, 0])
            for name, n in left.items()
        }

    def play(state, _, length):
        for name in left:
            left[name] = max(0, left[name] - 1)
        return plays()

    launched = session_of(verbose=0)
    launched.program = SimpleNamespace(begin=lambda keys: plays(), play=play)
    assert (launched.play(None)["max_q_returns"] == 7).all()


def test_dead_seeds_break_no_physics(capsys):
    """Their actions may be NaN, and what follows is of no interest."""
    ones = np.ones((5, 2), int)
    plays = {
        "": namedtuple("Play", "alive returns lengths broken")(0 * ones, ones, ones, ones[:, 0])
    }
    launched = session_of(verbose=0)
    launched.dead[:2] = True
    launched.program = SimpleNamespace(begin=lambda keys: plays, play=lambda *_: plays)
    launched.play(None)
    assert capsys.readouterr().err.startswith("3 steps of evaluation had a reward or")


def breaking():
    """A task whose second step is broken."""
    raw = tiny.counter(discrete=True)

    def step(*args):
        obs, t, reward, terminated, info = raw.step(*args)
        return obs, t, reward, terminated, info | {"env_nan": t == 2}

    return raw._replace(step=step)


def test_broken_steps_are_counted_and_said_once(tmp_path):
    flags = ["--env", "test_records:breaking", "--run-dir", str(tmp_path / "run")]
    _, said = run(*FLAGS, *flags)
    for where in ("training", "evaluation"):
        assert said.count(f"steps of {where} had a reward or observation that is not finite") == 1
    counts = [x["health/env_nan"][0] for x in lines_of(tmp_path / "run") if "health/env_nan" in x]
    assert 80 < sum(counts) <= 100  # about every second of 192


def test_seconds_are_those_of_their_parts(tmp_path, monkeypatch):
    """Compilation takes 1000 s here, an update 10 s and a call of an evaluation half a second."""
    now, calls, left, compile_ahead = [0.0], [], [], session.compile_ahead
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logs.Log, "evaluation", lambda log, *args: left.append(args[-1]))

    def slow(function, seconds):
        def called(*args):
            now[0] += seconds
            calls.append(seconds)
            return function(*args)

        return called

    def compiled(*args):
        made = slow(compile_ahead, 1000.0)(*args)
        return made._replace(train=slow(made.train, 10.0), play=slow(made.play, 0.5))

    monkeypatch.setattr(session, "compile_ahead", compiled)
    monkeypatch.setattr(session, "memory_text", lambda *_: "")
    monkeypatch.setattr(session, "check_memory", lambda *_: None)
    run_dir = tmp_path / "run"
    run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    seconds = strict_json(run_dir / "done.json")["seconds"]
    parts = {"compile": 1000.0, "train": 60.0, "eval": 0.5 * calls.count(0.5)}
    assert seconds == parts | {"wall": sum(parts.values())}
    assert rundir.read_run(run_dir).seconds.tolist() == [0.0, 30.0, 60.0]  # of training alone
    first, half, end = left
    assert first is None
    assert 30.0 < half < 35.0
    assert end == 0.0
    speeds = [x["charts/SPS"] for x in lines_of(run_dir) if "charts/SPS" in x]
    assert speeds == [2 * 32 / 10.0] * 2  # 2 seeds, 32 steps in an update

    saved = rundir.load_arrays(rundir.checkpoints(run_dir)[-1])[1]["seconds"]
    run("--resume", str(run_dir), "--verbose", "0", "--total-timesteps", "256")
    seconds = strict_json(run_dir / "done.json")["seconds"]
    assert (seconds["compile"], seconds["train"]) == (2000.0, 80.0)
    assert seconds["wall"] == seconds["compile"] + seconds["train"] + seconds["eval"]
    assert seconds["wall"] > saved["wall"] + 1000.0


def test_a_resumed_run_keeps_its_id_and_its_history(tmp_path):
    ids = []
    for flags in ({}, {"resume": str(tmp_path)}, {"resume": str(tmp_path)}):
        begun = session_of(run_dir=str(tmp_path), **flags)
        ids.append(begun.write_description([])["id"])
    saved = strict_json(tmp_path / "meta.json")
    assert {*ids} == {saved["id"]}
    assert len(saved["resumed"]) == 2
