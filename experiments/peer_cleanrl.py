"""PPO of CleanRL for `experiments/benchmark.py --peer cleanrl`, in CleanRL's own Python.

    CLEANRL/.venv/bin/python experiments/peer_cleanrl.py '{"env": "Hopper-v5", "num_envs": 16, ...}'

The Python is that of a virtual environment in a checkout of CleanRL, whose script
cleanrl/ppo_continuous_action.py runs once for each line of standard input, with one seed. The time
is from its first step, as the script reports it. The argument holds the sizes; those of the
networks are the script's own. Nothing of this project is imported.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(sys.prefix).parent / "cleanrl" / "ppo_continuous_action.py"


def main():
    """Run the script once for each line."""
    given = json.loads(sys.argv[1])
    steps = given["num_updates"] * given["num_envs"] * given["num_steps"]
    flags = {
        "env-id": given["env"],
        "total-timesteps": steps,
        "num-envs": given["num_envs"],
        "num-steps": given["num_steps"],
        "update-epochs": given["num_epochs"],
        "num-minibatches": given["num_minibatches"],
        "learning-rate": given["learning_rate"],
    }
    command = [sys.executable, str(SCRIPT)]
    command += [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    versions = {name: importlib.metadata.version(name) for name in ("gymnasium", "mujoco", "torch")}
    print(json.dumps({"versions": versions}), flush=True)
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:  # it writes to ./runs
            said = subprocess.run(
                command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
            )
        rates = [line.split()[1] for line in said.stdout.splitlines() if line.startswith("SPS:")]
        print(json.dumps({"seconds": steps / float(rates[-1]), "steps": steps}), flush=True)


if __name__ == "__main__":
    main()
