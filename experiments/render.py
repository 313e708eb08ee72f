"""Pictures of what was learnt: one greedy episode of the best, the median and the worst seed.

    python experiments/render.py RUN_DIR

Seeds are ranked by their final evaluation. All start from the same state; the pictures go to
RUN_DIR/videos.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from algos.launch import cli, logs, program, render


@logs.steady()
def main(argv: list[str] | None = None):
    """Render from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("run_dir", type=cli.path, metavar="RUN_DIR", help="a finished run")
    args = parser.parse_args(argv)
    try:
        program.setup_jax(1)
        paths = render.render_run(args.run_dir)
    except ValueError as error:
        parser.error(str(error))
    raise SystemExit(0 if paths else 1)


if __name__ == "__main__":
    main()
