"""The command line of vLLM's `bench serve`, as far as `muxjax bench http` takes it.

What vLLM has and this does not is refused by name, with the reason; options that take several
values (`--goodput ttft:200 tpot:50`) are spread out for a parser that takes one value for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from muxjax.errors import BenchError

_ONLY_TEXT = "only text is sent"
_ONLY_MODELS = "models are named with --model"
REFUSED: Mapping[str, str] = {
    "--use-beam-search": "beam search is not benchmarked",
    "--trust-remote-code": "no code of models is run",
    "--tokenizer-mode": "a tokenizer is read from its tokenizer.json (--tokenizer)",
    "--skip-tokenizer-init": "no tokenizer is loaded unless --tokenizer asks for it",
    "--lora-modules": _ONLY_MODELS,
    "--lora-assignment": _ONLY_MODELS,
    "--served-model-name": _ONLY_MODELS,
    "--request-id-prefix": "requests are named by the server",
    "--profile": "it starts vLLM's own profiler",
    "--probe-request-rate": "probes are not sent",
    "--self-timed": "--dataset-name trace takes the times of its file",
    "--no-self-timed": "--dataset-name trace takes the times of its file",
    "--chat-template-kwargs": "the server applies the chat template; see --extra-body",
    "--plot-timeline": "`muxjax bench report` draws what was saved",
    "--timeline-itl-thresholds": "`muxjax bench report` draws what was saved",
    "--plot-dataset-stats": "`muxjax bench report` draws what was saved",
    "--no-stream": "data sets are files; none is streamed",
    "--skip-chat-template": "the server applies the chat template",
    "--enable-multimodal-chat": _ONLY_TEXT,
    "--hf-subset": "the data set hf is not read: write its prompts to a file (custom)",
    "--hf-split": "the data set hf is not read: write its prompts to a file (custom)",
    "--hf-name": "the data set hf is not read: write its prompts to a file (custom)",
    "--hf-output-len": "the data set hf is not read: write its prompts to a file (custom)",
    "--random-batch-size": "embeddings are not benchmarked",
    "--no-reranker": "reranking is not benchmarked",
}
_REFUSED_FAMILIES = {
    "--random-mm-": _ONLY_TEXT,
    "--spec-bench-": "the data set spec_bench is not read: write its prompts to a file (custom)",
    "--sonnet-": "the data set sonnet is not read: write its prompts to a file (custom)",
    "--blazedit-": "the data set blazedit is not read: write its prompts to a file (custom)",
    "--prefix-repetition-": "see --random-prefix-len",
    "--speed-bench-": "the data set speed_bench is not read: write its prompts to a file (custom)",
    "--asr-": _ONLY_TEXT,
}
SEVERAL = ("--goodput", "--header", "--metadata")
"""Options that take any number of values."""


def prepare(arguments: Sequence[str]) -> list[str]:
    """The arguments with one value for each option.

    Raises:
      BenchError: an option of vLLM's that is not supported.
    """
    found: list[str] = []
    many: str | None = None
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            _refuse(argument.partition("=")[0])
            name, _, value = argument.partition("=")
            many = name if name in SEVERAL else None
            if many and value:
                many = None
            elif many:
                following = arguments[index + 1 : index + 2]
                if not following or following[0].startswith("--"):
                    raise BenchError(f"{name} needs a value")
                continue
            found.append(argument)
        elif many is not None and _is_pair(argument):
            found += [many, argument]
        else:
            many = None
            found.append(argument)
    return found


def _refuse(name: str) -> None:
    reason = REFUSED.get(name)
    if reason is None:
        for family, why in _REFUSED_FAMILIES.items():
            if name.startswith(family):
                reason = why
    if reason is not None:
        raise BenchError(f"{name} of vLLM's benchmark is not supported: {reason}")


def _is_pair(argument: str) -> bool:
    """Whether this is another KEY:VALUE or KEY=VALUE, and not the address."""
    return "://" not in argument and (":" in argument or "=" in argument)


def pairs(values: Sequence[str] | None, option: str, separator: str = "=") -> dict[str, str]:
    """KEY=VALUE arguments.

    Raises:
      BenchError: one that is not.
    """
    found = {}
    for value in values or ():
        key, mark, rest = value.partition(separator)
        if not (key and mark):
            raise BenchError(f"{option} is written KEY{separator}VALUE, not {value!r}")
        found[key.strip()] = rest.strip()
    return found


def goodput(values: Sequence[str] | None) -> dict[str, float]:
    """Limits in milliseconds.

    Raises:
      BenchError: one that is not written METRIC:MILLISECONDS.
    """
    found = {}
    for key, value in pairs(values, "--goodput", ":").items():
        try:
            found[key] = float(value)
        except ValueError as error:
            raise BenchError(
                f"--goodput is written METRIC:MILLISECONDS, as ttft:200, not {key}:{value}"
            ) from error
    return found


def tokenizer_path(value: str | None) -> Path | None:
    """Where `--tokenizer` points.

    Raises:
      BenchError: not to a file or folder here; models are not fetched for their tokenizers.
    """
    if value is None:
        return None
    path = Path(value)
    if not path.exists():
        raise BenchError(
            f"--tokenizer {value}: no such file or folder; it is a tokenizer.json, or a folder "
            f"with one. Nothing is fetched by name"
        )
    return path
