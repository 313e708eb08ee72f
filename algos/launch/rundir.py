"""The run directory: the format of what a launch writes, and how it is read again.

    config.json  meta.json  metrics.jsonl  eval.npz  final.npz  policy_s000.npz  partial_s000.npz
    done.json
    checkpoints/  plots/  videos/  tensorboard/  wandb/  .lock

Numbers are JSON or numpy arrays without pickles. `session.py` writes it, experiments read it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import TypeAdapter, ValidationError

# The generator of all keys. A seed gives the same run under any JAX_DEFAULT_PRNG_IMPL.
PRNG = "threefry2x32"

# --- trees of arrays as .npz, keyed by tree path ---


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by tree path, typed keys as their key data."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): jax.random.key_data(x) if is_key(x) else x for path, x in leaves
    }


def save_arrays(path: Path, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write arrays by name, and `meta` as JSON, to `path`; either all of it or nothing."""
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    # bfloat16 is not a numpy type: store the bits, the template knows the type.
    arrays = {k: x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for k, x in arrays.items()}
    text = np.array(json.dumps(meta, default=lambda x: x.item()))  # numbers of numpy and jax
    write_atomic(path, lambda file: np.savez(file, **arrays, __meta__=text))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; ValueError that names the file if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # damage may show in numpy, zipfile, zlib or tokenize
        # numpy takes anything else for a pickle, and its message says how to load one: do not. It
        # returns the array of a .npy, which `with` refuses.
        known = "pickle" in str(error) or isinstance(error, TypeError)
        reason = "it is no .npz of plain arrays" if known else error
        raise ValueError(f"{path} is damaged or not ours ({reason})") from None


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata that `save_arrays` wrote; ValueError if the file is damaged."""
    arrays = read_arrays(path)
    try:
        meta = json.loads(str(arrays.pop("__meta__")))
    except (KeyError, ValueError):
        meta = None
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is damaged or not ours (no __meta__)")
    return arrays, meta


def load_tree(path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """Read what `save_arrays(path, flatten(tree), meta)` wrote, into the shape of `template`.

    Raises ValueError if the file is damaged, or names what is missing, unexpected or changed.
    """
    try:
        arrays, meta = load_arrays(path)
    except ValueError as error:
        others = path.parent.name == "checkpoints" and len(checkpoints(path.parents[1])) > 1
        advice = ": delete it to use the one before" if others else ""
        raise ValueError(f"{error}{advice}") from None
    wanted = {
        jax.tree_util.keystr(path): jax.eval_shape(jax.random.key_data, x) if is_key(x) else x
        for path, x in jax.tree_util.tree_flatten_with_path(template)[0]
    }
    problems = [f"missing {name}" for name in wanted.keys() - arrays.keys()]
    problems += [f"unexpected {name}" for name in arrays.keys() - wanted.keys()]
    stored = lambda x: np.dtype(np.uint16 if x.dtype == jnp.bfloat16 else x.dtype)
    problems += [
        f"{name} is {arrays[name].dtype}{list(arrays[name].shape)}, not {x.dtype}{list(x.shape)}"
        for name, x in wanted.items()
        if name in arrays and (arrays[name].shape, arrays[name].dtype) != (x.shape, stored(x))
    ]
    if problems:
        raise ValueError(f"{path} does not fit this configuration: " + "; ".join(problems[:5]))

    def restore(path, x):
        array = arrays[jax.tree_util.keystr(path)]
        if is_key(x):
            return jax.random.wrap_key_data(array, impl=PRNG)
        return array.view(jnp.bfloat16) if x.dtype == jnp.bfloat16 else array

    return jax.tree_util.tree_map_with_path(restore, template), meta


def write_atomic(path: Path, write: Callable) -> None:
    """Call `write(binary file)` and put the file in place only when it is complete on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        raise


