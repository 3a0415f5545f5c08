"""The GGUF container: metadata, and tensors by name, read without loading the file.

The `gguf` package's own reader makes one NumPy array for every entry of every array (9 s for Gemma's vocabulary
of 262,144); this one reads the same bytes in a fraction of that. Dequantization is the package's.
Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from posttrain_jax.core.errors import InputError, shown

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4
"""How many arrays may lie in each other; no known file has any in another."""


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """The location of a tensor in the file: `shape` in row-major order (out, in), `offset` and `size` in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class GgufFile:
    """An open GGUF file: `metadata` (key -> number, string or list) and `tensors` (name -> `GgufTensor`).

    Raises:
      InputError: the file is missing, cut short, or not GGUF version 2 or 3.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: there is no such file; give the path of a .gguf file.")
        if self.path.stat().st_size < 24:
            raise InputError(f"{self.path}: not a GGUF file (it is too short); download it again.")
        with open(self.path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        try:
            self._read_header()
        except (struct.error, ValueError, KeyError) as error:
            raise InputError(
                f"{self.path}: the GGUF header is damaged near byte {self._at} ({error}); download the file again."
            ) from error
        for tensor in self.tensors.values():
            if tensor.offset + tensor.size > len(self._bytes):
                raise InputError(
                    f"{self.path}: the file ends inside tensor {tensor.name}; download the file again."
                )

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32 (float32 and float16 files keep their values), row-major (out, in)."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, tensor.size, tensor.offset)
        if tensor.kind == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(tensor.shape)
        if tensor.kind == GGMLQuantizationType.F16:
            return raw.view(np.float16).reshape(tensor.shape).astype(np.float32)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        try:
            return dequantize(rows, tensor.kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: tensor {name} is stored as {tensor.kind.name}, which the gguf package cannot "
                "dequantize; use a file with another quantization (Q4_1, Q4_K_M, Q8_0, F16 ...)."
            ) from error

    def _unpack(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self._bytes, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._at
        if start + length > len(self._bytes):
            raise ValueError("a string runs past the end of the file")
        self._at += length
        return self._bytes[start : self._at].decode("utf-8")

    def _strings(self, count: int) -> list[str]:
        """`count` strings; the loop is written out because vocabularies are long."""
        data, at, out = self._bytes, self._at, []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8 + unpack(data, at)[0]
            if end > len(data):
                raise ValueError("a string runs past the end of the file")
            out.append(data[at + 8 : end].decode("utf-8"))
            at = end
        self._at = at
        return out

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            if depth == _DEEPEST:
                raise ValueError(f"more than {_DEEPEST} arrays in each other")
            item, count = self._unpack("I")[0], self._unpack("Q")[0]
            if count > len(self._bytes):
                raise ValueError(f"an array of {count} entries does not fit the file")
            if item == _STRING:
                return self._strings(count)
            if item == _ARRAY:
                return [self._value(_ARRAY, depth + 1) for _ in range(count)]
            return list(self._unpack(_SCALARS[item], count))
        return self._unpack(_SCALARS[kind])[0]

    def _read_header(self) -> None:
        magic, version = self._bytes[:4], struct.unpack_from("<I", self._bytes, 4)[0]
        if magic != b"GGUF":
            raise InputError(f"{self.path}: not a GGUF file (it starts with {magic!r}).")
        if version not in (2, 3):
            raise InputError(
                f"{self.path}: GGUF version {version} is not supported, only 2 and 3; convert it again."
            )
        self._at = 8
        tensor_count, key_count = self._unpack("Q", 2)
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            self.metadata[key] = self._value(self._unpack("I")[0])
        infos = []
        for _ in range(tensor_count):
            name = self._string()
            dims = self._unpack("Q", self._unpack("I")[0])
            infos.append((name, dims[::-1], GGMLQuantizationType(self._unpack("I")[0]), self._unpack("Q")[0]))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {shown(alignment)}, no positive number")
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if math.prod(shape[-1:]) % block:
                raise ValueError(
                    f"rows of {shape[-1]} in tensor {shown(name)} are no whole blocks of {block}"
                )
            size = math.prod(shape) // block * block_bytes
            self.tensors[name] = GgufTensor(name, shape, kind, start + offset, size)
