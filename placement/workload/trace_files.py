"""Reading and writing traces of requests.

| format | file | time | has models |
|---|---|---|---|
| Mooncake (kvcache-ai/Mooncake, FAST 2025) | JSONL: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` | from 0 | where lines have `model` |
| Azure LLM inference (Azure/AzurePublicDataset) | CSV: `TIMESTAMP`, `ContextTokens`, `GeneratedTokens` | dates | no |
| BurstGPT (HPMLL/BurstGPT) | CSV: `Timestamp` (s), `Model`, `Request tokens`, `Response tokens` | seconds | yes |
| MuxServe's workload | JSON: `arrivals` (s), `requests` with `model_name` and `data: [prompt, tokens in, tokens out]` | from 0 | yes |

Where times are not from 0, the first request is at 0. Requests of Azure and BurstGPT without input
or output tokens (failures) are left out and counted. Rows are read one by one, but for MuxServe's
JSON, which is one document.

ShareGPT's JSON has conversations and no times: `sharegpt_lengths` gives pairs for `lengths.Sampled`.
"""  # noqa: E501  a table

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from muxjax.errors import WorkloadError
from muxjax.placement.workload.trace import TraceRequest, checked

Format = Literal["mooncake", "azure", "burstgpt", "muxserve"]
_Row: TypeAlias = tuple[str, TraceRequest]

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Model", "Request tokens", "Response tokens")

SHAREGPT_LIMITS = (4, 1024, 2048)
"""Conversations that MuxServe and vLLM's benchmarks drop: a prompt or an output of fewer tokens
than the first, a prompt of more than the second, both together of more than the third."""


