"""Prefix codes against codes made by hand, a heap, and every possible choice of lengths."""

from __future__ import annotations

import heapq
from itertools import product

import pytest
import torch
from torch import Tensor

from workers.mechanisms import prefix_code
from workers.mechanisms.prefix_code import BLOCK, LANE, LIMIT, PIECE, code_lengths, codes_of, decode, decode_lanes, encode


def cost(counts: list[int], lengths: list[int]) -> int:
    return sum(c * b for c, b in zip(counts, lengths, strict=True))


def by_heap(counts: list[int]) -> tuple[int, int]:
    """Bits of the whole and of the longest code of Huffman's own algorithm."""
    heap = [(c, i, [i]) for i, c in enumerate(counts) if c]
    depth = [0] * len(counts)
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, i, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            depth[symbol] += 1
        heapq.heappush(heap, (a + b, i, left + right))
    return cost(counts, depth), max(depth)


def symbols(kind: str, n: int) -> Tensor:
    pen = torch.Generator().manual_seed(n)
    drawn = {
        "even": lambda: torch.randint(0, 256, (n,), generator=pen),
        "one": lambda: torch.full((n,), 77),
        "steep": lambda: torch.rand(n, generator=pen).log2().neg().clamp(max=255).long(),
    }
    return drawn[kind]().to(torch.uint8)


def test_a_code_by_hand() -> None:
    assert code_lengths([5, 2, 1, 1, 0]) == [1, 2, 3, 3, 0]  # 1 + 1 = 2, 2 + 2 = 4, 4 + 5
    assert codes_of(torch.tensor([1, 2, 3, 3, 0])).tolist() == [
        0b0,
        0b01,
        0b011,
        0b111,
        0,
    ]  # 0, 10, 110, 111, the first bit lowest
    coded = encode(torch.tensor([0, 1, 0, 2, 0, 3, 0, 1, 0], dtype=torch.uint8))
    assert coded.lengths.tolist() == [1, 2, 3, 3] + [0] * 252
    # 0 10 0 110 0 111 0 10 0, then 55 more zeros fill the lane up: 70 bits
    assert coded.words.tolist() == [0b0_01_0_111_0_011_0_01_0, 0, 0]
    assert coded.lanes.tolist() == [9]
    assert coded.blocks.tolist() == [0]
    assert next(decode(coded))[:9].tolist() == [0, 1, 0, 2, 0, 3, 0, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_without_a_limit_as_short_as_huffmans(seed: int) -> None:
    pen = torch.Generator().manual_seed(seed)
    counts = (torch.rand(40, generator=pen) ** 6 * 1000).int().tolist()
    best, longest = by_heap(counts)
    lengths = code_lengths(counts, limit=32)
    assert cost(counts, lengths) == best
    if longest <= LIMIT:
        assert cost(counts, code_lengths(counts)) == best
    assert sum(2.0**-b for b in lengths if b) == 1


def test_with_a_limit_no_other_lengths_are_shorter() -> None:
    for counts in ([1, 1, 2, 3, 5], [1, 2, 4, 8, 16], [7, 7, 7, 7], [1, 50, 3], [100, 1, 1, 1, 1, 1]):
        for limit in range((len(counts) - 1).bit_length(), 5):
            every = (ls for ls in product(range(1, limit + 1), repeat=len(counts)) if sum(2.0**-b for b in ls) <= 1)
            assert cost(counts, code_lengths(counts, limit)) == min(cost(counts, list(ls)) for ls in every)


def test_frequencies_that_ask_for_long_codes_get_short_ones() -> None:
    counts = [1, 1]
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])
    assert by_heap(counts)[1] == 39  # Fibonacci's numbers: each code a bit longer than the next
    lengths = code_lengths(counts)
    assert max(lengths) == LIMIT
    assert min(lengths) > 0
    assert sum(2.0**-b for b in lengths) == 1
    few = [min(c, 2000) for c in counts[:30]]
    stream = torch.arange(30, dtype=torch.uint8).repeat_interleave(torch.tensor(few))
    stream = stream[torch.randperm(len(stream), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(torch.cat(list(decode(encode(stream))))[: len(stream)], stream)


def test_more_symbols_than_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="5 symbols have no codes of 2 bits or fewer; allowed: at most 4"):
        code_lengths([1] * 5, limit=2)


@pytest.mark.parametrize("kind", ["even", "one", "steep"])
@pytest.mark.parametrize("n", [1, LANE - 1, LANE, LANE + 1, 1000, BLOCK * LANE, BLOCK * LANE + 1, PIECE * LANE + 77])
def test_every_symbol_comes_back_and_any_lane_by_itself(kind: str, n: int) -> None:
    given = symbols(kind, n)
    coded = encode(given)
    assert torch.equal(torch.cat(list(decode(coded)))[:n], given)
    lanes = -(-n // LANE)
    assert len(coded.lanes) == lanes
    assert len(coded.blocks) == -(-lanes // BLOCK)
    some = torch.tensor(sorted({0, lanes // 2, lanes - 1}))
    for lane, row in zip(some.tolist(), decode_lanes(coded, some), strict=True):
        assert torch.equal(row[: n - lane * LANE], given[lane * LANE : (lane + 1) * LANE])


def test_a_block_is_decoded_without_the_others() -> None:
    """Its words, its lanes and the code are all it takes."""
    given = symbols("steep", 3 * BLOCK * LANE)
    coded = encode(given)
    start, stop = coded.blocks[1:3].tolist()
    alone = coded._replace(words=coded.words[start:stop], lanes=coded.lanes[BLOCK : 2 * BLOCK], blocks=coded.blocks[:1])
    assert torch.equal(torch.cat(list(decode(alone))), given[BLOCK * LANE : 2 * BLOCK * LANE])


def test_the_working_memory_does_not_grow_with_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the decoder gets more than one piece of lanes."""
    sizes, real = [], prefix_code._decode
    monkeypatch.setattr(prefix_code, "_decode", lambda words, at, *t: (sizes.append(len(at)), real(words, at, *t))[1])
    n = 3 * PIECE * LANE + 5
    assert sum(map(len, decode(encode(symbols("steep", n))))) == n - 5 + LANE
    assert sizes == [PIECE] * 3 + [1]


def test_the_code_is_as_short_as_the_entropy_lets_it_be() -> None:
    given = symbols("steep", 100_000)
    coded, shares = encode(given), torch.bincount(given, minlength=256) / len(given)
    entropy = -(shares[shares > 0] * shares[shares > 0].log2()).sum()
    mean = (shares * coded.lengths).sum()
    assert entropy <= mean < entropy + 0.1
    assert 32 * len(coded.words) < (mean + 0.1) * len(given)  # lanes are filled up to whole bytes
