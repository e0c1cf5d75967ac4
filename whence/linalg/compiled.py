"""Rows of an index against questions in one go, as machine code, at the speed of memory.

numba compiles it (`pip install 'whence[scan]'`) for the processor at hand: with AVX2, 16 products or the bits of four words at
a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import intrinsic


@intrinsic  # numba gives the context
def bit_count(context, word):
    """Bits of a word that are set."""
    return word(word), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


counted: Any = bit_count  # of a word alone: numba gives the context


@njit(nogil=True)
def product(code_J, whole_J):
    """Inner product, in 32 bits all the way: numba's own sums are of 64, and a quarter as fast."""
    total = np.int32(0)
    for j in range(len(code_J)):
        total = np.int32(total + np.int32(code_J[j]) * np.int32(whole_J[j]))
    return total


@njit(nogil=True)
def sum_where_set(word_K, planes_PK):
    """What the numbers that these planes stand for add up to where a bit is set."""
    total = np.int64(0)
    for k in range(len(word_K)):
        word = word_K[k]
        b0, b1 = counted(word & planes_PK[0, k]), counted(word & planes_PK[1, k])
        b2, b3 = counted(word & planes_PK[2, k]), counted(word & planes_PK[3, k])
        total += b0 + (b1 << np.uint64(1)) + (b2 << np.uint64(2)) - (b3 << np.uint64(3))
    return total


def scan_rows(codes_nJ, scale_n, words_nK, size_n, whole_QJ, unit_Q, planes_QPK, total_Q, step_Q, places_n, along_QN, rest_QN):
    """Write what `int8_products` and `sign_products` give, times each row's `scale` and `size`, to the rows' places."""
    for row in range(len(codes_nJ)):
        place, code_J, word_K = places_n[row], codes_nJ[row], words_nK[row]
        for q in range(len(unit_Q)):
            along_QN[q, place] = np.float32(product(code_J, whole_QJ[q])) * unit_Q[q] * scale_n[row]
            twice = 2 * sum_where_set(word_K, planes_QPK[q]) - total_Q[q]
            rest_QN[q, place] = np.float32(twice) * step_Q[q] * size_n[row]


try:
    scan_rows = njit(nogil=True, cache=True)(scan_rows)
except RuntimeError:  # numba finds no folder that it may write machine code to
    scan_rows = njit(nogil=True)(scan_rows)
