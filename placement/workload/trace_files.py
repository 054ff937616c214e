"""Reads traces of requests.

| format | file | time | models |
|---|---|---|---|
| Mooncake (kvcache-ai/Mooncake, FAST 2025) | JSONL: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` | from 0 | where lines have `model` |
| Azure LLM inference (Azure/AzurePublicDataset) | CSV: `TIMESTAMP`, `ContextTokens`, `GeneratedTokens` | dates | no |
| BurstGPT (HPMLL/BurstGPT) | CSV: `Timestamp` (s), `Model`, `Request tokens`, `Response tokens` | seconds | yes |
| MuxServe's workload | JSON: `arrivals` (s), `requests` with `model_name` and `data: [prompt, tokens in, tokens out]` | from 0 | yes |

Times of Azure and BurstGPT are shifted to start at 0. Their failed requests, which have no input or
output tokens, are skipped and counted. Rows are read one by one, except in MuxServe's JSON, which
is one document.

ShareGPT's JSON has conversations without times: `sharegpt_lengths` (`sharegpt.py`) reads pairs for
`lengths.Sampled`.
"""  # noqa: E501  a table

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from muxjax.errors import WorkloadError
from muxjax.placement.workload.file_fields import (
    integer_field,
    number_field,
    open_text,
    parse_json_object,
    read_json,
)
from muxjax.placement.workload.trace import TraceRequest, validate_requests

Format = Literal["mooncake", "azure", "burstgpt", "muxserve"]
type _Row = tuple[str, TraceRequest]

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Model", "Request tokens", "Response tokens")


@dataclass
class TraceFile:
    """A workload in a trace file.

    Attributes:
      path: the file.
      format: format of the file; see `trace_format`.
      left_out: number of failed requests that the last iteration skipped.

    Raises:
      WorkloadError: while iterating: a missing or invalid value; the message names its position.
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
        for request in validate_requests(readers[self.format]()):
            empty = False
            yield request
        if empty:
            raise WorkloadError(f"{self.path}: no requests")

    def _mooncake(self) -> Iterator[_Row]:
        with open_text(self.path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{self.path}:{number}"
                row = parse_json_object(line, where)
                hash_ids = row.get("hash_ids", [])
                if not isinstance(hash_ids, list):
                    raise WorkloadError(f"{where}: hash_ids must be a list, not {hash_ids!r}")
                yield (
                    where,
                    TraceRequest(
                        number_field(row, "timestamp", where) / 1000,
                        str(row.get("model", "")),
                        integer_field(row, "input_length", where),
                        integer_field(row, "output_length", where),
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
                raise WorkloadError(f"{where}: TIMESTAMP is not a date: {text!r}") from error
            first = first or time
            try:
                arrival = (time - first).total_seconds()
            except TypeError as error:  # only some times have a time zone
                raise WorkloadError(f"{where}: TIMESTAMP differs in its time zone") from error
            yield from self._skip_failed(
                where,
                arrival,
                "",
                integer_field(row, "ContextTokens", where),
                integer_field(row, "GeneratedTokens", where),
            )

    def _burstgpt(self) -> Iterator[_Row]:
        first: float | None = None
        for where, row in self._csv(_BURSTGPT):
            time = number_field(row, "Timestamp", where)
            first = time if first is None else first
            yield from self._skip_failed(
                where,
                time - first,
                row["Model"].strip(),
                integer_field(row, "Request tokens", where),
                integer_field(row, "Response tokens", where),
            )

    def _muxserve(self) -> Iterator[_Row]:
        data = read_json(self.path)
        if not isinstance(data, dict) or not {"arrivals", "requests"} <= data.keys():
            raise WorkloadError(
                f"{self.path}: not a MuxServe workload: must have arrivals and requests"
            )
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
                    f"{where}: must have model_name and data: [prompt, tokens in, tokens out]"
                )
            lengths = {"prompt tokens": data[1], "output tokens": data[2], "arrival": arrival}
            yield (
                where,
                TraceRequest(
                    number_field(lengths, "arrival", where),
                    str(request["model_name"]),
                    integer_field(lengths, "prompt tokens", where),
                    integer_field(lengths, "output tokens", where),
                ),
            )

    def _csv(self, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
        with open_text(self.path) as file:
            rows = csv.DictReader(file)
            missing = [name for name in columns if name not in (rows.fieldnames or ())]
            if missing:
                raise WorkloadError(f"{self.path}: no column {', '.join(missing)}")
            for row in rows:
                where = f"{self.path}:{rows.line_num}"
                if None in row.values():
                    raise WorkloadError(f"{where}: too few columns")
                yield where, row

    def _skip_failed(
        self, where: str, arrival: float, model: str, prompt: int, output: int
    ) -> Iterator[_Row]:
        if prompt > 0 and output > 0:
            yield where, TraceRequest(arrival, model, prompt, output)
        elif prompt < 0 or output < 0:
            raise WorkloadError(f"{where}: tokens must be 0 or more, not {prompt} and {output}")
        else:
            self.left_out += 1


def open_trace(path: Path) -> TraceFile:
    """Opens a trace of any supported format.

    Raises:
      WorkloadError: the file cannot be read, or its format is unknown.
    """
    return TraceFile(path, trace_format(path))


def trace_format(path: Path) -> Format:
    """Detects the format of a trace file from its name and first line.

    Raises:
      WorkloadError: the file cannot be read, or its format is unknown.
    """
    with open_text(path) as file:
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
                f"{path}: a ShareGPT file has lengths but no times; use it for the lengths of a "
                f"synthetic workload (--lengths)"
            )
        return "muxserve"
    raise WorkloadError(
        f"{path}: a trace must be .jsonl (Mooncake), .csv (Azure, BurstGPT) or .json (MuxServe)"
    )
