"""The policy map: `slo` against every baseline, simulated over popularity, load and SLO scale."""
