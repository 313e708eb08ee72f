"""EnvPool's MuJoCo tasks for `experiments/benchmark.py --peer envpool`, in EnvPool's own Python.

    ENVPOOL_PYTHON experiments/peer_envpool.py '{"env": "Hopper-v5", "num_envs": 64, ...}'

One line of JSON tells the versions; then each line of standard input is answered by `num_steps`
steps of all environments with random actions, which are drawn beforehand. Nothing of this project
is imported.
"""

import importlib.metadata
import json
import sys
import time

import envpool
import numpy as np


def main():
    """Make the environments, then step them for each line."""
    given = json.loads(sys.argv[1])
    num_envs, num_steps = given["num_envs"], given["num_steps"]
    env = envpool.make_gymnasium(
        given["env"], num_envs=num_envs, num_threads=given["threads"], seed=0
    )
    env.reset()
    low, high = env.action_space.low, env.action_space.high
    actions = np.random.default_rng(0).uniform(low, high, (num_steps, num_envs, *low.shape))
    versions = {
        name: importlib.metadata.version(name) for name in ("envpool", "gymnasium", "numpy")
    }
    print(json.dumps({"versions": versions}), flush=True)
    for _ in sys.stdin:
        resets, start = 0, time.perf_counter()
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            resets += int(np.count_nonzero(terminated | truncated))
        seconds = time.perf_counter() - start
        # the step after an end only resets
        print(json.dumps({"seconds": seconds, "steps": num_envs * num_steps - resets}), flush=True)


if __name__ == "__main__":
    main()