@dataclass
class TraceFile:
    """A trace in a file; a workload.

    Attributes:
      path: the file.
      format: how it is written; see `trace_format`.
      left_out: failed requests that the last iteration passed over.

    Raises:
      WorkloadError: while iterating: what the file does not say, or says wrongly, and where.
    """

    path: Path
    format: Format
    left_out: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[TraceRequest]:
        readers: dict[Format, Callable[[], Iterator[_Row]]] = {
            "mooncake": self._mooncake,
            "azure": self._azure,
            "burstgpt": self._burstgpt,
            "muxserve": self._muxserve,
        }
        self.left_out = 0
        empty = True
        for request in checked(readers[self.format]()):
            empty = False
            yield request
        if empty:
            raise WorkloadError(f"{self.path}: no requests in it")

    def _mooncake(self) -> Iterator[_Row]:
        with _opened(self.path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{self.path}:{number}"
                row = _json_object(line, where)
                hash_ids = row.get("hash_ids", [])
                if not isinstance(hash_ids, list):
                    raise WorkloadError(f"{where}: hash_ids must be a list, not {hash_ids!r}")
                yield (
                    where,
                    TraceRequest(
                        _number(row, "timestamp", where) / 1000,
                        str(row.get("model", "")),
                        _whole(row, "input_length", where),
                        _whole(row, "output_length", where),
                        tuple(hash_ids),
                    ),
                )

    def _azure(self) -> Iterator[_Row]:
        first: datetime | None = None
        for where, row in self._csv(_AZURE):
            text = row["TIMESTAMP"]
            try:
                time = datetime.fromisoformat(text.strip())
            except ValueError as error:
                raise WorkloadError(f"{where}: TIMESTAMP is no date: {text!r}") from error
            first = first or time
            try:
                arrival = (time - first).total_seconds()
            except TypeError as error:  # one with a time zone, one without
                raise WorkloadError(f"{where}: TIMESTAMP differs in its time zone") from error
            yield from self._unless_failed(
                where,
                arrival,
                "",
                _whole(row, "ContextTokens", where),
                _whole(row, "GeneratedTokens", where),
            )

    def _burstgpt(self) -> Iterator[_Row]:
        first: float | None = None
        for where, row in self._csv(_BURSTGPT):
            time = _number(row, "Timestamp", where)
            first = time if first is None else first
            yield from self._unless_failed(
                where,
                time - first,
                row["Model"].strip(),
                _whole(row, "Request tokens", where),
                _whole(row, "Response tokens", where),
            )

    def _muxserve(self) -> Iterator[_Row]:
        data = _json_file(self.path)
        if not isinstance(data, dict) or not {"arrivals", "requests"} <= data.keys():
            raise WorkloadError(f"{self.path}: no MuxServe workload: needs arrivals and requests")
        arrivals, requests = data["arrivals"], data["requests"]
        if not (isinstance(arrivals, list) and isinstance(requests, list)):
            raise WorkloadError(f"{self.path}: arrivals and requests must be lists")
        if len(arrivals) != len(requests):
            raise WorkloadError(
                f"{self.path}: {len(arrivals)} arrivals and {len(requests)} requests do not match"
            )
        for index, (arrival, request) in enumerate(zip(arrivals, requests, strict=True)):
            where = f"{self.path}: requests[{index}]"
            data = request.get("data") if isinstance(request, dict) else None
            if not (isinstance(data, list) and len(data) >= 3 and "model_name" in request):
                raise WorkloadError(
                    f"{where}: needs model_name and data: [prompt, tokens in, tokens out]"
                )
            lengths = {"prompt tokens": data[1], "output tokens": data[2], "arrival": arrival}
            yield (
                where,
                TraceRequest(
                    _number(lengths, "arrival", where),
                    str(request["model_name"]),
                    _whole(lengths, "prompt tokens", where),
                    _whole(lengths, "output tokens", where),
                ),
            )

    def _csv(self, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
        with _opened(self.path) as file:
            rows = csv.DictReader(file)
            missing = [name for name in columns if name not in (rows.fieldnames or ())]
            if missing:
                raise WorkloadError(f"{self.path}: no column {', '.join(missing)}")
            for row in rows:
                where = f"{self.path}:{rows.line_num}"
                if None in row.values():
                    raise WorkloadError(f"{where}: too few columns")
                yield where, row

    def _unless_failed(
        self, where: str, arrival: float, model: str, prompt: int, output: int
    ) -> Iterator[_Row]:
        if prompt > 0 and output > 0:
            yield where, TraceRequest(arrival, model, prompt, output)
        elif prompt < 0 or output < 0:
            raise WorkloadError(f"{where}: tokens must not be negative: {prompt}, {output}")
        else:
            self.left_out += 1


def open_trace(path: Path) -> TraceFile:
    """A trace, its format told from its name and first line.

    Raises:
      WorkloadError: there is no such file, or it is none of the known formats.
    """
    return TraceFile(path, trace_format(path))


def trace_format(path: Path) -> Format:
    """The format of a trace file.

    Raises:
      WorkloadError: it is none that is known; ShareGPT's, which has no times, is named as such.
    """
    with _opened(path) as file:
        head = file.readline(10_000)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return "mooncake"
    if suffix == ".csv":
        columns = [name.strip() for name in head.split(",")]
        if set(_AZURE) <= set(columns):
            return "azure"
        if set(_BURSTGPT) <= set(columns):
            return "burstgpt"
        raise WorkloadError(
            f"{path}: columns {', '.join(columns)} are neither Azure's ({', '.join(_AZURE)}) nor "
            f"BurstGPT's ({', '.join(_BURSTGPT)})"
        )
    if suffix == ".json":
        if head.lstrip().startswith("["):
            raise WorkloadError(
                f"{path}: a ShareGPT file has lengths and no times; give it as the lengths of a "
                f"synthetic workload (--lengths)"
            )
        return "muxserve"
    raise WorkloadError(
        f"{path}: a trace is .jsonl (Mooncake), .csv (Azure, BurstGPT) or .json (MuxServe)"
    )


def approximate_tokens(text: str) -> int:
    """Tokens of a text where there is no tokenizer: four bytes a token, as English has about."""
    return -(-len(text.encode()) // 4)


def sharegpt_lengths(
    path: Path, count_tokens: Callable[[str], int] = approximate_tokens
) -> list[tuple[int, int]]:
    """Tokens of the first question and answer of each conversation, as MuxServe's and vLLM's
    benchmarks take them (`SHAREGPT_LIMITS`).

    Args:
      path: ShareGPT's JSON: a list of `{"conversations": [{"from": ..., "value": text}, ...]}`.
      count_tokens: a tokenizer's count.

    Raises:
      WorkloadError: not such a file, or no conversation in it is within the limits.
    """
    data = _json_file(path)
    if not isinstance(data, list):
        raise WorkloadError(f"{path}: a ShareGPT file is a list of conversations")
    least, most_prompt, most = SHAREGPT_LIMITS
    pairs: list[tuple[int, int]] = []
    for index, entry in enumerate(data):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise WorkloadError(f"{path}: [{index}] has no list of conversations")
        if len(turns) < 2:
            continue
        try:
            prompt, output = (count_tokens(turn["value"]) for turn in turns[:2])
        except (KeyError, TypeError, AttributeError) as error:
            raise WorkloadError(f"{path}: [{index}] has a turn without a text value") from error
        if min(prompt, output) >= least and prompt <= most_prompt and prompt + output <= most:
            pairs.append((prompt, output))
    if not pairs:
        raise WorkloadError(f"{path}: no conversation of {least} to {most} tokens in it")
    return pairs


def write_trace(requests: Iterable[TraceRequest], path: Path) -> int:
    """Writes a trace: `.jsonl` in Mooncake's format with the model added, `.json` in MuxServe's.

    Returns:
      How many requests it has.

    Raises:
      WorkloadError: another kind of file.
    """
    if path.suffix == ".jsonl":
        return _write_mooncake(requests, path)
    if path.suffix == ".json":
        return _write_muxserve(requests, path)
    raise WorkloadError(f"{path}: traces are written as .jsonl (Mooncake) or .json (MuxServe)")


def _write_mooncake(requests: Iterable[TraceRequest], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            row: dict[str, Any] = {
                "timestamp": request.arrival * 1000,
                "input_length": request.prompt_tokens,
                "output_length": request.output_tokens,
                "hash_ids": list(request.hash_ids),
            }
            if request.model:
                row["model"] = request.model
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def _write_muxserve(requests: Iterable[TraceRequest], path: Path) -> int:
    arrivals: list[float] = []
    entries: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for index, request in enumerate(requests):
        arrivals.append(request.arrival)
        counts[request.model] = counts.get(request.model, 0) + 1
        lengths = ["", request.prompt_tokens, request.output_tokens]
        entries.append({"model_name": request.model, "data": lengths, "slo": None, "idx": index})
    seconds = arrivals[-1] if arrivals else 0.0
    info = {
        "rates": [[name, count / seconds if seconds else 0.0] for name, count in counts.items()],
        "start": 0,
        "duration": seconds,
        "num_requests": list(counts.values()),
    }
    data = {"info": info, "arrivals": arrivals, "requests": entries}
    path.write_text(json.dumps(data), encoding="utf-8")
    return len(arrivals)


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror or error}") from error


def _json_file(path: Path) -> Any:
    with _opened(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise WorkloadError(f"{path}: not JSON: {error}") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: a line is a JSON object, not {line.strip()[:40]!r}")
    return row


def _number(row: dict[str, Any], key: str, where: str) -> float:
    if key not in row:
        raise WorkloadError(f"{where}: {key} is missing")
    try:
        return float(row[key])
    except (TypeError, ValueError) as error:
        raise WorkloadError(f"{where}: {key} must be a number, not {row[key]!r}") from error


def _whole(row: dict[str, Any], key: str, where: str) -> int:
    value = _number(row, key, where)
    if value != value or value in (float("inf"), float("-inf")) or value != int(value):
        raise WorkloadError(f"{where}: {key} must be a whole number, not {row[key]!r}")
    return int(value)
