"""Partial policies: what --partial-at-return exports, and when."""

import json

import numpy as np
import pytest
from launching import FLAGS, checkpoint, run, session_of

from algos.launch import policies, rundir

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


def test_partial_policies(tmp_path):
    """Exported where two evaluations in a row first reach the return; the run goes on as it was."""
    run_dir = tmp_path / "run"
    status, said = run(*FLAGS, "--partial-at-return", "5", "--run-dir", str(run_dir))
    assert status == 0
    assert sorted(p.name for p in run_dir.glob("partial_*")) == [
        f"partial_s00{i}.npz" for i in (0, 1)
    ]
    assert said.count("reached the return") == 2
    assert rundir.read_run(run_dir).steps.tolist() == [0, 96, 192]
    params = checkpoint(run_dir, 3)
    for i in range(2):
        with np.load(run_dir / f"partial_s00{i}.npz") as file:
            saved = {name: file[name] for name in file.files}
        reached = float(rundir.read_run(run_dir).returns[i, 1].mean())
        wanted = {"seed": i, "label": "", "step": 96, "return": reached}
        assert json.loads(str(saved.pop("__meta__"))).items() >= wanted.items()
        assert any("kernel" in name for name in saved)
        for name, x in saved.items():
            whole_name = name.replace("['actor']", ".params['actor']").replace(
                "['obs_stats']", ".obs_stats"
            )
            np.testing.assert_array_equal(x, params[whole_name][i])
        assert policies.load_policy(run_dir / f"partial_s00{i}.npz")(np.zeros(4)).shape == ()


def test_a_partial_policy_needs_two_evaluations_in_a_row():
    session = session_of(partial_at_return=10.0)
    # per evaluation, the mean return of five rows: at once, never twice, late, dead, too late
    means = np.array(
        [
            [11, 11, 0, 11, 0],
            [10, 9, 0, np.nan, 0],
            [12, 11, 11, np.nan, 9.9],
            [13, 9, 10, np.nan, 11],
            [14, 11, 12, np.nan, 9],
        ]
    )
    exported = []
    for count in range(len(means) + 1):
        session.evals = {"returns": [np.stack([x - 1, x + 1], 1) for x in means[:count]]}
        exported.append(list(session.partial_rows()))
    assert exported == [[], [], [0], [], [2], []]
    evals = session.evals
    session = session_of()
    session.evals = evals
    assert not len(session.partial_rows())
