"""Collect a dataset for offline learning with trained policies.

    python experiments/collect_data.py RUN_DIR/partial_s000.npz --type eps1 --out data/hopper.npz
    python experiments/collect_data.py --mixture mixture.json --out data/hopper.npz
    python experiments/collect_data.py RUN_DIR/policy_s000.npz --format minari --out hopper/pure-v0

POLICY is any policy that an algorithm here exported. The types of data are those of Wu et al. 2019;
shares are of steps, and parts are collected one after the other:

    pure                 the policy's own, sampled actions
    eps1, eps3           20 % uniform actions, 40 % pure, 40 % pure in which an action is replaced
                         by a uniform one with probability 0.1 or 0.3
    gaussian1, gaussian3 the same, the last part with Gaussian noise of std 0.1 or 0.3 added

A mixture of your own is a list of parts in JSON:

    [{"share": 2}, {"share": 4, "policy": "A/policy_s000.npz"},
     {"share": 4, "policy": "B/policy_s003.npz", "eps": 0.1, "std": 0.0}]

A part without a policy acts uniformly. Finished parts are kept in OUT.parts until the dataset is
complete; after an interruption, run the same command again.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from pydantic import NonNegativeFloat, PositiveFloat

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import envs
from algos import common
from algos.launch import cli, datasets, evaluation, logs, policies, program, rundir
from algos.launch.datasets import Dataset

MAX_ACTION = 0.999  # noisy actions are clipped to this
STREAM = 1000  # steps of each of the environments that collect a part side by side
CHUNK = 100  # steps between two moves of the progress bar
EVAL_EPISODES = 20

# --- mixtures ---


@dataclass(frozen=True)
class Part:
    """One collecting policy and its share of the steps."""

    share: PositiveFloat = 1.0
    policy: str = ""  # exported policy; empty: uniform actions
    eps: common.UnitFloat = 0.0  # probability that an action is replaced by a uniform one
    std: NonNegativeFloat = 0.0  # std of the noise added to an action

    def validate(self) -> None:
        """Raise ValueError for noise without a policy."""
        if not self.policy and (self.eps or self.std):
            raise ValueError(f"{self}: noise needs a policy to be added to")


def parts_of(kind: str, policy: str) -> list[Part]:
    """The parts of a type of data."""
    pure = Part(4, policy)
    if kind == "pure":
        return [pure]
    field, level = ("eps", kind[3:]) if kind.startswith("eps") else ("std", kind[8:])
    return [Part(2), pure, dataclasses.replace(pure, **{field: int(level) / 10})]


TYPES = ("pure", "eps1", "eps3", "gaussian1", "gaussian3")


def read_mixture(path: Path) -> list[Part]:
    """The parts in a file; paths of policies are relative to it."""
    try:
        listed = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a mixture: {error}") from None
    if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
        raise ValueError(f"{path} is not a mixture: a list of parts is wanted")
    known = [field.name for field in dataclasses.fields(Part)]
    wrong = sorted({name for part in listed for name in part} - {*known})
    if wrong:
        raise ValueError(f"{path}: a part has no {', '.join(wrong)}, but {', '.join(known)}")
    parts = [Part(**part) for part in listed]
    try:
        for part in parts:
            common.check(part)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not parts:
        raise ValueError(f"{path} has no parts")
    find = lambda part: str(path.parent / rundir.expanded(part.policy)) if part.policy else ""
    return [dataclasses.replace(part, policy=find(part)) for part in parts]


def counts_of(n: int, parts: list[Part]) -> list[int]:
    """Steps of each part: its share rounded down, what remains to the last."""
    total = sum(part.share for part in parts)
    counts = [int(n * part.share / total) for part in parts[:-1]]
    counts.append(n - sum(counts))
    if min(counts) < 1:
        raise ValueError(f"--steps {n} are too few: the parts would get {counts}")
    return counts


def task_of(parts: list[Part], env: str) -> str:
    """The environment that all policies were trained in, or `env` if there are none."""
    abouts = [policies.describe_policy(Path(part.policy)) for part in parts if part.policy]
    found = {envs.canonical(about["config"]["env"]) for about in abouts}
    found |= {envs.canonical(env)} if env else set()
    if len(found) != 1:
        raise ValueError(
            f"policies and --env name the tasks {', '.join(sorted(found))}: one is needed"
            if found
            else "no policy says which task: give --env"
        )
    return found.pop()


# --- collection ---


def actor_of(parts: list[Part], env: envs.Env) -> Callable:
    """act(obs [N, obs_size], key, part) -> action [N, action_size], in [-1, 1].

    Which of the parts acts is an argument, so that one compiled program serves all.
    """

    def uniform(obs, key):
        return jax.random.uniform(key, (len(obs), env.action_size), minval=-1.0, maxval=1.0)

    def load_act(path):
        known, algo, policy = policies.read_policy(path)
        policies.check_task(path, known, env)
        return policies.act_of(known, algo, policy)

    paths = list(dict.fromkeys(part.policy for part in parts))
    acts = [load_act(path) if path else uniform for path in paths]
    policy_of = jnp.array([paths.index(part.policy) for part in parts])
    eps, std = (jnp.array([getattr(part, x) for part in parts]) for x in ("eps", "std"))

    def act(obs, key, part):
        key_policy, key_noise, key_uniform, key_replace = jax.random.split(key, 4)
        action = jax.lax.switch(policy_of[part], acts, obs, key_policy)
        action = jnp.clip(action, -1.0, 1.0) + std[part] * jax.random.normal(
            key_noise, (len(obs), env.action_size)
        )
        bound = jnp.where(std[part] > 0.0, MAX_ACTION, 1.0)
        replace = jax.random.bernoulli(key_replace, eps[part], (len(obs), 1))
        return jnp.where(replace, uniform(obs, key_uniform), jnp.clip(action, -bound, bound))

    return act


def make_collect(env: envs.Env, act: Callable) -> Callable:
    """collect(part, count, key, advance) -> Dataset of `count` steps of a part.

    They are streams of about STREAM steps, each of one environment, whose last row is terminated or
    truncated. If a part needs fewer streams than there are environments, the steps of the others
    are thrown away.
    The action at the end of an episode is the policy's at the true successor, and is not taken.
    Steps of broken physics are left out, and the step before such a step is marked as truncated.
    """

    @jax.jit
    def start(part, key):
        key_reset, key_act = jax.random.split(key)
        obs, env_state = env.reset(key_reset)
        return obs, env_state, act(obs, key_act, part)

    @jax.jit
    def chunk(part, carry, keys):
        def step(carry, key):
            obs, env_state, action = carry
            key_step, key_next, key_fresh = jax.random.split(key, 3)
            fresh, env_state, reward, terminated, truncated, info = env.step(
                key_step, env_state, action
            )
            next_obs = info["final_observation"]
            next_action = act(next_obs, key_next, part)
            # an observation may be of integers or flags
            numbers = (x.astype(jnp.float32) for x in (obs, action, reward, next_obs, next_action))
            row = Dataset(*numbers, terminated, truncated)
            ended = (terminated | truncated)[:, None]
            carry = fresh, env_state, jnp.where(ended, act(fresh, key_fresh, part), next_action)
            return carry, (*row, info["env_nan"])

        return jax.lax.scan(step, carry, keys)

    def collect(part, count, key, advance):
        num_streams = min(env.num_envs, max(1, round(count / STREAM)))
        length = -(-count // num_streams)
        key_start, key = jax.random.split(key)
        carry = start(part, key_start)
        chunks = []
        for i in range(-(-length // CHUNK)):
            keys = jax.random.split(jax.random.fold_in(key, i), CHUNK)
            carry, rows = chunk(part, carry, keys)
            chunks.append([x[:, :num_streams] for x in jax.device_get(rows)])
            advance(min(CHUNK * num_streams, count - i * CHUNK * num_streams))
        streams = [np.swapaxes(np.concatenate(x)[:length], 0, 1) for x in zip(*chunks, strict=True)]
        *columns, broken = (x.reshape(-1, *x.shape[2:])[:count] for x in streams)
        dataset = Dataset(*columns)
        last = (np.arange(count) % length == length - 1) | (np.arange(count) == count - 1)
        cut = dataset.truncated | last | np.roll(broken, -1)
        dataset = dataset._replace(truncated=cut & ~dataset.terminated)
        return Dataset(*(x[~broken] for x in dataset))

    return collect


def make_evaluate(env: envs.Env, act: Callable) -> Callable:
    """evaluate(part, key) -> returns [num_envs], of one episode of a part in each environment.

    It is cut into calls of CHUNK steps, so that ctrl-C is heeded.
    """
    begin = jax.jit(lambda key: evaluation.begin(env, key[None]))

    @jax.jit
    def advance(part, play):
        sampled = lambda _, obs, key, __: act(obs, key, part)
        return evaluation.advance(sampled, None, env, play, CHUNK)

    def evaluate(part, key):
        play = begin(key)
        while play.alive.any():
            play = advance(part, play)
        return np.asarray(play.returns[0])

    return evaluate


# --- files ---


def describe(task: str, parts: list[Part], counts: list[int], seed: int) -> dict[str, Any]:
    """Everything that decides what is collected."""
    digest = lambda path: hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    listed = [
        dataclasses.asdict(part) | {"sha256": digest(part.policy), "count": count}
        for part, count in zip(parts, counts, strict=True)
    ]
    return {"env": task, "seed": seed, "parts": listed}


def content(description: dict[str, Any]) -> dict[str, Any]:
    """A description with policies by their content, whatever their paths are."""
    parts = [{k: x for k, x in part.items() if k != "policy"} for part in description["parts"]]
    return description | {"parts": parts}


def finished(path: Path, description: dict[str, Any]) -> tuple[Dataset, dict] | None:
    """Dataset and returns of a part that an interrupted command left; None if it left none.

    ValueError if the part is of another command.
    """
    if not path.exists():
        return None
    dataset, meta = datasets.read(path)
    if "of" not in meta or content(meta["of"]) != content(description):
        raise ValueError(f"{path.parent} is of another command: delete it or choose another --out")
    return dataset, meta["returns"]


def write_minari(
    name: str, out: Path, dataset: Dataset, meta: dict[str, Any], env: envs.Env
) -> None:
    """Write a Minari dataset, with actions of the task's own range, to its folder `out`.

    If that fails or is interrupted, nothing is left there.
    """
    import gymnasium
    from minari import create_dataset_from_buffers
    from minari.data_collector import EpisodeBuffer

    middle, half = datasets.middle_and_half(env)
    unbounded = np.full(env.obs_size, np.inf, np.float32)
    buffers = []
    for obs, action, reward, terminated in datasets.to_episodes(dataset):
        last = np.arange(len(action)) == len(action) - 1
        buffers.append(
            EpisodeBuffer(
                observations=list(obs),
                actions=list(middle + half * action),
                rewards=list(reward),
                terminations=list(last & terminated),
                truncations=list(last & (not terminated)),
            )
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for an author, an algorithm and the like
            create_dataset_from_buffers(
                name,
                buffers,
                observation_space=gymnasium.spaces.Box(-unbounded, unbounded),
                action_space=gymnasium.spaces.Box(middle - half, middle + half),
                description=json.dumps(meta),
            )
    except BaseException:  # ctrl-C too: the same command would find the folder and stop
        shutil.rmtree(out, ignore_errors=True)
        raise


@logs.steady()
def main(argv: list[str] | None = None) -> None:
    """Collect from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "policy", nargs="?", type=cli.path, metavar="POLICY", help="policy_sNNN.npz of a run"
    )
    parser.add_argument("--type", choices=TYPES, help="mixture to collect; default: pure")
    parser.add_argument(
        "--mixture", type=cli.path, help="file of parts, in place of POLICY and --type"
    )
    parser.add_argument("--env", default="", help="task, if no policy says it")
    parser.add_argument("--steps", type=cli.integer, default=1_000_000, help="rows to collect")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of start states and noise")
    parser.add_argument("--out", required=True, help="file to write, or name of a Minari dataset")
    parser.add_argument("--format", choices=("npz", "minari"), default="npz", help="of the file")
    args = parser.parse_args(argv)
    try:
        with contextlib.ExitStack() as held:
            run(args, held)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped: the same command goes on after the last complete part\n")


