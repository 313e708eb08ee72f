"""Endurance: a run that is killed again and again ends as the run that nothing stopped.

PUREPO_KILLS=1000 pytest -m slow -n 0 -s tests/test_kills.py
"""

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from typing import NamedTuple

import pytest
from launching import checkpoint, events, start, strict_json
from tiny import assert_same, lines_of

from algos.launch import rundir

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("PUREPO_KILLS", "20"))
LIMIT = 300.0  # seconds; a start that takes longer hangs
UPDATES = 80
# 40 evaluations after two updates each; every third is followed by a checkpoint, and so is the last
FLAGS = ["--env", "gym/InvertedPendulum-v5", "--num-seeds", "2", "--num-envs", "4"]
FLAGS += ["--num-steps", "8", "--num-epochs", "1", "--num-minibatches", "2", "--hidden", "8"]
FLAGS += ["--total-timesteps", str(UPDATES * 32), "--num-evals", "40", "--checkpoint-every", "3"]
FLAGS += ["--eval-episodes", "2", "--final-episodes", "6", "--partial-at-return", "20"]
FLAGS += ["--tensorboard"]


class Ended(NamedTuple):
    status: int
    said: str
    compiled: float  # seconds from the start until it had compiled; 0 if it was killed before
    seconds: float  # until its end


def play(argv, cache, seconds=2 * LIMIT, share=None):
    """Start the program, and kill it some seconds later.

    With `share`, so long after it has compiled as this share of the time until then: machines that
    are busy take longer for everything.
    """
    variables = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONFAULTHANDLER": "1"}
    process = start(*argv, JAX_COMPILATION_CACHE_DIR=str(cache), **variables)
    begun, compiled, said = time.monotonic(), 0.0, []
    hang = threading.Timer(LIMIT, process.send_signal, [signal.SIGABRT])  # it says where it hangs
    kill = threading.Timer(seconds, process.kill)
    hang.start()
    if share is None:
        kill.start()
    for line in process.stderr:
        said.append(line)
        if line.startswith("memory:"):
            compiled = time.monotonic() - begun
            if share is not None:
                kill.interval = share * compiled
                kill.start()
    status, seconds = process.wait(), time.monotonic() - begun
    for timer in (hang, kill):
        timer.cancel()
    return Ended(status, "".join(said), compiled, seconds)


def assert_same_run(mine, other):
    """The same files, and all that is in them but times."""
    known = lambda run_dir: {p.name for p in run_dir.rglob("*") if p.parent.name not in SEVERAL}
    assert known(mine) == known(other)
    assert (mine / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert_same(checkpoint(mine, UPDATES), checkpoint(other, UPDATES))
    for path in other.glob("*.npz"):
        one, two = (rundir.read_arrays(run_dir / path.name) for run_dir in (mine, other))
        assert_same(*({k: v for k, v in x.items() if k != "seconds"} for x in (one, two)))
    untimed = lambda line: {k: v for k, v in line.items() if not timed(k)}
    assert [*map(untimed, lines_of(mine))] == [*map(untimed, lines_of(other))]
    one, two = ([x for x in events(run_dir) if not timed(x[1])] for run_dir in (mine, other))
    assert one == two
    one, two = (strict_json(run_dir / "done.json") for run_dir in (mine, other))
    assert one | {"seconds": 0} == two | {"seconds": 0}


# A resumed run has one more file of events, and may have one more checkpoint.
SEVERAL = {"tensorboard", "checkpoints"}


def timed(name):
    return name.startswith(("time/", "charts/SPS"))


def stage(run_dir):
    """How far a run was when it was killed."""
    if not (run_dir / "config.json").exists():
        return "no run directory"
    if (run_dir / "done.json").exists():
        return "done"
    saved = rundir.checkpoints(run_dir)
    if not saved:
        return "no checkpoint"
    return "at the end" if int(saved[-1].stem) == UPDATES else "in the middle"


def test_a_run_that_is_killed_at_any_moment_and_resumed_is_the_same_run(tmp_path):
    """Half of the kills come before training begins; one start in nine must end by itself."""
    rng, cache = random.Random(KILLS), tmp_path / "cache"
    command = lambda run_dir: [*FLAGS, "--run-dir", str(run_dir)]
    first, whole, run_dir = (tmp_path / name for name in ("first", "whole", "killed"))
    for path in (first, whole):  # one that compiles, and one that finds its program in the cache
        ended = play(command(path), cache)
        assert ended.status == 0, ended.said
    assert_same_run(first, whole)
    assert list(whole.glob("partial_*.npz"))

    compiled = ended.compiled
    training = ended.seconds / compiled - 1.0
    stages, clock = Counter(), time.monotonic()
    while stages.total() < KILLS:
        shutil.rmtree(run_dir, ignore_errors=True)
        while not (run_dir / "done.json").exists():
            found = (run_dir / "config.json").exists()
            argv = ["--resume", str(run_dir)] if found else command(run_dir)
            saved = rundir.checkpoints(run_dir)[-1:]
            early, late = rng.uniform(0.0, compiled), rng.uniform(0.0, 1.25 * training)
            moments = [{"seconds": early}, {"share": late}, {}]
            (moment,) = rng.choices(moments, [4, 4, 1]) if stages.total() < KILLS else [{}]
            status, said, *times = play(argv, cache, **moment)
            compiled = times[0] or compiled
            assert status in (0, -signal.SIGKILL), said
            assert "warning" not in said
            assert "| start" not in said or not saved, "it began again from the start"
            assert rundir.checkpoints(run_dir)[-1:] >= saved
            if status:
                stages[stage(run_dir)] += 1
        assert_same_run(run_dir, whole)
        pace = (time.monotonic() - clock) / max(1, stages.total())
        print(f"{stages.total()} kills, {pace:.1f} s each: {dict(stages)}", flush=True)
