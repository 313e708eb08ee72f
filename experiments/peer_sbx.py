"""PPO of SBX on a MuJoCo task for `experiments/benchmark.py --peer sbx`, in SBX's own Python.

    SBX_PYTHON experiments/peer_sbx.py '{"env": "Hopper-v5", "num_updates": 4, ...}'

The argument holds the sizes. One line of JSON tells the versions; then each line of standard input
is answered by `num_updates` updates of one seed. Observations and rewards are normalised, as in our
preset. Nothing of this project is imported.
"""

import importlib.metadata
import json
import sys
import time

import flax.linen as nn
from sbx import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


def main():
    """Make the learner, then let it go on once for each line."""
    given = json.loads(sys.argv[1])
    size = given["num_envs"] * given["num_steps"]
    env = VecNormalize(make_vec_env(given["env"], n_envs=given["num_envs"], seed=0))
    learner = PPO(
        "MlpPolicy",
        env,
        learning_rate=given["learning_rate"],
        n_steps=given["num_steps"],
        batch_size=size // given["num_minibatches"],
        n_epochs=given["num_epochs"],
        policy_kwargs={
            "net_arch": given["hidden"],
            "activation_fn": getattr(nn, given["activation"]),
        },
        seed=0,
    )
    names = ("sbx-rl", "stable-baselines3", "gymnasium", "mujoco", "jax")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps({"versions": versions}), flush=True)
    for _ in sys.stdin:
        before, start = learner.num_timesteps, time.perf_counter()
        learner.learn(given["num_updates"] * size, reset_num_timesteps=False)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "steps": learner.num_timesteps - before}), flush=True)


if __name__ == "__main__":
    main()
