"""The context coder as a Zarr v3 codec, so that zarr-python reads dense caches by itself where segkd is installed.

zarr finds the class through the entry point group ``zarr.codecs``; importing this module registers it as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec

from segkd.storage.context import decode, encode, kernels
from segkd.storage.errors import ConfigError

NAME = "segkd.context"


@dataclass(frozen=True)
class ContextCodec(ArrayBytesCodec):
    """Codes chunks of uint8 whose last three axes are (classes, h, w) and whose other axes are 1."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ContextCodec:
        if data.get("name") != NAME or data.get("configuration"):
            raise ConfigError(f"the codec {NAME} takes no configuration, got {data}; install a newer segkd to read it")
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:  # noqa: ARG002  # zarr's
        """Raises ConfigError for arrays that it cannot code, and for any where numba is missing."""
        native = dtype.to_native_dtype()
        if native != np.uint8 or len(shape) < 3:
            raise ConfigError(
                f"the codec {NAME} takes uint8 arrays (…, classes, h, w), got {native} {shape}; "
                "keep other targets with zstd"
            )
        kernels()

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        codes = chunk_array.as_numpy_array().reshape(_plane_shape(chunk_spec.shape))
        return chunk_spec.prototype.buffer.from_bytes(encode(codes))

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        codes = decode(chunk_bytes.to_bytes(), _plane_shape(chunk_spec.shape))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(codes.reshape(chunk_spec.shape))

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return self._encode_sync(chunk_array, chunk_spec)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return self._decode_sync(chunk_bytes, chunk_spec)

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        """Never asked for: the size depends on what is coded."""
        raise NotImplementedError


def _plane_shape(chunk: tuple[int, ...]) -> tuple[int, int, int]:
    if len(chunk) < 3 or any(length != 1 for length in chunk[:-3]):
        raise ConfigError(
            f"the codec {NAME} takes chunks (1, …, classes, h, w), got {chunk}; make a chunk of each tile"
        )
    classes, height, width = chunk[-3:]
    return classes, height, width


register_codec(NAME, ContextCodec)
