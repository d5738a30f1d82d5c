"""Prefix codes of bytes that can be decoded anywhere: Huffman codes of bounded length, lanes that start at a whole byte.

The symbols of a tensor lie one after another in lanes of :data:`LANE`; a block is :data:`BLOCK` lanes and starts at a whole word.
Any block, and any lane of it, can be decoded without the others. Lanes are decoded side by side, a symbol of each at a time,
with plain tensor operations, so the same code runs on every device.

A bit string begins at the lowest bit of a word. Codes are canonical: ordered by length, then by symbol; their first bit comes first.

Shapes: n symbols, L lanes, W words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LANE = 64  # symbols of one lane
BLOCK = 512  # lanes of one block
LIMIT = 11  # bits of the longest code: three codes fit in what is left of 64 bits after a shift by less than a word
PIECE = 8 * BLOCK  # lanes coded or decoded at once, to bound what lives besides the result
_WORD = 32
_LANE_WORDS = -(-LANE * LIMIT // _WORD) + 1  # that one lane may touch
_AT_ONCE = (2 * _WORD - (_WORD - 1)) // LIMIT  # codes read from one window


class Coded(NamedTuple):
    """Symbols in coded form.

    Attributes:
        words: int32 [W], the bit strings.
        lanes: uint8 [L], bytes of each lane.
        blocks: int32 [L / BLOCK, rounded up], the word at which each block starts.
        lengths: uint8 [256], bits of each symbol's code, 0 = it does not occur. The whole code follows from it.
    """

    words: Tensor
    lanes: Tensor
    blocks: Tensor
    lengths: Tensor


def code_lengths(counts: Sequence[int], limit: int = LIMIT) -> list[int]:
    """Bits of each symbol's code, at most ``limit``, such that no such code makes the whole shorter; 0 for symbols that do not occur.

    Larmore and Hirschberg 1990 ("A fast algorithm for optimal length-limited Huffman codes"), package-merge. A lone symbol gets
    one bit.

    Raises:
        ValueError: more symbols occur than codes of so many bits exist.
    """
    leaves = sorted((count, (symbol,)) for symbol, count in enumerate(counts) if count)
    if len(leaves) > 2**limit:
        raise ValueError(f"{len(leaves)} symbols have no codes of {limit} bits or fewer; allowed: at most {2**limit} symbols")
    lengths = [0] * len(counts)
    if len(leaves) == 1:
        lengths[leaves[0][1][0]] = 1
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(limit if len(leaves) > 1 else 0):
        merged = sorted([*leaves, *packages])
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[::2], merged[1::2], strict=False)]
    for _, symbols in packages[: len(leaves) - 1]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def codes_of(lengths: Tensor) -> Tensor:
    """The canonical codes int64 [256] of these lengths, first bit lowest."""
    ranked = sorted((length, symbol) for symbol, length in enumerate(lengths.tolist()) if length)
    codes, code, before = [0] * len(lengths), 0, 0
    for length, symbol in ranked:
        code <<= length - before
        codes[symbol] = int(f"{code:0{length}b}"[::-1], 2)
        code, before = code + 1, length
    return torch.tensor(codes, device=lengths.device)


def encode(symbols: Tensor) -> Coded:
    """Code symbols uint8 [n], n > 0, by how often they occur. The last lane is filled up with the most frequent one."""
    counts = torch.bincount(symbols, minlength=256)
    lengths = torch.tensor(code_lengths(counts.tolist()), dtype=torch.uint8, device=symbols.device)
    codes, bits = codes_of(lengths), lengths.long()
    words, lanes, blocks, start = [], [], [], 0
    for piece in symbols.split(PIECE * LANE):
        filled = F.pad(piece, (0, -len(piece) % LANE), value=int(counts.argmax())).view(-1, LANE).long()
        each = bits[filled]  # [L, LANE]
        ends = each.cumsum(1)
        taken = (ends[:, -1] + 7) // 8  # bytes of a lane
        held, bases = _within_blocks(taken)
        at = (_WORD * bases.repeat_interleave(BLOCK)[: len(held)] + 8 * held)[:, None] + ends - each
        value = codes[filled] << (at % _WORD)
        total = int(bases[-1])
        room = torch.zeros(total + 1, dtype=torch.long, device=symbols.device)
        room.index_add_(0, (at // _WORD).flatten(), (value & 0xFFFFFFFF).flatten())  # bits never meet, so a sum is an "or"
        room.index_add_(0, (at // _WORD + 1).flatten(), (value >> _WORD).flatten())
        words.append(room[:total].to(torch.int32))
        lanes.append(taken.to(torch.uint8))
        blocks.append((bases[:-1] + start).to(torch.int32))
        start += total
    return Coded(torch.cat(words), torch.cat(lanes), torch.cat(blocks), lengths)


def _within_blocks(taken: Tensor) -> tuple[Tensor, Tensor]:
    """Of lanes of so many bytes, int64 [L]: at which byte of its block each starts [L], and the blocks' first words with the end."""
    padded = F.pad(taken, (0, -len(taken) % BLOCK)).view(-1, BLOCK)
    ends = padded.cumsum(1)
    bases = F.pad(((ends[:, -1] + 3) // 4).cumsum(0), (1, 0))
    return (ends - padded).flatten()[: len(taken)], bases


def decode(coded: Coded) -> Iterator[Tensor]:
    """All symbols in pieces uint8 [PIECE * LANE] in their order; the last one ends with what filled the last lane."""
    table, step = tables(coded.lengths), PIECE // BLOCK
    for block in range(0, len(coded.blocks), step):
        lanes = coded.lanes[block * BLOCK : (block + step) * BLOCK].long()
        held, bases = _within_blocks(lanes)
        first = int(coded.blocks[block])
        words = coded.words[first : first + int(bases[-1])]
        at = _WORD * bases.repeat_interleave(BLOCK)[: len(held)] + 8 * held
        yield _decode(words, at, *table).T.reshape(-1)


def decode_lanes(coded: Coded, which: Tensor) -> Tensor:
    """Single lanes, by their numbers int64 [L]: symbols uint8 [L, LANE]."""
    block = which // BLOCK
    lanes = F.pad(coded.lanes, (0, -len(coded.lanes) % BLOCK)).view(-1, BLOCK)[block].long()  # [L, BLOCK]
    before = (lanes.cumsum(1) - lanes).gather(1, (which % BLOCK)[:, None])[:, 0]
    at = _WORD * coded.blocks[block].long() + 8 * before
    span = torch.arange(_LANE_WORDS, device=which.device)
    near = ((at // _WORD)[:, None] + span).clamp_(max=len(coded.words) - 1)
    start = at % _WORD + _WORD * _LANE_WORDS * torch.arange(len(which), device=which.device)
    return _decode(coded.words[near].flatten(), start, *tables(coded.lengths)).T


def tables(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What the next :data:`LIMIT` bits begin with: symbol uint8 [2^LIMIT] and the bits of its code int64 [2^LIMIT]."""
    order = lengths.argsort(stable=True)[int((lengths == 0).sum()) :]
    shares = 1 << (LIMIT - lengths[order].long())
    symbols = order.repeat_interleave(shares)
    symbols = F.pad(symbols, (0, 2**LIMIT - len(symbols)), value=int(order[0]))[_reversed_bits(lengths.device)]  # a lone symbol
    return symbols.to(torch.uint8), lengths.long()[symbols]


@cache
def _reversed_bits(device: torch.device) -> Tensor:
    return torch.tensor([int(f"{i:0{LIMIT}b}"[::-1], 2) for i in range(2**LIMIT)], device=device)


def _decode(words: Tensor, at: Tensor, symbols: Tensor, bits: Tensor) -> Tensor:
    """A lane of symbols from each bit position ``at`` int64 [L] of words int32 [W]: uint8 [LANE, L]. ``at`` is used up."""
    low = words.long() & 0xFFFFFFFF
    pairs = low | (F.pad(low[1:], (0, 1)) << _WORD)  # 64 bits from each word on
    out = torch.empty(LANE, len(at), dtype=torch.uint8, device=words.device)
    window, index, taken = torch.empty_like(at), torch.empty_like(at), torch.empty_like(at)
    for i, row in enumerate(out.unbind()):
        if i % _AT_ONCE == 0:
            torch.index_select(pairs, 0, at >> 5, out=window)
            window >>= at & (_WORD - 1)
        else:
            window >>= taken
        torch.bitwise_and(window, 2**LIMIT - 1, out=index)
        torch.index_select(symbols, 0, index, out=row)
        torch.index_select(bits, 0, index, out=taken)
        at += taken
    return out
