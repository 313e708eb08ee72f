"""BNPO: brains, presets, errors, JSON and flags."""

import dataclasses
import json
import math

import pytest
import tiny

from algos import bnpo, common
from algos.bnpo import DDPG_BRAIN, PPO_BRAIN
from algos.launch import cli, rundir


def with_brain(k, **changes):
    """The default configuration with changes of one brain."""
    brains = list(bnpo.Config().brains)
    brains[k] = dataclasses.replace(brains[k], **changes)
    return {"brains": tuple(brains)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"brains": ()}, r"brains=\(\): at least one is needed"),
        ({"brains": ({"rule": "ppo"},)}, "brains="),
        (
            with_brain(1, turn_interval=0),
            r"brains\[1\].turn_interval=0: it should be greater than 0",
        ),
        (
            with_brain(0, her_ratio=12.0),
            r"brains\[0\].her_ratio=12.0: it should be less than or equal",
        ),
        (with_brain(1, her_ratio=math.nan), r"brains\[1\].her_ratio=nan"),
        (with_brain(0, learning_rate="1"), r"brains\[0\].learning_rate='1'"),
        (with_brain(0, rule="sac"), r"brains\[0\].rule='sac': it should be 'ppo', 'ddpg' or"),
        (with_brain(0, mean_only=True), r"brains\[0\].mean_only=True: rule='ppo' has no gradient"),
        (with_brain(1, turn_minibatches=0.0), r"brains\[1\].turn_minibatches=0.0"),
        (
            {"total_timesteps": 3_600},
            r"brains\[0\] never learns: it needs 3 of 3 episodes before its first turn",
        ),
        (
            with_brain(1, turn_interval=20_000),
            r"brains\[1\] never .* turn every 20000 steps: lower",
        ),
        ({"max_nstep": 60}, "max_nstep=60: it should be less than num_steps=60"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        common.check(bnpo.Config(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", dataclasses.fields(bnpo.Brain), ids=lambda field: field.name)
def test_every_field_of_a_brain_has_bounds(field):
    value = getattr(PPO_BRAIN, field.name)
    wrong = [None, "no such word"] if isinstance(value, (bool, str)) else [None, "1", -1, math.nan]
    for bad in wrong:
        with pytest.raises(ValueError, match=rf"brains\[0\].{field.name}="):
            common.check(bnpo.Config(**with_brain(0, **{field.name: bad})))


NO_HER = with_brain(1, her_ratio=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "cartpole"}, "discrete actions"),
        (
            {"env": "pendulum"},
            "has no goals: add --reward-kind env --brains.0.her-ratio 0 --brains.1.her-ratio 0",
        ),
        ({"env": "pendulum", "reward_kind": "env"}, "has no goals: add"),
        ({"env": "pendulum", **NO_HER}, "has no goals: add"),
        ({"her_strategy": "future"}, "gives constant goals: take 'shift'"),
        ({"env": "tiny:seek", "reward_kind": "sparse"}, "'sparse': choose from env, proxy"),
    ],
)
def test_what_an_environment_lacks_is_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        bnpo.make_env(bnpo.Config(**changes))
    assert "\n" not in str(error.value)


def test_a_task_without_goals_is_accepted_as_the_error_says():
    env = bnpo.make_env(bnpo.Config(env="pendulum", reward_kind="env", **NO_HER))
    assert env.max_steps == 60


def test_derived_sizes_of_the_published_setting():
    config = bnpo.Config()
    assert [config.window(brain) for brain in config.brains] == [5, 200]
    assert [config.warmup(brain) for brain in config.brains] == [3, 2]
    assert (config.buffer_episodes, config.num_updates) == (200, 320)


@pytest.mark.parametrize("preset", bnpo.PRESETS)
def test_a_run_is_read_from_its_json(preset):
    """Brains come back from config.json as what they were."""
    config = bnpo.config_for("arm/reacher-moving", preset)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert rundir.from_json(bnpo.Config, saved) == config
    saved["brains"][0]["her_ratio"] = 2.0
    with pytest.raises(ValueError, match=r"brains.0.her_ratio=2.0"):
        rundir.from_json(bnpo.Config, saved)


def test_flags_change_one_brain():
    flags = ["--brains.1.learning-rate", "0.5", "--brains.0.natural-gradient"]
    config = cli.parse("bnpo", bnpo.Config, bnpo.PRESETS, [*flags, "--gamma", "0.9"])[0]
    ppo_brain = dataclasses.replace(PPO_BRAIN, natural_gradient=True)
    ddpg_brain = dataclasses.replace(DDPG_BRAIN, learning_rate=0.5)
    assert config == bnpo.Config(brains=(ppo_brain, ddpg_brain), gamma=0.9)
    flags = ["--preset", "a4", "--brains.0.clip-eps", "0.1"]
    config = cli.parse("bnpo", bnpo.Config, bnpo.PRESETS, flags)[0]
    assert config.brains == (dataclasses.replace(PPO_BRAIN, clip_eps=0.1),)
    with pytest.raises(ValueError, match=r"unknown argument '--brains\.1\.clip-eps'"):
        cli.parse("bnpo", bnpo.Config, bnpo.PRESETS, ["--preset", "a4", "--brains.1.clip-eps", "1"])


@pytest.mark.parametrize(
    ("preset", "recalc_delay", "optim_epochs", "learning_repeat"),
    [("a1", 1, 2, 3), ("a2", 5, 2, 3), ("a2b", 5, 2, 3), ("a8", 2, 3, 140)],
)
def test_minibatches_of_the_published_settings(preset, recalc_delay, optim_epochs, learning_repeat):
    """The author's round is one minibatch once in `recalc_delay` + 1 times, else `optim_epochs`."""
    config = bnpo.config_for("arm/reacher-moving", preset)
    of_a_round = (1 + recalc_delay * optim_epochs) / (recalc_delay + 1)
    expected = learning_repeat // optim_epochs * of_a_round
    assert config.brains[-1].turn_minibatches == pytest.approx(expected, rel=0.01)


def test_a_brain_samples_from_one_episode_at_least():
    """An episode has 32 steps here."""
    config = tiny.config_of("bnpo")
    sizes = {1: 1, 31: 1, 64: 2, 95: 2}
    brains = {size: dataclasses.replace(config.brains[0], buffer_size=size) for size in sizes}
    assert {size: config.window(brain) for size, brain in brains.items()} == sizes
