"""The tiny models say the text that they were trained on, from either kind of checkpoint."""

import pytest
import yaml

from muxjax import Fleet, SamplingParams
from muxjax.config.fleet_file import load_fleet_config
from muxjax.models.checkpoints.loading import open_checkpoint
from tests import tiny

pytestmark = pytest.mark.slow

PROMPTS = ("Shall I compare thee to ", "Rough winds do shake ", "So long as men can ")
TOKENS = 100


@pytest.fixture(scope="module")
def trained():
    return tiny.trained()


def continuations(trained, kind):
    """What each model says after each prompt."""
    models = [{"name": name, "source": str(trained / name / kind)} for name in tiny.FAMILIES]
    config = {
        "models": models,
        "pool": {"memory": "8MB"},
        "engine": {
            "max_seqs": 1,
            "prefill_tokens": 16,
        },  # few programs: compiling is what takes time
    }
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    with Fleet.load(config) as fleet:
        return {name: fleet.generate(name, PROMPTS, params) for name in tiny.FAMILIES}


def test_both_checkpoints_say_the_text(trained):
    found = continuations(trained, "orbax")
    # After its end, the text begins again.
    text = tiny.learned() * 2
    for name, answers in found.items():
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            at = text.index(prompt) + len(prompt)
            assert answer.text == text[at : at + TOKENS], name
    assert continuations(trained, "safetensors") == found


def test_shapes_are_unlike(trained):
    configs = [open_checkpoint(trained / name / "orbax").config for name in tiny.FAMILIES]
    for size in ("num_layers", "head_dim"):
        assert len({getattr(config, size) for config in configs}) == 3
    assert len({config.num_kv_heads for config in configs}) > 1
    assert any(any(config.layer_is_sliding) for config in configs)


def test_the_fleet_file_serves_all_three(trained):
    path = trained / "fleet.yaml"
    assert [model["name"] for model in yaml.safe_load(path.read_text())["models"]] == list(
        tiny.FAMILIES
    )
    for model in load_fleet_config(path).models:
        assert model.source == str(trained / model.name / "orbax")
