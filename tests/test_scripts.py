"""Scripts import from their own checkout, and leave a user's modules alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script, *argv, cwd, **variables):
    """A script's output; it must end with status 0."""
    done = subprocess.run(
        [sys.executable, str(script), *argv],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_clone_runs_its_own_code(tmp_path):
    """Even if another clone is the installed one."""
    for folder in ("algos", "envs", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / "algos" / "launch" / "cli.py"
    changed = path.read_text().replace("num_evals: PositiveInt = 20", "num_evals: PositiveInt = 77")
    path.write_text(changed)
    assert "(default: 77)" in run(tmp_path / "algos" / "ppo.py", "--help", cwd=tmp_path)


ENVIRONMENT = """
from common import SIDE  # the user's own, not algos/common.py
from datasets import SIDE as SECOND
from launch import SIDE as THIRD

import envs.probes


def make():
    print("made", SIDE, SECOND, THIRD)
    return envs.probes.make("action")
"""


def test_a_users_modules_are_found_under_any_name(tmp_path):
    """The names of the script itself and of modules that it imports."""
    for side, module in enumerate(("common", "datasets", "launch"), 1):
        (tmp_path / f"{module}.py").write_text(f"SIDE = {side}\n")
    (tmp_path / "ppo.py").write_text(ENVIRONMENT)
    flags = "--total-timesteps 64 --num-envs 2 --num-steps 32 --hidden 4 --num-evals 1"
    flags += " --final-episodes 1 --eval-episodes 1 --num-epochs 1 --num-minibatches 1 --verbose 0"
    argv = ["--env", "ppo:make", *flags.split(), "--run-dir", str(tmp_path / "run")]
    said = run(ROOT / "algos" / "ppo.py", *argv, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "made 1 2 3" in said


def test_a_task_loads_without_warps_kernels():
    """mujoco.mjx would import them, which takes two seconds, whether a task uses them or not."""
    code = """
import sys, envs
envs.make("inverted_pendulum", 1)
assert "mujoco.mjx" in sys.modules
assert not [x for x in sys.modules if x.split(".")[0] == "warp"]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
