"""The tiny models reproduce their training text from both checkpoint formats."""

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
    """Each model's completion of each prompt."""
    models = [{"name": name, "source": str(trained / name / kind)} for name in tiny.FAMILIES]
    config = {
        "models": models,
        "pool": {"memory": "8MB"},
        "engine": {"max_seqs": 1, "prefill_tokens": 16},  # few programs to compile
    }
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    with Fleet.load(config) as fleet:
        return {name: fleet.generate(name, PROMPTS, params) for name in tiny.FAMILIES}


def test_both_checkpoints_reproduce_the_text(trained):
    completions = continuations(trained, "orbax")
    # The models continue with the beginning after the end of the text.
    text = tiny.learned() * 2
    for name, answers in completions.items():
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            start = text.index(prompt) + len(prompt)
            assert answer.text == text[start : start + TOKENS], name
    assert continuations(trained, "safetensors") == completions


def test_shapes_differ(trained):
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
