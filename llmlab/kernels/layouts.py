"""How quantized matrices lie in memory so that a kernel reads long lines and unpacks them in registers.

int4: tiles of 64 rows and 256 columns, one behind another along a band of 64 rows; a row of a tile is 32 words, the 128
bytes of a cache line. Word c of a row holds eight columns: nibble i of its low half column 64 i + 2 c, and nibble i of its
high half the next, i = 0..3. One shift, one mask and one OR then give a pair of bfloat16 numbers 128 + code: with the
exponent of 128 the last place of a bfloat16 is 1. The pairs of word 0, 1, ... follow one another as a product of matrices
wants its columns. The numbers are exact, and so is the subtraction of 136.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BAND, TILE = 64, 256  # rows and columns of a tile
GROUPS = (64, 128)


class Int4Weight(NamedTuple):
    """A matrix [N, K] of 4-bit codes in groups along its rows, (code - zero) · scale, as ``int4_linear`` reads it.

    words: int32 [N/64, K/256, 64, 32], eight codes each. scales: bfloat16 [N/64, K/256, 64, 256/group_size]. zeros: like
    scales, 136 + zero of each group, or None for a symmetric matrix. Both sizes are rounded up; what is added is 0.
    """

    words: Tensor
    scales: Tensor
    out_features: int
    in_features: int
    group_size: int
    zeros: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """What is stored: N·K/2 + 2·N·K/group_size bytes where tiles divide the matrix, and as much again for zeros."""
        return self.words.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


class Nf4Weight(NamedTuple):
    """A matrix [N, K] of NF4 codes in blocks of 64, K a multiple of 64, in the order of bitsandbytes.

    codes: uint8 [N·K/2], the earlier column in the high nibble. absmax: of each block, float32 [N·K/64]; or, where they
    are quantized too, uint8 with ``absmax_table`` [256], ``absmax_scale`` [ceil(N·K/64/256)] and ``absmax_offset`` [1]:
    absmax = table[code] · scale + offset, all float32. Source: Dettmers et al. 2023 (QLoRA), section 3.
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor
    out_features: int
    in_features: int
    absmax_table: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Int4Weight:
    """Lay out codes [N, K] from -8 to 7 with scales [N, K/group_size]: W = (code - zero) · scale, scale in bfloat16.

    zeros: whole numbers from -8 to 7 like scales, or None for 0. Codes from 0 to 15 and their zero points are packed less
    8. Quantize with scales that are bfloat16 already: else the rounding of a scale comes on top. Raises ValueError for a
    group size that is not 64 or 128, or numbers outside their range.
    """
    N, K = codes.shape
    if len(scales) != N or scales.ndim != 2 or K % scales.shape[1] or K // scales.shape[1] not in GROUPS:
        raise ValueError(f"scales: expected [{N}, {K} / 64 or 128], got {list(scales.shape)}")
    for name, tensor in (("codes", codes), ("zeros", zeros)):
        if tensor is not None and (tensor.is_floating_point() or int(tensor.min()) < -8 or int(tensor.max()) > 7):
            raise ValueError(
                f"{name}: expected whole numbers from -8 to 7, got {tensor.dtype} to {tensor.max().item()}"
            )
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zeros: expected the shape of scales, {list(scales.shape)}, got {list(zeros.shape)}")
    bands, tiles = -(-N // BAND), -(-K // TILE)
    padded = codes.new_zeros(bands * BAND, tiles * TILE, dtype=torch.int32)
    padded[:N, :K] = codes
    nibbles = (padded + 8).view(bands, BAND, tiles, 4, 32, 2).permute(0, 2, 1, 4, 5, 3)  # ..., word, half, nibble
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device).view(2, 4)
    words = (nibbles << shifts).sum((-2, -1), dtype=torch.int64).to(torch.int32)
    group_size = K // scales.shape[1]
    tiled = _tiled(scales, bands, tiles, group_size)
    tiled_zeros = None if zeros is None else _tiled(zeros, bands, tiles, group_size) + 136
    return Int4Weight(words.contiguous(), tiled, N, K, group_size, tiled_zeros)


def _tiled(of_groups: Tensor, bands: int, tiles: int, group_size: int) -> Tensor:
    """Numbers of groups [N, K/group_size] as bfloat16 [N/64, K/256, 64, 256/group_size], with zeros for what is added."""
    padded = of_groups.new_zeros(bands * BAND, tiles * TILE // group_size, dtype=torch.bfloat16)
    padded[: len(of_groups), : of_groups.shape[1]] = of_groups
    return padded.view(bands, BAND, tiles, -1).transpose(1, 2).contiguous()


def unpack_int4(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of ``pack_int4``: codes [N, K] int8, scales [N, K/group_size] bfloat16, and zeros int8 or None."""
    N, K = weight.out_features, weight.in_features
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.words.device).view(2, 4)
    nibbles = (weight.words[..., None, None] >> shifts) & 15  # [bands, tiles, 64, word, half, nibble]
    codes = nibbles.permute(0, 2, 1, 5, 3, 4).flatten(2).flatten(0, 1) - 8
    kept = K // weight.group_size
    scales = weight.scales.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :kept].contiguous()
    zeros = None if weight.zeros is None else weight.zeros.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :kept] - 136
    return codes[:N, :K].to(torch.int8), scales, None if zeros is None else zeros.to(torch.int8)
