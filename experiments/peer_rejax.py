"""PPO of rejax on CartPole for `experiments/benchmark.py --peer rejax`, in rejax's own Python.

    REJAX_PYTHON experiments/peer_rejax.py '{"num_seeds": 16, "num_updates": 50, ...}'

The argument holds the sizes. One line of JSON tells the compile seconds; then each line of standard
input is answered by one whole training and its seconds. Nothing of this project is imported.
"""

import importlib.metadata
import json
import sys
import time

import jax
import rejax


def main():
    """Compile, then train once for each line."""
    sizes = json.loads(sys.argv[1])
    network = {"hidden_layer_sizes": sizes["hidden"], "activation": sizes["activation"]}
    steps = sizes["num_updates"] * sizes["num_envs"] * sizes["num_steps"]
    same = ("num_envs", "num_steps", "num_epochs", "num_minibatches", "learning_rate")
    algo = rejax.PPO.create(
        env="CartPole-v1",
        agent_kwargs=network,
        total_timesteps=steps,
        # rejax evaluates inside its training loop: once, at the end, and with nothing to do
        eval_freq=steps,
        skip_initial_evaluation=True,
        **{name: sizes[name] for name in same},
    ).replace(eval_callback=lambda algo, state, key: ())
    keys = jax.random.split(jax.random.PRNGKey(0), sizes["num_seeds"])
    start = time.perf_counter()
    train = jax.jit(jax.vmap(algo.train)).lower(keys).compile()
    seconds = time.perf_counter() - start
    names = ("rejax", "gymnax", "jax", "jaxlib", "flax", "optax")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps({"compile": seconds, "devices": 1, "versions": versions}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train(keys))
        seconds = time.perf_counter() - start
        if int(state.global_step[0]) != steps:
            raise RuntimeError(f"rejax trained {state.global_step[0]} steps and not {steps}")
        print(json.dumps({"seconds": seconds, "steps": len(keys) * steps}), flush=True)


if __name__ == "__main__":
    main()
