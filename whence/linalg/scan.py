"""Rows of influences in int8 and of signs, against questions: inner products at the speed of memory.

    questions = Questions.of(along_QJ, rest_QK)
    scan(rows, questions, places, along_QN, rest_QN, kernel)

There are three ways to the same numbers: torch and numpy, block by block; a kernel that numba compiles
(`whence.linalg.compiled`); and torch alone, where the questions are on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LARGEST_CODE = 127

PLANES, WEIGHTS = 4, (1, 2, 4, -8)
"""Bits of a number that meets signs, and what they stand for."""

BLOCK_ROWS = 2**16
"""Rows that a thread works at."""

STEP = 1024
"""Rows that torch and numpy take at a time, in the cache."""

DEVICE_BYTES = 2**28
"""Memory of a GPU for the signs that are numbers at a time."""

Rows = Mapping[str, Tensor]
"""int8 "codes" `[n, J]` and their "scale" `[n, 1]`, "signs" `[n, K / 8]` and their "size" `[n]`."""

Kernel = Callable[..., None]


@dataclass(frozen=True)
class Questions:
    """What rows are multiplied with, as whole numbers in units of their own."""

    whole_QJ: Tensor
    """int16, for codes; sums of products fit 32 bits."""
    unit_Q: Tensor
    steps_QK: Tensor
    """-7 ... 7 in int8, for signs."""
    step_Q: Tensor

    @classmethod
    def of(cls, along_QJ: Tensor, rest_QK: Tensor) -> Questions:
        """Round what rows are to be multiplied with; K is a multiple of 64."""
        most = min(2**15 - 1, (2**31 - 1) // (LARGEST_CODE * along_QJ.shape[1]))
        return cls(*_rounded(along_QJ, most, torch.int16), *_rounded(rest_QK, 7, torch.int8))

    @functools.cached_property
    def planes_QPK(self) -> np.ndarray:
        """The bits of each step, in words of 64, `[Q, PLANES, K / 64]`."""
        steps_QK = self.steps_QK.numpy()
        bits = np.stack([(steps_QK >> plane) & 1 for plane in range(PLANES)], 1)
        return np.packbits(bits, axis=2, bitorder="little").view(np.uint64)

    @functools.cached_property
    def total_Q(self) -> Tensor:
        """What the steps add up to."""
        return self.steps_QK.sum(1, dtype=torch.int64)

    def to(self, device: torch.device) -> Questions:
        """The same on a device."""
        return Questions(*(each.to(device) for each in (self.whole_QJ, self.unit_Q, self.steps_QK, self.step_Q)))


def _rounded(rows_QD: Tensor, most: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in whole numbers up to `most`, and the unit of each row."""
    unit_Q = rows_QD.abs().amax(1).clamp(min=torch.finfo(rows_QD.dtype).tiny) / most
    return (rows_QD / unit_Q.unsqueeze(1)).round().to(dtype), unit_Q


def scan(
    rows: Rows,
    questions: Questions,
    places: np.ndarray,
    along_QN: np.ndarray,
    rest_QN: np.ndarray,
    kernel: Kernel | None = None,
) -> None:
    """Write what codes and signs of the rows say of the questions to the rows' places in `along_QN` and `rest_QN`.

    Block by block, on CPUs with as many threads as torch has. `kernel` is `whence.linalg.compiled.scan_rows`.
    """
    device = questions.whole_QJ.device
    on_host = device.type == "cpu"
    if kernel is not None:
        of_questions = [each.numpy() for each in (questions.whole_QJ, questions.unit_Q)]
        of_questions += [questions.planes_QPK, questions.total_Q.numpy(), questions.step_Q.numpy()]

    def work(block: slice) -> None:
        codes, scale, signs, size = (rows[key][block].to(device) for key in ("codes", "scale", "signs", "size"))
        if kernel is not None:
            of_rows = codes.numpy(), scale[:, 0].numpy(), _words(signs), size.numpy()
            kernel(*of_rows, *of_questions, places[block], along_QN, rest_QN)
            return
        rest = sign_products(signs, questions) if on_host else unpacked_products(signs, questions)
        along_QN[:, places[block]] = (int8_products(codes, questions) * scale[:, 0]).cpu().numpy()
        rest_QN[:, places[block]] = (rest * size).cpu().numpy()

    size = BLOCK_ROWS if on_host else max(1, DEVICE_BYTES // (4 * questions.steps_QK.shape[1]))
    blocks = [slice(start, start + size) for start in range(0, len(places), size)]
    threads = min(torch.get_num_threads(), len(blocks)) if on_host else 1
    if threads < 2:
        for block in blocks:
            work(block)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, blocks))