def check_new(paths: Iterable[Path | None], force: bool) -> None:
    """ValueError if a file that is to be written exists, unless `force`, or cannot be written.

    Paths that are None are skipped.
    """
    for path in filter(None, paths):
        if path.exists() and not force:
            raise ValueError(f"{path} exists: choose another name, or --force to replace it")
        folder = next(x for x in path.absolute().parents if x.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{path}: {folder} is no folder that can be written to")


def write_text(path: Path, text: str) -> None:
    """Write a text file; either all of it or nothing."""
    write_atomic(path, lambda file: file.write(text.encode()))


def measurement_files(out: Path, force: bool) -> tuple[Path, Path]:
    """OUT.md and OUT.json, in a folder that exists from now on.

    ValueError if one of them exists, unless `force`, or if OUT has no name.
    """
    table, numbers = (out.with_name(f"{out.name}{end}") for end in (".md", ".json"))
    check_new((table, numbers), force)
    out.parent.mkdir(parents=True, exist_ok=True)
    return table, numbers


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def jsonable(value: Any) -> Any:
    """Plain numbers and lists, null for what is not finite."""
    array = np.asarray(value, np.float64)
    if array.ndim:
        return [jsonable(x) for x in array]
    return float(array) if np.isfinite(array) else None


def is_key(x: Any) -> bool:
    """True for arrays of typed keys, and their shapes."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def read_json(path: Path, **wanted: type) -> dict[str, Any]:
    """The object in a JSON file; ValueError that names the file if it is damaged.

    `wanted` are names that the object must have, and the types of their values.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (no object)")
    for name, kind in wanted.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{path} is damaged or not ours (no {kind.__name__} {name!r})")
    return value


def expanded(path: Path | str) -> Path:
    """The path with the home directory for ~; ValueError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


# --- one process, one run ---


def lock(run_dir: Path) -> filelock.FileLock:
    """The lock of a run directory, held; ValueError if another process holds it."""
    held = filelock.FileLock(run_dir / ".lock", timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise ValueError(f"{run_dir} is in use by another process: wait until it ends") from None
    return held


def files(run_dir: Path) -> list[Path]:
    """What a run has written to the directory, by name."""
    names = ["config.json", "meta.json", "metrics.jsonl", "done.json", "checkpoints", "*.npz"]
    names += ["plots", "tensorboard", "videos", "wandb"]
    return sorted(path for name in names for path in run_dir.glob(name))


# --- checkpoints ---


def save_checkpoint(run_dir: Path, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    """Save the flattened state after `meta["update"]` updates and keep the last two."""
    save_arrays(run_dir / "checkpoints" / f"{meta['update']:09d}.npz", arrays, meta)
    for old in checkpoints(run_dir)[:-2]:
        old.unlink()


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [x for x in (run_dir / "checkpoints").glob("*.npz") if x.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))  # from 10**9 on the names are longer


# --- reading a run ---

FURTHER = "_returns"  # end of the name of an array with the returns of a further policy


class Run(NamedTuple):
    """A finished or running launch, as read from its directory."""

    path: Path
    algo: str
    config: dict[str, Any]
    launch: dict[str, Any]
    labels: list[str]  # one per row: the swept values, or ""
    seeds: np.ndarray  # [R]
    steps: np.ndarray  # [E] steps of one seed: of environments, offline of gradients
    seconds: np.ndarray  # [E] of training, without compilation and evaluation
    returns: np.ndarray  # [R, E, K] greedy evaluation; NaN where a seed is dead
    lengths: np.ndarray  # [R, E, K]
    further: dict[str, np.ndarray]  # returns [R, E, K] of an algorithm's further policies
    final: np.ndarray  # [R, F] returns of the last evaluation with all its episodes
    final_further: dict[str, np.ndarray]  # the same of further policies
    done: dict[str, Any] | None  # None if the launch did not reach its end


def read_description(run_dir: Path) -> dict[str, Any]:
    """What config.json says: algo, config, launch and rows; ValueError if it does not."""
    path = run_dir / "config.json"
    try:
        saved = read_json(path, algo=str, config=dict, launch=dict, rows=dict)
        if not isinstance(saved["config"].get("env"), str):
            raise ValueError(f"{path} is damaged or not ours (no env in 'config')")
    except ValueError as error:
        raise ValueError(f"{run_dir} is not a run directory: {error}") from None
    return saved


def read_run(run_dir: Path | str) -> Run:
    """Read a run directory; ValueError if it is not one."""
    path = Path(run_dir)
    saved = read_description(path)
    rows, kinds = saved["rows"], {"seeds": int, "labels": str}
    lists = all(
        isinstance(rows.get(name), list) and {type(x) for x in rows[name]} == {kind}
        for name, kind in kinds.items()
    )
    if not lists or len(rows["seeds"]) != len(rows["labels"]):
        raise ValueError(f"{path / 'config.json'} is damaged or not ours (no seeds and labels)")
    num_rows = len(rows["seeds"])
    evals = read_evals(path / "eval.npz", num_rows)
    further = further_of(evals)
    final = {"returns": evals["returns"][:, -1]} | {
        returns_of(name): x[:, -1] for name, x in further.items()
    }
    if (path / "final.npz").exists():  # else unfinished, or made before this file existed
        final = read_final(path / "final.npz", num_rows)
    return Run(
        path=path,
        algo=saved["algo"],
        config=saved["config"],
        launch=saved["launch"],
        labels=rows["labels"],
        seeds=np.array(rows["seeds"]),
        steps=evals["steps"],
        seconds=evals["seconds"],
        returns=evals["returns"],
        lengths=evals["lengths"],
        further=further,
        final=final["returns"],
        final_further=further_of(final),
        done=read_done(path / "done.json"),
    )


def read_done(path: Path) -> dict[str, Any] | None:
    """What done.json says, None if the run has not ended; ValueError if it is damaged."""
    if not path.exists():
        return None
    done = read_json(path, seconds=dict)
    seconds = done["seconds"]
    numbers = all(isinstance(x, int | float) for x in seconds.values())
    if not numbers or not {"train", "compile"} <= seconds.keys():
        raise ValueError(f"{path} is damaged or not ours (no seconds of train and compile)")
    return done


def read_evals(path: Path, num_rows: int) -> dict[str, np.ndarray]:
    """The arrays of eval.npz, as `write_evals` describes them; ValueError if it is damaged."""
    if not path.exists():
        raise ValueError(f"{path.parent} has no evaluation yet")
    evals = read_arrays(path)
    count = evals["steps"].size if "steps" in evals else 0
    per_row = {"returns", "lengths", *map(returns_of, further_of(evals))}
    shapes = {"steps": (count,), "seconds": (count,)} | dict.fromkeys(per_row, (num_rows, count))
    for name, shape in shapes.items():
        if not count or name not in evals or evals[name].shape[:2] != shape:
            raise ValueError(f"{path} is damaged or not ours (no {name} of {count} evaluations)")
    return evals


def read_final(path: Path, num_rows: int) -> dict[str, np.ndarray]:
    """The arrays of final.npz, as `write_final` describes them; ValueError if it is damaged."""
    final = read_arrays(path)
    if "returns" not in final or any(
        x.shape[:1] != (num_rows,) or x.ndim != 2 for x in final.values()
    ):
        raise ValueError(f"{path} is damaged or not ours (no returns of {num_rows} rows)")
    return final


def read_metrics(run_dir: Path, num_rows: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps [T] and values [T, R] of each metric in metrics.jsonl; ValueError if it is damaged.

    A number of the whole launch is repeated for every row. null and what is not finite become NaN.
    """
    path = run_dir / "metrics.jsonl"
    found: dict[str, list[tuple[float, np.ndarray]]] = {}
    for i, (_, record) in enumerate(records_of(path)):
        step = float(record["global_step"])
        for name, value in record.items():
            try:
                values = np.broadcast_to(np.array(value, np.float64), num_rows)
            except (ValueError, TypeError):
                raise ValueError(
                    f"{path} is damaged in line {i + 1} ({name} has not {num_rows} numbers)"
                ) from None
            found.setdefault(name, []).append((step, np.where(np.isfinite(values), values, np.nan)))
    return {
        name: (np.array([step for step, _ in records]), np.array([x for _, x in records]))
        for name, records in found.items()
    }


def returns_of(policy: str) -> str:
    """Name of the array with the returns of a policy: "" is the main one, others are `further`."""
    return f"{policy}{FURTHER}" if policy else "returns"


def further_of(evals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns of further policies by their names."""
    return {x.removesuffix(FURTHER): evals[x] for x in evals if x.endswith(FURTHER)}


def from_json(
    config_type: type,
    values: dict[str, Any],
    source: str = "config.json",
    extra: Literal["forbid", "ignore"] = "forbid",
) -> Any:
    """A config dataclass from its JSON in the file `source`; ValueError if a field is damaged.

    `extra` says what happens to fields that the dataclass, or one inside it, does not have.
    """
    try:
        # Lists become tuples again.
        return TypeAdapter(config_type).validate_python(values, extra=extra)
    except ValidationError as error:
        problems = [(".".join(map(str, x["loc"])), x) for x in error.errors()]
    unknown = [name for name, x in problems if x["type"] == "unexpected_keyword_argument"]
    if unknown:
        raise ValueError(
            f"{source} was written by another version, which had {', '.join(sorted(unknown))}"
        )
    name, problem = problems[0]
    raise ValueError(f"{source}: {name}={problem['input']!r}: {problem['msg']}")


# --- writing and resuming a run ---


def write_evals(run_dir: Path, evals: dict[str, list]) -> None:
    """Write eval.npz: steps [E], seconds [E], returns [R, E, K], lengths [R, E, K].

    Further policies of an algorithm have NAME_returns [R, E, K].
    """
    arrays = {name: np.stack(values, min(1, np.ndim(values[0]))) for name, values in evals.items()}
    write_atomic(run_dir / "eval.npz", lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def write_final(run_dir: Path, final: dict[str, np.ndarray]) -> None:
    """Write final.npz: returns and lengths [R, F] of the last evaluation with all its episodes.

    Further policies of an algorithm have NAME_returns [R, F].
    """
    write_atomic(run_dir / "final.npz", lambda file: np.savez(file, **final))  # type: ignore[arg-type]


def rewind(run_dir: Path, num_rows: int, step: int, write: bool) -> dict[str, list]:
    """The evaluations up to `step`; if `write`, the files of the run keep none after it.

    Metrics of the last evaluation (`final/...`) go too: the resumed run plays it again.
    """
    path = run_dir / "metrics.jsonl"
    kept = [
        line
        for line, record in records_of(path)
        if float(record["global_step"]) <= step and "final/episodic_return" not in record
    ]
    evals = evals_until(run_dir / "eval.npz", num_rows, step)
    if write:
        write_text(path, "".join(kept))
        if evals:
            write_evals(run_dir, evals)
        else:
            (run_dir / "eval.npz").unlink(missing_ok=True)
    return evals


def evals_until(path: Path, num_rows: int, step: int) -> dict[str, list]:
    """The evaluations up to `step`, as `write_evals` takes them."""
    # Before the first one there is no file; with a negative step another host may delete it.
    if step < 0 or not path.exists():
        return {}
    evals = read_evals(path, num_rows)
    keep = np.flatnonzero(evals["steps"] <= step)
    if not len(keep):
        return {}
    return {name: [x[i] if x.ndim == 1 else x[:, i] for i in keep] for name, x in evals.items()}


def records_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl and what they say, without a last one that was cut short.

    Empty without the file; ValueError that names a damaged line before the last one.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    found = []
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
            float(record["global_step"])
            if not line.endswith("\n"):
                raise ValueError("it has no end")
        except (ValueError, KeyError, TypeError) as error:
            if i == len(lines) - 1:
                break
            raise ValueError(f"{path} is damaged in line {i + 1} ({error})") from None
        found.append((line, record))
    return found


def digest(tree: Any) -> str:
    """SHA-256 of the leaves of a tree, their names and types."""
    sha = hashlib.sha256()
    for name, x in flatten(tree).items():
        sha.update(f"{name} {x.dtype} {x.shape}".encode())
        sha.update(np.ascontiguousarray(x).data)
    return sha.hexdigest()


def source_digest(name: str) -> str:
    """SHA-256 of the file of an algorithm."""
    path = Path(__file__).parents[1] / f"{name}.py"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_data(run_dir: Path, digests: list[str]) -> None:
    """ValueError if a run learned from other data than these."""
    path = run_dir / "meta.json"
    if path.exists() and read_json(path, data=list)["data"] != digests:
        raise ValueError(
            f"cannot resume {run_dir}: the dataset or the clones are not those it learned from"
            " (or, with clones, it ran on another number of hosts)"
        )
