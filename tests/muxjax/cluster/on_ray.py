"""A plan's units on Ray with two simulated nodes: one loses a process, then a whole node.

Run by `test_ray_fleet` in a process of its own; prints JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from typing import Any

from ray.cluster_utils import Cluster

from muxjax import Fleet, SamplingParams
from muxjax.cluster.ray_fleet import ray_fleet
from muxjax.placement.planner.plan import PlacementPlan, PlannedNodes
from tests.muxjax.on_eight_devices import KINDS, PROMPTS, make_plan, planned_fleet

TOKENS = 160
WAIT = 60.0
MOST_SECONDS = 240
NODE = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 80 * 2**20}
# How soon Ray notices that a machine does not answer; by default after 15 seconds.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
SETTINGS = [
    SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=5, ignore_eos=True),
]
ASKS = [(name, prompt, params) for name in KINDS for prompt in PROMPTS[:2] for params in SETTINGS]


def two_nodes() -> PlacementPlan:
    """The three units, the first on a node of its own."""
    plan = make_plan()
    places = {"wide": (0, (0, 1)), "left": (1, (0,)), "right": (1, (1,))}
    units = [
        unit.model_copy(update={"node": places[unit.name][0], "devices": places[unit.name][1]})
        for unit in plan.units
    ]
    cluster = (PlannedNodes(nodes=2, devices=2, device="cpu"),)
    return plan.model_copy(update={"units": tuple(units), "cluster": cluster})


class Streams:
    """Twenty at once, each read by a thread of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self.text = [b""] * len(ASKS)
        self.tokens: list[list[int]] = [[] for _ in ASKS]
        self.times: list[list[float]] = [[] for _ in ASKS]  # when tokens came
        self.errors: list[str] = []
        self._fleet = fleet
        self._threads = [
            threading.Thread(target=self._read, args=(index,), daemon=True)
            for index in range(len(ASKS))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, index: int) -> None:
        try:
            for delta in self._fleet.stream(*ASKS[index]):
                self.text[index] += delta.text.encode()
                self.tokens[index] += delta.token_ids
                self.times[index].append(time.monotonic())
        except Exception as error:  # noqa: BLE001  it is what is counted
            self.errors.append(f"{ASKS[index][0]}: {error!r}")

    def made(self, models: set[str]) -> int:
        return sum(
            len(t) for t, (name, _, _) in zip(self.tokens, ASKS, strict=True) if name in models
        )

    def longest_silence(self, models: set[str], since: float) -> float:
        """Seconds in which none of these models' streams got a token."""
        each = zip(self.times, ASKS, strict=True)
        came = sorted(at for times, (name, _, _) in each if name in models for at in times)
        after = [since, *(at for at in came if at > since)]
        return max(later - earlier for earlier, later in itertools.pairwise(after))

    def wait(self) -> None:
        until = time.monotonic() + WAIT
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "streams hang"


def disturbed(fleet: Fleet, models: set[str], strike: Any) -> tuple[Streams, dict[str, Any]]:
    """Strikes when those models' streams run, and waits for all of them."""
    streams = Streams(fleet)
    until = time.monotonic() + WAIT
    while streams.made(models) < 20:
        assert time.monotonic() < until, "no tokens came"
        time.sleep(0.005)
    struck = time.monotonic()
    before = streams.made(models)
    strike()
    streams.wait()
    lost = sum(len(tokens) < TOKENS for tokens in streams.tokens)
    return streams, {
        "made before": before,
        "of": TOKENS * sum(name in models for name, _, _ in ASKS),
        "failed": len(streams.errors),
        "errors": streams.errors[:3],
        "cut short": lost,
        "recovery seconds": round(streams.longest_silence(models, struck), 1),
    }


def too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"not done after {MOST_SECONDS} s")


def main() -> None:
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(MOST_SECONDS)
    began = time.monotonic()
    cluster = Cluster(head_node_args={**NODE, "_system_config": HEALTH}, initialize_head=True)
    try:
        second = cluster.add_node(**NODE)
        cluster.wait_for_nodes(timeout=30)
        config = planned_fleet(max_position_embeddings=256)
        with ray_fleet(config, plan=two_nodes(), address=cluster.address) as fleet:
            found: dict[str, Any] = {"start": round(time.monotonic() - began, 1)}
            placed = fleet.stats()["units"]
            found["devices"] = {name: len(unit["devices"]) for name, unit in placed.items()}
            nodes = {name: unit["node"] for name, unit in placed.items()}
            found["apart"] = nodes["wide"] != nodes["left"] == nodes["right"]
            quiet = Streams(fleet)
            quiet.wait()
            assert not quiet.errors, quiet.errors

            pid = placed["left"]["pid"]
            after, found["process"] = disturbed(
                fleet, {"three"}, lambda: os.kill(pid, signal.SIGKILL)
            )
            found["process"]["same"] = (after.text, after.tokens) == (quiet.text, quiet.tokens)

            gone = [name for name, node in nodes.items() if node == second.node_id]
            kept = {
                name for unit in fleet.health() if unit.unit not in gone for name in unit.models
            }
            models = set(fleet.models) - kept
            after, found["node"] = disturbed(
                fleet, models, lambda: cluster.remove_node(second, allow_graceful=False)
            )
            found["node"]["same"] = (after.text, after.tokens) == (quiet.text, quiet.tokens)
            stats = fleet.stats()
            found["node"]["units"] = gone
            found["moved"] = all(
                unit["node"] == cluster.head_node.node_id for unit in stats["units"].values()
            )
            found["restarts"] = {name: unit["restarts"] for name, unit in stats["units"].items()}
            found["left over"] = stats["requests"]
            found["bytes"] = sum(map(len, quiet.text))
    finally:
        cluster.shutdown()
    found["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
