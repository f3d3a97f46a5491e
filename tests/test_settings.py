"""How a site selects: which values there are, how they print, and their JSON."""

import json
import pickle

import numpy as np
import pytest

from amber_compile import Pattern, Settings
from amber_compile.errors import OptionError
from amber_compile.kernels.arguments import CORRECTIONS as OPERATOR_CORRECTIONS
from amber_compile.scores import SCORES as COMPUTED_SCORES
from amber_compile.settings import CORRECTIONS, FLAGS, SCORES

EXAMPLES = [
    (Settings(), "2:4, weight_norm"),
    (Settings("8:16", "magnitude"), "8:16, magnitude"),
    (Settings(correction="norm"), "2:4, weight_norm, norm correction"),
    (Settings(dense_prefix=4, part="gate"), "2:4, weight_norm, dense prefix 4, gate half only"),
    (
        Settings(score="calibrated", output_scale=True, output_bias=True, updated_weight=True),
        "2:4, calibrated, output scale, output bias, updated weight",
    ),
    (
        Settings(Pattern(1, 4), "robust_norm", "variance", 1, "gate"),
        "1:4, robust_norm, variance correction, dense prefix 1, gate half only",
    ),
]


@pytest.mark.parametrize(("settings", "text"), EXAMPLES)
def test_text(settings, text):
    assert str(settings) == text
    assert text == f"{settings.pattern}, {settings.how}"


@pytest.mark.parametrize("settings", [settings for settings, _ in EXAMPLES])
def test_json_and_back(settings):
    data = json.loads(json.dumps(settings.to_json()))
    assert Settings.from_json(data) == settings
    flags = {name for name in FLAGS if getattr(settings, name)}
    assert set(data) == {"pattern", "score", "correction", "dense_prefix", "part", *flags}
    assert data["pattern"] == str(settings.pattern)


def test_json_that_leaves_something_out_means_the_default():
    assert Settings.from_json({}) == Settings()
    assert Settings.from_json({"score": "magnitude"}) == Settings(score="magnitude")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "2-4"}, "pattern='2-4' is malformed"),
        ({"pattern": "2:3"}, "pattern=2:3 is not an N:M pattern"),
        ({"score": "magnitud"}, "unknown score 'magnitud'; did you mean 'magnitude'?"),
        ({"score": None}, "unknown score None"),
        ({"correction": "nrm"}, "unknown correction 'nrm'; did you mean 'norm'? valid: None, norm"),
        ({"correction": False}, "unknown correction False"),
        ({"dense_prefix": -1}, "dense_prefix=-1 must be a whole number >= 0"),
        ({"dense_prefix": 1.5}, "dense_prefix=1.5 must be a whole number >= 0"),
        ({"dense_prefix": True}, "dense_prefix=True must be a whole number >= 0"),
        ({"output_scale": 1}, "output_scale=1 must be True or False"),
        ({"permuted": None}, "permuted=None must be True or False"),
        ({"part": "up"}, "unknown part 'up'; valid: None, gate"),
    ],
)
def test_what_is_refused(values, message):
    for make in (lambda: Settings(**values), lambda: Settings.from_json(values)):
        with pytest.raises(OptionError) as caught:
            make()
        assert message in str(caught.value)


def test_json_with_an_unknown_key():
    with pytest.raises(OptionError, match="unknown site setting 'patern'; did you mean 'pattern'"):
        Settings.from_json({"patern": "2:4"})


def test_values_are_normalised():
    settings = Settings("2:4", dense_prefix=np.int64(2))
    assert settings == Settings(Pattern(2, 4), dense_prefix=2)
    assert type(settings.dense_prefix) is int
    json.dumps(settings.to_json())


def test_a_value():
    assert len({Settings(), Settings("2:4"), Settings("4:8")}) == 2
    assert pickle.loads(pickle.dumps(Settings())) == Settings()
    with pytest.raises(AttributeError):
        Settings().score = "magnitude"


def test_the_names_are_those_that_something_computes():
    assert set(SCORES) == set(COMPUTED_SCORES)
    assert set(CORRECTIONS) == set(OPERATOR_CORRECTIONS)