def int8_products(codes_nJ: Tensor, questions: Questions) -> Tensor:
    """Inner products of codes with questions, `[Q, n]` in float32."""
    step = max(1, min(len(codes_nJ), STEP) if codes_nJ.device.type == "cpu" else len(codes_nJ))
    whole_JQ, found_nQ = questions.whole_QJ.T.float(), questions.unit_Q.new_empty(len(codes_nJ), len(questions.unit_Q))
    held_nJ = whole_JQ.new_empty(step, codes_nJ.shape[1])  # the same for all blocks: fresh memory takes ten times as long
    for start in range(0, len(codes_nJ), step):
        part_nJ = codes_nJ[start : start + step]
        torch.mm(held_nJ[: len(part_nJ)].copy_(part_nJ), whole_JQ, out=found_nQ[start : start + step])
    return found_nQ.T * questions.unit_Q.unsqueeze(1)


def sign_bits(x_BK: Tensor) -> Tensor:
    """Signs of numbers, eight in a byte, `[B, K / 8]`; K is a multiple of 8."""
    return torch.from_numpy(np.packbits((x_BK > 0).numpy(), axis=1, bitorder="little"))


def sign_products(bits_nB: Tensor, questions: Questions) -> Tensor:
    """Inner products of signs, as `sign_bits` packs them, with questions, `[Q, n]` in float32.

    Of a number `-8 b3 + 4 b2 + 2 b1 + b0` and a sign `2 c - 1` the product is twice the number where `c` is set, less the
    number: bits that both have are counted plane by plane (as in RaBitQ: Gao & Long 2024, section 3.3).
    """
    words_nK, planes_QPK = _words(bits_nB), questions.planes_QPK
    some, count = min(len(words_nK), STEP), words_nK.shape[1]
    both = np.empty((PLANES, some, count), np.uint64)
    counted = np.empty(both.shape, np.uint8)
    counts, ones, weights_P = torch.empty(PLANES * some, count), torch.ones(count), torch.tensor(WEIGHTS, dtype=torch.float32)
    found = torch.empty(len(planes_QPK), len(words_nK))
    for query, planes_PK in enumerate(planes_QPK):
        planes_PnK = np.repeat(planes_PK[:, None], some, 1)  # numpy is slow at a row for each of many rows
        for start in range(0, len(words_nK), STEP):
            rows_nK = words_nK[start : start + STEP]
            here = slice(len(rows_nK))
            np.bitwise_and(rows_nK, planes_PnK[:, here], out=both[:, here])
            np.bitwise_count(both[:, here], out=counted[:, here])
            sums_Pn = (counts.copy_(torch.from_numpy(counted).view(-1, count)) @ ones).view(PLANES, some)[:, here]
            found[query, start : start + STEP] = weights_P @ sums_Pn
    return (2 * found - questions.total_Q.unsqueeze(1)) * questions.step_Q.unsqueeze(1)


def unpacked_products(bits_nB: Tensor, questions: Questions) -> Tensor:
    """The same of signs that are numbers first, on any device."""
    places = torch.arange(8, dtype=torch.uint8, device=bits_nB.device)
    c_nK = ((bits_nB.unsqueeze(2) >> places) & 1).flatten(1).float()
    return questions.steps_QK.float() @ (2 * c_nK - 1).T * questions.step_Q.unsqueeze(1)


def _words(bits_nB: Tensor) -> np.ndarray:
    """Bytes as words of 64 bits."""
    return np.ascontiguousarray(bits_nB.numpy()).view(np.uint64)
