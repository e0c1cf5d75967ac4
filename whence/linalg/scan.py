"""Inner products of rows in int8, or of signs, with a few others, at the speed of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

LOW = 254
"""What the second digit of a number counts: 1/254 of the first, so that both are in -127 ... 127."""

PLANES, WEIGHTS = 4, (1, 2, 4, -8)
"""Bits of a number that meets signs, and what they stand for."""

BLOCK_ROWS = 2**16
"""Rows that a thread works at."""

STEP = 1024
"""Rows whose bits are counted at a time, in the cache."""


def in_blocks(work: Callable[[slice], None], count: int) -> None:
    """Do the work for all of so many rows, block by block, on as many threads as torch has."""
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, count, BLOCK_ROWS)]
    threads = min(torch.get_num_threads(), len(blocks))
    if threads < 2:
        for block in blocks:
            work(block)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, blocks))


def digits(rows_QD: Tensor, count: int = 2) -> tuple[list[Tensor], Tensor]:
    """Rows as one or two digits of int8 `[D, Q]`, and the unit of the first one, `[Q]`; two keep 15 bits, one keeps 8."""
    unit_Q = rows_QD.abs().amax(1).clamp(min=torch.finfo(rows_QD.dtype).tiny) / 127
    first_QD = (rows_QD / unit_Q.unsqueeze(1)).round()
    second_QD = ((rows_QD / unit_Q.unsqueeze(1) - first_QD) * LOW).round()
    found = [digit.to(torch.int8).T.contiguous() for digit in (first_QD, second_QD)[:count]]
    return found, unit_Q


def int8_products(codes_nD: Tensor, rows: tuple[Sequence[Tensor], Tensor]) -> Tensor:
    """Inner products of codes with rows as `digits` gives them, `[Q, n]` in float32; sums are exact up to 2^31."""
    (first_DQ, *rest), unit_Q = rows
    found = []
    for query in range(len(unit_Q)):  # a product with one vector takes a third of the time of one with two
        product_n = torch.ops.aten._int_mm(codes_nD, first_DQ[:, query : query + 1]).float()
        for second_DQ in rest:
            product_n += torch.ops.aten._int_mm(codes_nD, second_DQ[:, query : query + 1]) / LOW
        found.append(product_n[:, 0] * unit_Q[query])
    return torch.stack(found)


def sign_bits(x_BK: Tensor) -> Tensor:
    """Signs of numbers, eight in a byte, `[B, K / 8]`; K is a multiple of 8."""
    return torch.from_numpy(np.packbits((x_BK > 0).numpy(), axis=1, bitorder="little"))


def planes(rows_QK: Tensor) -> tuple[np.ndarray, Tensor]:
    """Rows in steps from -8 to 7, as the `PLANES` bits of each number, `[Q, PLANES, K / 64]`, and the step of each row."""
    step_Q = rows_QK.abs().amax(1).clamp(min=torch.finfo(rows_QK.dtype).tiny) / 7
    whole_QK = (rows_QK / step_Q.unsqueeze(1)).round().to(torch.int8).numpy()
    bits = np.stack([(whole_QK >> plane) & 1 for plane in range(PLANES)], 1)
    return _words(np.packbits(bits, axis=2, bitorder="little")), step_Q


def sign_products(bits_nW: Tensor, rows: tuple[np.ndarray, Tensor]) -> Tensor:
    """Inner products of signs, as `sign_bits` packs them, with rows as `planes` gives them: `[Q, n]` in float32.

    Of a number `-8 b3 + 4 b2 + 2 b1 + b0` and a sign `2 c - 1` the product is twice the number where `c` is set, less the
    number: bits that both have are counted plane by plane (as in RaBitQ: Gao & Long 2024, section 3.3).
    """
    planes_QPW, step_Q = rows
    words_nW, (_, _, count) = _words(bits_nW.numpy()), planes_QPW.shape
    found, some = torch.empty(len(step_Q), len(words_nW)), min(len(words_nW), STEP)
    ones, weights = torch.ones(count, 1, dtype=torch.int8), torch.tensor(WEIGHTS, dtype=torch.int32).unsqueeze(1)
    both = np.empty((PLANES, some, count), np.uint64)
    counted = np.empty(both.shape, np.uint8)
    for query, planes_PW in enumerate(planes_QPW):
        total = sum(weight * int(np.bitwise_count(plane).sum()) for weight, plane in zip(WEIGHTS, planes_PW, strict=True))
        planes_PnW = np.repeat(planes_PW[:, None], some, 1)  # numpy is slow at a row for each of many rows
        for start in range(0, len(words_nW), STEP):
            rows_nW = words_nW[start : start + STEP]
            here = slice(len(rows_nW))
            np.bitwise_and(rows_nW, planes_PnW[:, here], out=both[:, here])
            np.bitwise_count(both[:, here], out=counted[:, here])
            flat = torch.from_numpy(counted.reshape(-1, count).view(np.int8))
            sums_Pn = torch.ops.aten._int_mm(flat, ones).view(PLANES, some)[:, here]
            found[query, start : start + STEP] = (sums_Pn * weights).sum(0)
        found[query] = (2 * found[query] - total) * step_Q[query]
    return found


def _words(bytes_nW: np.ndarray) -> np.ndarray:
    """Bytes as words of 64 bits, zeros added."""
    short = -bytes_nW.shape[-1] % 8
    if short:
        bytes_nW = np.concatenate([bytes_nW, np.zeros((*bytes_nW.shape[:-1], short), np.uint8)], -1)
    return np.ascontiguousarray(bytes_nW).view(np.uint64)
