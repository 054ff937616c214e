"""Compatibility of `muxjax bench http` with the command line of vLLM's `bench serve`.

Options of vLLM that are not supported are refused by name, with the reason. Options that take
several values (`--goodput ttft:200 tpot:50`) are rewritten for a parser that takes one value per
option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from muxjax.errors import BenchError

_ONLY_TEXT = "only text requests are sent"
_UNSUPPORTED_DATA = (
    "the data set {} is not supported: write its prompts to a file and use --dataset-name custom"
)
_ONLY_MODELS = "models are named with --model"
REFUSED: Mapping[str, str] = {
    "--use-beam-search": "beam search is not benchmarked",
    "--trust-remote-code": "code from model repositories is not executed",
    "--tokenizer-mode": "a tokenizer is read from its tokenizer.json (--tokenizer)",
    "--skip-tokenizer-init": "no tokenizer is loaded without --tokenizer",
    "--lora-modules": _ONLY_MODELS,
    "--lora-assignment": _ONLY_MODELS,
    "--served-model-name": _ONLY_MODELS,
    "--request-id-prefix": "the server assigns request ids",
    "--profile": "it controls the profiler of a vLLM server",
    "--probe-request-rate": "probes are not sent",
    "--self-timed": "--dataset-name trace uses the times in its file",
    "--no-self-timed": "--dataset-name trace uses the times in its file",
    "--chat-template-kwargs": "the server applies the chat template; see --extra-body",
    "--plot-timeline": "use `muxjax bench report`",
    "--timeline-itl-thresholds": "use `muxjax bench report`",
    "--plot-dataset-stats": "use `muxjax bench report`",
    "--no-stream": "data sets are read from files",
    "--skip-chat-template": "the server applies the chat template",
    "--enable-multimodal-chat": _ONLY_TEXT,
    "--hf-subset": _UNSUPPORTED_DATA.format("hf"),
    "--hf-split": _UNSUPPORTED_DATA.format("hf"),
    "--hf-name": _UNSUPPORTED_DATA.format("hf"),
    "--hf-output-len": _UNSUPPORTED_DATA.format("hf"),
    "--random-batch-size": "embeddings are not benchmarked",
    "--no-reranker": "reranking is not benchmarked",
}
_REFUSED_PREFIXES = {
    "--random-mm-": _ONLY_TEXT,
    "--spec-bench-": _UNSUPPORTED_DATA.format("spec_bench"),
    "--sonnet-": _UNSUPPORTED_DATA.format("sonnet"),
    "--blazedit-": _UNSUPPORTED_DATA.format("blazedit"),
    "--prefix-repetition-": "use --random-prefix-len",
    "--speed-bench-": _UNSUPPORTED_DATA.format("speed_bench"),
    "--asr-": _ONLY_TEXT,
}
MULTI_VALUE = ("--goodput", "--header", "--metadata")
"""Options that take several values."""


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Rewrites arguments so that every option has one value.

    Raises:
      BenchError: an unsupported option of vLLM's, or an option without a value.
    """
    expanded: list[str] = []
    option: str | None = None
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            _refuse(argument.partition("=")[0])
            name, _, value = argument.partition("=")
            option = name if name in MULTI_VALUE else None
            if option and value:
                option = None
            elif option:
                following = arguments[index + 1 : index + 2]
                if not following or following[0].startswith("--"):
                    raise BenchError(f"{name} needs a value")
                continue
            expanded.append(argument)
        elif option is not None and _is_pair(argument):
            expanded += [option, argument]
        else:
            option = None
            expanded.append(argument)
    return expanded


def _refuse(name: str) -> None:
    reason = REFUSED.get(name)
    if reason is None:
        for prefix, explanation in _REFUSED_PREFIXES.items():
            if name.startswith(prefix):
                reason = explanation
    if reason is not None:
        raise BenchError(f"{name} of vLLM's benchmark is not supported: {reason}")


def _is_pair(argument: str) -> bool:
    """Whether an argument is KEY:VALUE or KEY=VALUE rather than the server's address."""
    return "://" not in argument and (":" in argument or "=" in argument)


def pairs(values: Sequence[str] | None, option: str, separator: str = "=") -> dict[str, str]:
    """Parses KEY=VALUE arguments.

    Raises:
      BenchError: an argument without a key or separator.
    """
    parsed = {}
    for value in values or ():
        key, mark, rest = value.partition(separator)
        if not (key and mark):
            raise BenchError(f"{option} is written KEY{separator}VALUE, not {value!r}")
        parsed[key.strip()] = rest.strip()
    return parsed


def goodput(values: Sequence[str] | None) -> dict[str, float]:
    """Parses the latency limits of `--goodput`, in milliseconds.

    Raises:
      BenchError: a limit that is not METRIC:MILLISECONDS.
    """
    limits = {}
    for key, value in pairs(values, "--goodput", ":").items():
        try:
            limits[key] = float(value)
        except ValueError as error:
            raise BenchError(
                f"--goodput is written METRIC:MILLISECONDS, as ttft:200, not {key}:{value}"
            ) from error
    return limits


def tokenizer_path(value: str | None) -> Path | None:
    """The path given with `--tokenizer`.

    Raises:
      BenchError: it does not exist; tokenizers are not downloaded.
    """
    if value is None:
        return None
    path = Path(value)
    if not path.exists():
        raise BenchError(
            f"--tokenizer {value}: no such file or folder. Give a tokenizer.json or a folder that "
            f"contains one; tokenizers are not downloaded"
        )
    return path
