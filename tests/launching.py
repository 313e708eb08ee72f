"""Launches of the tiny PPO: they share its flags, so that it compiles once."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny
from tensorboardX.proto import event_pb2

from algos import launch, ppo
from algos.launch import cli, rows, session

ROOT = Path(__file__).parents[1]
LAUNCH = ["--num-seeds", "2", "--eval-episodes", "2", "--num-evals", "2"]
LAUNCH += ["--checkpoint-every", "1", "--final-episodes", "6"]
FLAGS = [*tiny.flags_of(tiny.config_of("ppo")), *LAUNCH]


def run(*argv):
    """Launch in this process; returns exit status and stderr."""
    stderr, status = io.StringIO(), 0
    with contextlib.redirect_stderr(stderr):
        try:
            launch.main("ppo", [*argv])
        except SystemExit as error:
            status = error.code
    return status, stderr.getvalue()


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


def parse(*argv):
    return cli.parse("ppo", ppo.Config, ppo.PRESETS, [*argv])


def session_of(**flags):
    """A launch of five seeds that has not begun."""
    five = rows.Rows(np.arange(5), {}, [""] * 5)
    return session.Session("ppo", tiny.config_of("ppo"), cli.Launch(**flags), five)


def content(folder):
    """Bytes of all files below a folder."""
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def checkpoint(run_dir, update=6):
    with np.load(run_dir / "checkpoints" / f"{update:09d}.npz") as file:
        return {name: file[name] for name in file.files if name != "__meta__"}


def events(run_dir):
    """(step, tag, value) as TensorBoard shows them; a restart drops all from its step on."""
    shown = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            if len(data) < 16 + size:
                break  # it was killed as it wrote
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [x for x in shown if x[0] < event.step]
            shown += [(event.step, x.tag, x.simple_value) for x in event.summary.value]
    return shown


def strict_json(path):
    """JSON as other languages read it, which know no NaN."""

    def refuse(text):
        raise AssertionError(f"{text} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)
