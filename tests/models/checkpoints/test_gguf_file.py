"""The GGUF container: values, types and invalid files."""

from __future__ import annotations

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.gguf_file import GGUFFile


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.eps", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_array("a.texts", ["x", "é", ""])
    writer.add_array("a.numbers", [1, -2, 3])
    values = np.arange(128, dtype=np.float32).reshape(2, 64) / 16
    writer.add_tensor("f32", values)
    writer.add_tensor("f16", values.astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.Q8_0):
        writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata(small_file: Path) -> None:
    metadata = GGUFFile(small_file).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["a.count"] == 7
    assert metadata["a.eps"] == 0.5
    assert metadata["a.flag"] is True
    assert metadata["a.texts"] == ["x", "é", ""]
    assert metadata["a.numbers"].tolist() == [1, -2, 3]


def test_tensors_of_every_type(small_file: Path) -> None:
    file = GGUFFile(small_file)
    expected = np.arange(128, dtype=np.float32).reshape(2, 64) / 16
    assert set(file.shapes().values()) == {(2, 64)}
    for name, dtype, error in (
        ("f32", np.float32, 0.0),
        ("f16", np.float32, 0.0),
        ("BF16", ml_dtypes.bfloat16, 0.0),
        ("Q8_0", np.float32, 0.04),
    ):
        array = file.read(name)
        assert array.dtype == dtype
        assert array.shape == (2, 64)
        assert array.flags.writeable
        np.testing.assert_allclose(array.astype(np.float32), expected, atol=error)


def test_rows_are_dequantized_in_chunks(small_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = GGUFFile(small_file).read("Q8_0")
    monkeypatch.setattr("muxjax.models.checkpoints.gguf_file._CHUNK_VALUES", 64)
    np.testing.assert_array_equal(GGUFFile(small_file).read("Q8_0"), expected)


def test_truncation_is_detected(small_file: Path, tmp_path: Path) -> None:
    data = small_file.read_bytes()
    truncated = tmp_path / "truncated.gguf"
    end_of_data = max(
        info.offset + info.num_bytes for info in GGUFFile(small_file).tensors.values()
    )
    for size in [*range(0, 600, 7), end_of_data - 1]:
        truncated.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            GGUFFile(truncated)


def test_other_files_are_rejected(small_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    data = bytearray(small_file.read_bytes())
    other.write_bytes(b"PK\3\4" + data[4:])
    with pytest.raises(CheckpointError, match="not a GGUF file: it starts with"):
        GGUFFile(other)
    data[4] = 1
    other.write_bytes(data)
    with pytest.raises(CheckpointError, match="GGUF version 1"):
        GGUFFile(other)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        GGUFFile(tmp_path / "none.gguf")


def test_unknown_tensor_type_is_rejected(small_file: Path, tmp_path: Path) -> None:
    data = bytearray(small_file.read_bytes())
    position = data.index(b"Q8_0") + 4 + 4 + 16  # after the name: number of axes, two sizes
    data[position] = 200
    path = tmp_path / "odd.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="tensor Q8_0 has unknown type 200"):
        GGUFFile(path)


def test_type_without_dequantization_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "i8.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("i8", np.ones((2, 32), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="tensor i8: cannot dequantize I8"):
        GGUFFile(path).read("i8")
