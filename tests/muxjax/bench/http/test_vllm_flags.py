"""Compatibility with the command line of vLLM."""

from __future__ import annotations

import pytest

from muxjax.bench.http.vllm_flags import REFUSED, expand_arguments, goodput, pairs, tokenizer_path
from muxjax.errors import BenchError


def test_options_with_several_values_are_repeated() -> None:
    arguments = "--goodput ttft:200 tpot:50 http://x --seed 1 --header a=b c=d --json"
    expanded = (
        "--goodput ttft:200 --goodput tpot:50 http://x --seed 1 --header a=b --header c=d --json"
    )
    assert " ".join(expand_arguments(arguments.split())) == expanded
    assert expand_arguments(["--goodput=ttft:200", "http://x"]) == [
        "--goodput=ttft:200",
        "http://x",
    ]


@pytest.mark.parametrize("name", [*REFUSED, "--sonnet-input-len", "--random-mm-bucket-config"])
def test_unsupported_options_are_rejected_by_name(name: str) -> None:
    for arguments in ([name], [f"{name}=1"], ["--seed", "1", name, "2"]):
        with pytest.raises(BenchError, match=f"{name} of vLLM's benchmark is not supported"):
            expand_arguments(arguments)


def test_an_option_without_a_value_is_rejected() -> None:
    for arguments in (["--goodput"], ["--goodput", "--json"]):
        with pytest.raises(BenchError, match="--goodput needs a value"):
            expand_arguments(arguments)


def test_values_are_parsed() -> None:
    assert pairs(["a=b=c", " d = e "], "--header") == {"a": "b=c", "d": "e"}
    assert goodput(["ttft:200", "e2el:1e3"]) == {"ttft": 200.0, "e2el": 1000.0}
    with pytest.raises(BenchError, match="KEY=VALUE"):
        pairs(["a"], "--header")
    with pytest.raises(BenchError, match="METRIC:MILLISECONDS"):
        goodput(["ttft:fast"])
    assert tokenizer_path(None) is None
    with pytest.raises(BenchError, match="tokenizers are not downloaded"):
        tokenizer_path("meta-llama/Llama-3-8B")
