"""Which rounds policies.py adds to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import policies
import pytest


def arguments(output: Path, *, simulated: bool) -> argparse.Namespace:
    return argparse.Namespace(output=output, policies=["slo", "adbs"], simulated=simulated)


def test_rounds_of_another_kind_are_refused(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds.jsonl"
    cell = {"policies": {"slo": {}, "adbs": {}}}
    rounds.write_text(json.dumps({"seed": 0, "cells": [cell]}) + "\n")
    assert len(policies.read_rounds(arguments(rounds, simulated=False))) == 1
    with pytest.raises(SystemExit, match="round 1 is not simulated; name another file"):
        policies.read_rounds(arguments(rounds, simulated=True))


def test_rounds_without_a_policy_are_refused(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds.jsonl"
    rounds.write_text(json.dumps({"cells": [{"policies": {"slo": {}}}]}) + "\n")
    with pytest.raises(SystemExit, match="round 1 has no adbs"):
        policies.read_rounds(arguments(rounds, simulated=False))
