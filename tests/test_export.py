"""Policies as ONNX models: onnxruntime acts as `load_policy` does."""

import json
import sys

import numpy as np
import pytest
import tiny

from algos.launch import policies
from experiments import export


def exported(path):
    """onnxruntime's session of the model that the script writes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    model = path.with_suffix(".onnx")
    export.main([str(path), "--out", str(model)])
    return onnxruntime.InferenceSession(model)


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("ppo", "cartpole"),
        ("ppo", "pendulum"),
        ("ppo", "breakout"),
        ("reppo", "pendulum"),
        ("reppo_discrete", "cartpole"),
        ("sac", "pendulum"),
    ],
)
def test_onnxruntime_acts_alike(name, env, tmp_path):
    path = tiny.write_policy(tmp_path / "policy.npz", name, env=env)
    session, act = exported(path), policies.load_policy(path)
    about = policies.describe_policy(path)
    obs = np.random.default_rng(1).normal(size=(100, about["obs"]["size"]))
    obs = (obs > 0) if about["obs"]["dtype"] == "bool" else np.float32(2.0 * obs)
    for count in (1, 100):
        (action,) = session.run(["action"], {"obs": obs[:count]})
        assert action.shape == (count, 1)[: action.ndim]
        np.testing.assert_allclose(action, act(obs[:count]), atol=1e-5)
    assert len(np.unique(action)) > 1
    saved = session.get_modelmeta().custom_metadata_map
    assert json.loads(saved["policy"]) == about


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    path = tiny.write_policy(tmp_path / "policy_s000.npz", "bcq")

    def refused(*argv):
        with pytest.raises(SystemExit, match="2"):
            export.main([*map(str, argv)])
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jax2onnx", None)
        assert 'pip install -e ".[onnx]"' in refused(path, "--out", tmp_path / "x.onnx")
    assert refused(path, "--out", tmp_path / "x.html").endswith("is to end in .onnx\n")
    pytest.importorskip("jax2onnx")
    missing = tmp_path / "policy_s001.npz"
    assert "does not exist; there: policy_s000" in refused(missing, "--out", tmp_path / "x.onnx")
    assert "no ONNX for BCQ" in refused(path, "--out", tmp_path / "x.onnx")
    (tmp_path / "old.onnx").write_text("mine")
    assert "exists: choose another name, or --force" in refused(
        path, "--out", tmp_path / "old.onnx"
    )
    assert not (tmp_path / "x.onnx").exists()
