"""Write an exported policy as an ONNX model, for programs that have neither Python nor JAX.

    python experiments/export.py RUN_DIR/policy_s000.npz --out policy.onnx

The model takes `obs` [N, obs_size] as the environment gives them and returns the greedy `action`,
[N] or [N, action_size] in [-1, 1]. The observation statistics are inside. It needs the extra onnx.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from algos.launch import cli, logs, policies, program, rundir


def to_onnx(path: Path) -> Any:
    """The ONNX model of a policy; its metadata are those of the policy's file, in JSON."""
    about = policies.describe_policy(path)
    try:
        import jax2onnx
        import onnx
    except ImportError as error:
        raise ImportError(f'{error}: pip install -e ".[onnx]"') from None
    if about["algo"] == "bcq":
        raise ValueError(f"{path}: no ONNX for BCQ, which draws its greedy actions at random")
    env, algo, policy = policies.read_policy(path)
    obs = policies.interface_of(env)["obs"]
    try:
        model = jax2onnx.to_onnx(
            policies.act_of(env, algo, policy),
            [jax.ShapeDtypeStruct(("N", obs["size"]), obs["dtype"])],
            model_name=about["algo"],
            input_names=["obs"],
            output_names=["action"],
        )
    except Exception as error:  # jax2onnx raises what jax and its own plugins raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: no ONNX for a policy of {about['algo']} ({reason})") from None
    onnx.helper.set_model_props(model, {"policy": json.dumps(about)})
    return model


@logs.steady()
def main(argv: list[str] | None = None) -> None:
    """Export from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("policy", type=cli.path, metavar="POLICY", help="policy_sNNN.npz of a run")
    parser.add_argument("--out", type=cli.path, required=True, help="file to write: .onnx")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    try:
        program.setup_jax(1)
        if args.out.suffix != ".onnx":
            raise ValueError(f"--out {args.out}: its name is to end in .onnx")
        rundir.check_new([args.out], args.force)
        model = to_onnx(args.policy)
        rundir.write_atomic(args.out, lambda file: file.write(model.SerializeToString()))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    main()
