"""A plan's units on Ray with two simulated nodes: a process is killed, then a node is removed.

`test_ray_fleet` runs this module in a separate process. It prints JSON.
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
MAX_SECONDS = 240
NODE = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 80 * 2**20}
# Makes Ray detect a lost machine sooner than after its default of 15 seconds.
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
REQUESTS = [
    (name, prompt, params) for name in KINDS for prompt in PROMPTS[:2] for params in SETTINGS
]


def two_nodes() -> PlacementPlan:
    """The plan's three units, the first on a separate node."""
    plan = make_plan()
    places = {"wide": (0, (0, 1)), "left": (1, (0,)), "right": (1, (1,))}
    units = [
        unit.model_copy(update={"node": places[unit.name][0], "devices": places[unit.name][1]})
        for unit in plan.units
    ]
    cluster = (PlannedNodes(nodes=2, devices=2, device="cpu"),)
    return plan.model_copy(update={"units": tuple(units), "cluster": cluster})


class Streams:
    """Twenty concurrent streams, each read by a separate thread."""

    def __init__(self, fleet: Fleet) -> None:
        self.text = [b""] * len(REQUESTS)
        self.tokens: list[list[int]] = [[] for _ in REQUESTS]
        self.times: list[list[float]] = [[] for _ in REQUESTS]  # arrivals of tokens
        self.errors: list[str] = []
        self._fleet = fleet
        self._threads = [
            threading.Thread(target=self._read, args=(index,), daemon=True)
            for index in range(len(REQUESTS))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, index: int) -> None:
        try:
            for delta in self._fleet.stream(*REQUESTS[index]):
                self.text[index] += delta.text.encode()
                self.tokens[index] += delta.token_ids
                self.times[index].append(time.monotonic())
        except Exception as error:  # noqa: BLE001  every error is counted
            self.errors.append(f"{REQUESTS[index][0]}: {error!r}")

    def num_tokens(self, models: set[str]) -> int:
        """Number of tokens that the streams of these models have received."""
        return sum(
            len(tokens)
            for tokens, (name, _, _) in zip(self.tokens, REQUESTS, strict=True)
            if name in models
        )

    def longest_gap(self, models: set[str], since: float) -> float:
        """Maximum time in seconds between two tokens of all streams of these models."""
        streams = zip(self.times, REQUESTS, strict=True)
        arrivals = sorted(at for times, (name, _, _) in streams if name in models for at in times)
        after = [since, *(at for at in arrivals if at > since)]
        return max(later - earlier for earlier, later in itertools.pairwise(after))

    def wait(self) -> None:
        deadline = time.monotonic() + WAIT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "streams hang"


def stream_with_failure(
    fleet: Fleet, models: set[str], fail: Any
) -> tuple[Streams, dict[str, Any]]:
    """Calls `fail` while the streams of these models run, and waits for all streams."""
    streams = Streams(fleet)
    deadline = time.monotonic() + WAIT
    while streams.num_tokens(models) < 20:
        assert time.monotonic() < deadline, "no tokens arrived"
        time.sleep(0.005)
    failed_at = time.monotonic()
    before = streams.num_tokens(models)
    fail()
    streams.wait()
    return streams, {
        "tokens before": before,
        "tokens": TOKENS * sum(name in models for name, _, _ in REQUESTS),
        "failed": len(streams.errors),
        "errors": streams.errors[:3],
        "incomplete": sum(len(tokens) < TOKENS for tokens in streams.tokens),
        "recovery seconds": round(streams.longest_gap(models, failed_at), 1),
    }


def raise_timeout(number: int, frame: object) -> None:
    raise TimeoutError(f"not finished after {MAX_SECONDS} s")


def main() -> None:
    signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(MAX_SECONDS)
    began = time.monotonic()
    cluster = Cluster(head_node_args={**NODE, "_system_config": HEALTH}, initialize_head=True)
    try:
        second = cluster.add_node(**NODE)
        cluster.wait_for_nodes(timeout=30)
        config = planned_fleet(max_position_embeddings=256)
        with ray_fleet(config, plan=two_nodes(), address=cluster.address) as fleet:
            report: dict[str, Any] = {"start": round(time.monotonic() - began, 1)}
            units = fleet.stats()["units"]
            report["devices"] = {name: len(unit["devices"]) for name, unit in units.items()}
            nodes = {name: unit["node"] for name, unit in units.items()}
            report["on separate nodes"] = nodes["wide"] != nodes["left"] == nodes["right"]
            expected = Streams(fleet)
            expected.wait()
            assert not expected.errors, expected.errors

            pid = units["left"]["pid"]
            streams, report["process"] = stream_with_failure(
                fleet, {"three"}, lambda: os.kill(pid, signal.SIGKILL)
            )
            report["process"]["same"] = is_same(streams, expected)

            lost = [name for name, node in nodes.items() if node == second.node_id]
            kept = {
                name for unit in fleet.health() if unit.unit not in lost for name in unit.models
            }
            models = set(fleet.models) - kept
            streams, report["node"] = stream_with_failure(
                fleet, models, lambda: cluster.remove_node(second, allow_graceful=False)
            )
            report["node"]["same"] = is_same(streams, expected)
            stats = fleet.stats()
            report["node"]["units"] = lost
            report["moved"] = all(
                unit["node"] == cluster.head_node.node_id for unit in stats["units"].values()
            )
            report["restarts"] = {name: unit["restarts"] for name, unit in stats["units"].items()}
            report["running requests"] = stats["requests"]
            report["bytes"] = sum(map(len, expected.text))
    finally:
        cluster.shutdown()
    report["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(report), flush=True)


def is_same(streams: Streams, expected: Streams) -> bool:
    return (streams.text, streams.tokens) == (expected.text, expected.tokens)


if __name__ == "__main__":
    main()
