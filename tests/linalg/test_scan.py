"""Scans of codes and signs: each way against dense products, and the ways against one another."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from whence.linalg import scan as scanning
from whence.linalg.scan import Questions, int8_products, scan, sign_bits, sign_products, unpacked_products


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rows_of(count, codes=61, signs=1024):
    return {
        "codes": torch.randint(-127, 128, (count, codes), dtype=torch.int8),
        "scale": torch.rand(count, 1),
        "signs": sign_bits(torch.randn(count, signs)),
        "size": torch.rand(count),
    }


def scanned(rows, questions, kernel=None):
    """Of rows at places in random order, with a place to spare."""
    count, queries = len(rows["size"]), len(questions.unit_Q)
    along, rest = np.full((2, queries, count + 1), np.nan, np.float32)
    places = np.random.default_rng(0).permutation(count)
    scan(rows, questions, places, along, rest, kernel)
    assert np.isnan(along[:, count]).all() and np.isnan(rest[:, count]).all()
    return along[:, places], rest[:, places]


@pytest.mark.parametrize("codes", [1, 61, 1024])
def test_products_with_codes_keep_15_bits_of_a_question(codes):
    codes_nJ, along = torch.randint(-127, 128, (2500, codes), dtype=torch.int8), torch.randn(3, codes)
    expected = along @ codes_nJ.float().T
    found = int8_products(codes_nJ, Questions.of(along, torch.ones(3, 64)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_the_largest_numbers_do_not_overflow():
    codes_nJ, along = torch.full((3, 1024), 127, dtype=torch.int8), torch.full((1, 1024), 1e30)
    questions = Questions.of(along, torch.zeros(1, 64))
    assert 127 * questions.whole_QJ.sum(dtype=torch.int64) < 2**31
    np.testing.assert_allclose(int8_products(codes_nJ, questions), 127 * 1024 * 1e30, rtol=1e-4)
    assert (sign_products(sign_bits(torch.randn(3, 64)), questions) == 0).all()


def test_products_with_signs_are_those_of_a_question_in_15_steps():
    signs, rest = torch.randn(2500, 1024), torch.randn(2, 1024)
    step = rest.abs().amax(1, keepdim=True) / 7
    expected = (rest / step).round() * step @ (2 * (signs > 0).float() - 1).T
    questions = Questions.of(torch.ones(2, 1), rest)
    for products in (sign_products, unpacked_products):
        torch.testing.assert_close(products(sign_bits(signs), questions), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_change_nothing(monkeypatch, threads):
    rows, questions = rows_of(2500), Questions.of(torch.randn(2, 61), torch.randn(2, 1024))
    before = torch.get_num_threads()
    whole = scanned(rows, questions)
    expected = int8_products(rows["codes"], questions) * rows["scale"].T, sign_products(rows["signs"], questions) * rows["size"]
    monkeypatch.setattr(scanning, "BLOCK_ROWS", 300)
    torch.set_num_threads(threads)
    try:
        for found, once, wanted in zip(scanned(rows, questions), whole, expected, strict=True):
            np.testing.assert_allclose(found, once, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("codes", "signs"), [(1, 64), (61, 192), (512, 4032), (1024, 8192)])
def test_compiled_scans_give_the_same(tmp_path, codes, signs):
    pytest.importorskip("numba")
    from whence.linalg.compiled import scan_rows

    rows, questions = rows_of(301, codes, signs), Questions.of(torch.randn(3, codes), torch.randn(3, signs))
    rows["codes"][:] = torch.where(torch.rand(codes) < 0.5, 127, rows["codes"])
    save_file(rows, tmp_path / "rows")  # codes of odd size put the signs where words don't begin
    for each in (rows, load_file(tmp_path / "rows")):
        for found, wanted in zip(scanned(each, questions, scan_rows), scanned(rows, questions), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.gpu
def test_a_gpu_gives_the_same():
    rows, questions = rows_of(70_000), Questions.of(torch.randn(2, 61), torch.randn(2, 1024))
    on_gpu = {key: tensor.cuda() for key, tensor in rows.items()}
    for each in (rows, on_gpu):  # where they lie does not matter
        for found, wanted in zip(scanned(each, questions.to(torch.device("cuda"))), scanned(rows, questions), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
