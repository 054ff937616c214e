"""The part of tests that runs in a process with eight devices (`tests.eight_devices`)."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from muxjax import Fleet, SamplingParams
from muxjax.errors import EngineDead
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.planner.plan import PlacementPlan, PlannedModel, PlannedNodes, PlannedUnit

# Query and KV heads of SmolLM2, Gemma 3 270M and Llama 3 8B. No other size is a multiple of 8.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 8},
    ),
    "gemma": (
        "gemma3",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 12},
    ),
    "llama3": ("llama", {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 4}),
}
POOL = 4_000_000
PROMPTS = [[1, 2, 3, 4, 5], list(range(40, 70)), [7, 8]]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=11, logprobs=2)


def entry(name: str, **keys: Any) -> dict[str, Any]:
    family, shape = SHAPES[name]
    config = {
        "vocab_size": 301,
        "hidden_size": 44,
        "intermediate_size": 91,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "eos_token_id": 256,
        **shape,
    }
    return {"name": name, "source": f"config:{family}", "config": config, **keys}


def fleet(
    tp_size: int, tp_sizes: dict[str, int] | None = None, max_seqs: int = 1
) -> dict[str, Any]:
    """A fleet file for `tp_size` devices; `tp_sizes` has the models and the size of each."""
    models = tp_sizes or dict.fromkeys(SHAPES, tp_size)
    return {
        "models": [entry(name, tensor_parallel=size) for name, size in models.items()],
        "tensor_parallel": tp_size,
        "pool": {"memory": POOL},
        "engine": {"max_seqs": max_seqs, "prefill_tokens": 16, "decode_tokens": 4},
    }


def generate_all(loaded: Fleet) -> dict[str, Any]:
    """The tokens of all prompts, greedy and sampled, by model."""
    return {
        name: [
            [completion.token_ids for completion in loaded.generate(name, PROMPTS, params)]
            for params in (GREEDY, SEEDED)
        ]
        for name in loaded.models
    }


def tensor_parallel() -> None:
    """Prints the tokens and sizes of fleets with different degrees of parallelism, as JSON."""
    reports = []
    cases: list[tuple[int, dict[str, int] | None, int]] = [
        (1, None, 1),
        (2, None, 1),
        (4, None, 1),
        (8, None, 1),
        # Four replicas: three concurrent requests run on three of them.
        (4, {"smollm2": 1}, 4),
    ]
    for tp_size, tp_sizes, max_seqs in cases:
        with Fleet.load(fleet(tp_size, tp_sizes, max_seqs), progress=False, poison=True) as loaded:
            stats = loaded.stats()
            reports.append(
                {
                    "tp_size": tp_size,
                    "tokens": generate_all(loaded),
                    "param_bytes": {n: m.param_bytes for n, m in loaded.models.items()},
                    "layouts": {n: m.layout.num_kv_heads for n, m in loaded.models.items()},
                    "replicas": {n: m.replicas for n, m in loaded.models.items()},
                    "pool_bytes": stats["pool_bytes"],
                }
            )
            after = loaded.stats()
            assert after["pool_address"] == stats["pool_address"]
    print(json.dumps(reports))


UNITS = {
    # name: devices, and for each model its tp_size and replicas
    "wide": ((0, 1), {"one": (2, 1), "two": (1, 2)}),
    "left": ((2,), {"three": (1, 1), "four": (1, 1)}),
    "right": ((3,), {"five": (1, 1), "four": (1, 1)}),
}
KINDS = {"one": "llama3", "two": "gemma", "three": "smollm2", "four": "llama3", "five": "gemma"}


def planned_fleet(**config: int) -> dict[str, Any]:
    models = []
    for seed, (name, kind) in enumerate(KINDS.items()):
        model = entry(kind)
        shape = {**model["config"], "seed": seed, **config}
        models.append({**model, "name": name, "config": shape})
    return {
        "models": models,
        "pool": {"memory": "6MB"},
        "engine": {"max_seqs": 1, "prefill_tokens": 16, "decode_tokens": 2},
    }


def make_plan() -> PlacementPlan:
    """A plan as `muxjax plan` writes it, for one node of four devices."""
    units = []
    for name, (devices, models) in UNITS.items():
        share = 1 / len(models)
        units.append(
            PlannedUnit(
                name=name,
                node=0,
                device="cpu",
                devices=devices,
                weight_bytes=1e5,
                reserved_bytes=0,
                kv_bytes=1e6,
                throughput=1.0,
                models=tuple(
                    PlannedModel(
                        name=model,
                        kind=KINDS[model],
                        rate=1.0,
                        prompt_tokens=12,
                        output_tokens=12,
                        tp=tp,
                        replicas=replicas,
                        kv_floor=share / 4,
                        kv_quota=share,
                        prefill_time=0.1,
                        batch=2.0,
                        throughput=1.0,
                        decode_time=0.1,
                    )
                    for model, (tp, replicas) in models.items()
                ),
            )
        )
    shape = ModelShape(
        num_layers=2,
        hidden_size=44,
        intermediate_size=91,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        vocab_size=301,
    )
    return PlacementPlan(
        muxjax="test",
        config_hash="",
        execution="time_sliced",
        objective="throughput",
        cluster=(PlannedNodes(nodes=1, devices=4, device="cpu"),),
        devices=(),
        shapes=dict.fromkeys(SHAPES, shape),
        units=tuple(units),
        throughput=5.0,
        weighted_throughput=1.0,
        rate=5.0,
        slo_attainment=1.0,
        score=1.0,
        bound=1.0,
        gap=0.0,
        seconds=0.0,
    )


def _kill(unit: Any) -> None:
    """Ends the thread of the engine that calls it: the loop does not catch `SystemExit`."""
    raise SystemExit("killed by the test")


def plan_with_failures() -> None:
    """Serves a plan's units, kills each under load, and compares the tokens with a normal run."""
    settings = {
        "greedy": SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True),
        "seeded": SamplingParams(max_tokens=60, temperature=1.0, seed=5, ignore_eos=True),
    }
    requests = [
        (name, prompt, kind) for name in KINDS for prompt in PROMPTS[:2] for kind in settings
    ]
    with Fleet.load(planned_fleet(), plan=make_plan(), progress=False, poison=True) as loaded:
        placed = {
            name: [unit.unit for unit in loaded.health() if name in unit.models]
            for name in loaded.models
        }
        devices = {u.name: [device.id for device in u.spec.devices] for u in loaded.units}
        quotas = {
            name: unit["models"][model]["kv_pages_quota"] / unit["usable_pages"]
            for name, unit in loaded.stats()["units"].items()
            for model in unit["models"]
            if model in ("one", "three")
        }

        def generate(request: tuple[str, list[int], str]) -> list[int]:
            name, prompt, kind = request
            return loaded.generate(name, [prompt], settings[kind])[0].token_ids

        with ThreadPoolExecutor(len(requests)) as clients:
            expected = list(clients.map(generate, requests))
            running, outputs = {}, []
            for unit in loaded.units:
                futures = [clients.submit(generate, request) for request in requests]
                while not unit.engine.stats()["requests"]:
                    if all(future.done() for future in futures):
                        break
                running[unit.name] = unit.engine.stats()["requests"]
                with contextlib.suppress(EngineDead):
                    unit.engine.call(_kill)
                outputs.append([future.result(timeout=120) for future in futures])
                if not unit.restarts:  # it was idle when it was killed: a request restarts it
                    generate(next(r for r in requests if r[0] in unit.model_names))
        stats = loaded.stats()
        print(
            json.dumps(
                {
                    "placed": placed,
                    "devices": devices,
                    "quotas": quotas,
                    "same": all(expected == output for output in outputs),
                    "lengths": sorted({len(tokens) for output in outputs for tokens in output}),
                    "running when killed": running,
                    "restarts": {name: unit["restarts"] for name, unit in stats["units"].items()},
                    "running at the end": stats["requests"],
                }
            ),
            flush=True,
        )
    # The sharded model, and those with replicas or on two units, on one device.
    single = planned_fleet()
    single["models"] = [m for m in single["models"] if m["name"] in ("one", "two", "four")]
    with Fleet.load(single, progress=False) as loaded:
        for (name, prompt, kind), tokens in zip(requests, expected, strict=True):
            if name in loaded.models:
                assert loaded.generate(name, [prompt], settings[kind])[0].token_ids == tokens, name