def run(args: argparse.Namespace, held: contextlib.ExitStack) -> None:
    """Collect the parts that are not there yet, and put them together.

    No other process can do the same until `held` is closed.
    """
    if bool(args.policy) == bool(args.mixture) or (args.mixture and args.type):
        raise ValueError("give POLICY, with or without --type, or --mixture")
    kind = args.type or "pure"
    parts = read_mixture(args.mixture) if args.mixture else parts_of(kind, str(args.policy))
    out = output_of(args.out, args.format)
    check_absent(out)
    rundir.check_new([out], force=True)  # the folder can be written to
    counts = counts_of(args.steps, parts)
    program.setup_jax(1)
    task = task_of(parts, args.env)
    env = envs.make(task, 1)
    if env.discrete:
        raise ValueError(f"{task} has discrete actions, and datasets have continuous ones")
    act = actor_of(parts, env)
    make_env = functools.partial(envs.make, task, stagger=False, reset_mode="fresh")
    evaluate = make_evaluate(make_env(EVAL_EPISODES), act)
    collect = make_collect(make_env(max(1, round(max(counts) / STREAM))), act)
    plan = describe(task, parts, counts, args.seed)
    folder = out.with_name(f"{out.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    held.callback(rundir.lock(folder).release)
    check_absent(out)  # again: another process may have just written it
    collected, returns = zip(*collect_parts(plan, folder, evaluate, collect), strict=True)
    dataset = Dataset(*map(np.concatenate, zip(*collected, strict=True)))
    try:
        datasets.check(dataset, str(out), env)
    except ValueError:  # the parts would give the same error again
        shutil.rmtree(folder)
        raise
    listed = [
        part | {"returns": numbers, "broken": part["count"] - len(found.obs)}
        for part, numbers, found in zip(plan["parts"], returns, collected, strict=True)
    ]
    meta = plan | {"parts": listed, "commit": logs.commit(), "versions": logs.versions()}
    check_absent(out)  # again: collecting may take hours
    if args.format == "minari":
        write_minari(args.out, out, dataset, meta, env)
    else:
        datasets.write(out, dataset, meta)
    shutil.rmtree(folder)
    print(f"{len(dataset.obs):,} steps of {task}: {out}")
    print("\n".join(map(summary, listed)))


def output_of(name: str, form: str) -> Path:
    """The file or folder to write; ValueError or ImportError if that cannot be done."""
    if form == "npz":
        out = rundir.expanded(name)
        if out.suffix.lower() in datasets.HDF5:
            raise ValueError(f"--out {out}: it would be read as HDF5: {out.with_suffix('.npz')}")
        return out
    if not re.search(r"-v\d+$", name):
        raise ValueError(f"--out {name}: Minari's names end with a version: {name}-v0")
    try:
        import minari
    except ImportError:
        raise ImportError('--format minari: pip install -e ".[minari]"') from None
    # Minari refuses a name here, not after hours of collection.
    minari.dataset.minari_dataset.parse_dataset_id(name)
    return datasets.minari_root() / name


def check_absent(out: Path) -> None:
    """ValueError if `out` exists."""
    if out.exists():
        raise ValueError(f"{out} exists already: choose another --out")


def collect_parts(plan: dict[str, Any], folder: Path, evaluate: Callable, collect: Callable):
    """Dataset and returns of each part; what `folder` holds already is not collected again."""
    counts = [part["count"] for part in plan["parts"]]
    with tqdm.tqdm(total=sum(counts), unit=" steps", unit_scale=True) as bar:
        for i, count in enumerate(counts):
            path = folder / f"{i}.npz"
            part = finished(path, plan)
            if part:
                bar.update(count)
            else:
                key = jax.random.fold_in(jax.random.key(plan["seed"]), i)
                key_eval, key = jax.random.split(key)
                returns = evaluate(i, key_eval)
                numbers = {"mean": float(returns.mean()), "std": float(returns.std())}
                part = collect(i, count, key, bar.update), numbers
                about = {"env": plan["env"], "of": plan, "returns": numbers}
                datasets.write(path, part[0], about)
            yield part


def summary(part: dict[str, Any]) -> str:
    """One line about a part that was collected."""
    name, returns = part["policy"] or "uniform actions", part["returns"]
    return (
        f"  {part['count']:>9,}  {name} eps={part['eps']:g} std={part['std']:g}: "
        f"return {returns['mean']:.1f}, std {returns['std']:.1f} of {EVAL_EPISODES} episodes"
        + (f", without {part['broken']:,} of broken physics" if part["broken"] else "")
    )


if __name__ == "__main__":
    main()
