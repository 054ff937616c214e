"""Constants of the `slo` policy. Their evidence is in docs/measurements/slo-tuning.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SloTuning:
    """Constants of `SloPolicy` and its parts."""

    # Minimum length of a decode burst, in tokens per sequence.
    min_burst_tokens: int = 4
    # Duration up to which `min_burst_tokens` applies, in seconds.
    min_burst_seconds: float = 0.03
    # Maximum duration of a decode burst of more than one token, in seconds.
    max_burst_seconds: float = 0.4
    # Maximum duration of a decode burst, as a part of the time that a new prompt can wait.
    burst_part: float = 0.25
    # Targets are tight if fewer models than this, with one sequence each, can take turns.
    min_concurrent_models: int = 5
    # Pace of tokens under a target for the whole request, as a part of the allowed time per token.
    # The rest is for the first token.
    pace_part: float = 0.98
    # Decode time by which a model may be ahead of its share when the oldest sequence goes first,
    # in isolated requests of mean length.
    decode_overdraft: float = 2.0
    # Weight (0 to 1) of a new measurement of the seconds per token.
    pace_weight: float = 0.1
    # Slowest pace assumed for a new request when targets are tight, as a part of the time per token
    # that the target allows. Used to decide on deferral.
    slowest_pace: float = 0.8
    # Expected duration of a request when deferral is decided, as a factor of the estimate.
    duration_margin: float = 1.1
    # Interval until deferral is checked again, as a part of the remaining time.
    check_interval_part: float = 0.1
    # Weight of the expected mean output length, in finished requests.
    prior_requests: int = 10
    # Number of finished requests after which one deferred request is recalled.
    recall_interval: int = 20
    # Maximum number of deferred requests that counts as few.
    few_requests: int = 4
    # The same, per running request.
    few_part: float = 0.25
    # A model with at most this part of all deferred requests recalls them at once.
    minor_part: float = 1 / 16
    # SLO utilization (part of the time) that new sequences may always add.
    free_utilization: float = 0.02
    # Interval between measurements of the prefills' part of the time, in seconds.
    measure_seconds: float = 0.5
    # Weight (0 to 1) of a new such measurement.
    measure_weight: float = 0.3


DEFAULT_TUNING = SloTuning()
