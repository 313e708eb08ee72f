"""What reads a run: exported policies, curves."""

import json

import numpy as np
import pytest

from algos.launch import report, rundir

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


def test_a_policy_that_is_not_there(whole):
    with pytest.raises(ValueError, match=r"policy_s007.npz does not exist; there: policy_s000.npz"):
        rundir.load_policy(whole[0] / "policy_s007.npz")
    with pytest.raises(ValueError, match="not a run directory"):
        rundir.read_run(whole[0] / "plots")


def test_curves_and_groups(whole):
    run = rundir.read_run(whole[0])
    middle, lo, hi = report.curve_of(run.returns)
    np.testing.assert_allclose(middle, run.returns.mean((0, 2)))
    assert ((lo <= middle) & (middle <= hi)).all()
    swept = run._replace(labels=["b", "a"])
    assert [(x, i.tolist()) for x, i in report.groups(swept)] == [("b", [0]), ("a", [1])]


def test_a_policy_says_what_observations_it_takes(whole):
    act = rundir.load_policy(whole[0] / "policy_s000.npz")
    assert act([0.0, 0.1, 0.0, 0.1]).shape == ()
    assert act(np.zeros((3, 4))).shape == (3,)
    for shape in ((3,), (2, 3), (2, 2, 4), ()):
        with pytest.raises(ValueError, match=r"obs has shape .*: \[4\] or \[N, 4\] is wanted"):
            act(np.zeros(shape))
    with pytest.raises(ValueError, match=r"is a folder, name a policy; there: policy_s000.npz"):
        rundir.load_policy(whole[0])


def test_a_policy_of_an_older_version_can_be_loaded(copy):
    """Its config.json may have fields that are gone."""
    observation = np.zeros(4)
    expected = rundir.load_policy(copy / "policy_s000.npz")(observation)
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["clip_epsilon"] = 0.2
    (copy / "config.json").write_text(json.dumps(saved))
    assert rundir.load_policy(copy / "policy_s000.npz")(observation) == expected
