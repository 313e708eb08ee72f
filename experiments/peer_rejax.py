"""PPO of rejax on CartPole, for `experiments/benchmark.py --peer rejax`; runs in rejax's own Python.

    REJAX_PYTHON experiments/peer_rejax.py '{"num_seeds": 16, "num_envs": 32, ...}'

The argument holds the sizes; one line of JSON comes back. Nothing of this project is imported.
"""

import importlib.metadata
import json
import statistics
import sys
import time

import jax
import rejax


def main():
    """Compile, then time whole trainings."""
    sizes = json.loads(sys.argv[1])
    num_seeds, calls = sizes.pop("num_seeds"), sizes.pop("calls")
    network = {
        "hidden_layer_sizes": sizes.pop("hidden"),
        "activation": sizes.pop("activation"),
    }
    algo = rejax.PPO.create(
        env="CartPole-v1",
        agent_kwargs=network,
        **sizes,
        # rejax evaluates inside its training loop: once, at the end, and with nothing to do
        eval_freq=sizes["total_timesteps"],
        skip_initial_evaluation=True,
    ).replace(eval_callback=lambda algo, state, key: ())
    keys = jax.random.split(jax.random.PRNGKey(0), num_seeds)
    start = time.perf_counter()
    train = jax.jit(jax.vmap(algo.train)).lower(keys).compile()
    compiled = time.perf_counter() - start
    jax.block_until_ready(train(keys))
    rates, cpu = [], []
    for _ in range(calls):
        start, start_cpu = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(train(keys))
        steps = int(state.global_step.sum())
        rates.append(steps / (time.perf_counter() - start))
        cpu.append(1e6 * (time.process_time() - start_cpu) / steps)
    names = ("rejax", "gymnax", "jax", "jaxlib", "flax", "optax")
    result = {
        "train": statistics.median(rates),
        "cpu_microseconds": statistics.median(cpu),
        "compile": compiled,
        "devices": 1,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
