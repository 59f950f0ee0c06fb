"""Threads that share out an edit: order, errors, settings that come back, and BLAS without a lock."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import spectra
import torch

from mergekit_monosoup.spectral import edit_update, edit_weight
from mergekit_monosoup.spectral.compiled import add_square, gemm
from mergekit_monosoup.spectral.crew import at_work, crew
from mergekit_monosoup.spectral.products import GramSum

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(threads):
    with at_work(CPU, 1 << 20):
        assert crew().size == threads
        assert crew().map(lambda i: i * i, range(40)) == [i * i for i in range(40)]
        assert crew().sum(lambda i: i, range(1, 11)) == 55
        assert crew().map(lambda i: i, []) == []
    assert crew().size == 1


def test_all_threads_work_at_a_time(threads):
    barrier = threading.Barrier(threads)
    with at_work(CPU, 1 << 20):
        crew().map(lambda _: barrier.wait(timeout=20), range(threads))


def test_an_error_reaches_the_caller_and_settings_come_back(threads):
    def fail(i):
        if i == 7:
            raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"), at_work(CPU, 1 << 20):
        crew().map(fail, range(20))
    assert torch.get_num_threads() == threads
    assert crew().size == 1
    limited = [pool for pool in _pools() if pool["num_threads"] == 1]
    assert limited == [pool for pool in _POOLS if pool["num_threads"] == 1]


def _pools():
    from threadpoolctl import threadpool_info

    return [pool for pool in threadpool_info() if pool["user_api"] == "blas"]


_POOLS = _pools()


def test_modes_of_torch_are_those_of_the_caller(threads):
    with torch.inference_mode(), at_work(CPU, 1 << 20):
        modes = crew().map(lambda _: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()), range(9))
    assert all(inference and not grad for inference, grad in modes)


def test_parameters_and_inference_mode(threads):
    w0 = torch.nn.Parameter(torch.randn(600, 300))
    w1 = torch.nn.Parameter(w0.detach() + 0.01 * torch.randn(600, 300))
    outside, _ = edit_weight(w0, [w1])
    with torch.inference_mode():
        inside, _ = edit_weight(w0.detach().clone(), [w1.detach().clone()])
    assert not outside.requires_grad
    assert torch.equal(outside, inside)


@pytest.mark.parametrize("kind", ["gauss", "1/i", "low rank"])
@pytest.mark.parametrize("shape", [(1700, 300), (300, 1700), (600, 600)], ids=str)
def test_the_edit_is_right_for_any_number_of_threads(kind, shape, threads):
    dw = spectra.update(kind, *shape)
    edited, record = edit_update(dw)
    expected, values = spectra.exact(dw)
    assert record.k == values["k"]
    assert spectra.error(edited, expected, dw) <= 5e-5


def test_two_edits_at_a_time_leave_the_settings_as_they_were():
    before = torch.get_num_threads(), [pool["num_threads"] for pool in _pools()]
    dw = spectra.update("gauss", 900, 300)
    expected = edit_update(dw)[0]
    results = [None] * 4

    def edit(i):
        results[i] = edit_update(dw)[0]

    workers = [threading.Thread(target=edit, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.allclose(result, expected, atol=1e-6) for result in results)
    assert before == (torch.get_num_threads(), [pool["num_threads"] for pool in _pools()])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (5, 1, 3), (5, 3, 1), (40, 30, 20)])
@pytest.mark.parametrize("orders", ["CCC", "CFC", "FCF", "FFF", "FFC", "CCF"])
def test_products_of_any_layout(dtype, shape, orders):
    rows, columns, inner = shape
    rng = np.random.default_rng(0)
    sides = ((rows, inner), (inner, columns), (rows, columns))
    # Parts of larger arrays: the distance of the columns is not their length.
    a, b, c = (
        np.asarray(rng.standard_normal((m + 3, n + 2)), dtype, order=order)[1 : m + 1, 2:]
        for (m, n), order in zip(sides, orders, strict=True)
    )
    expected = 0.5 * a.astype(float) @ b + 2.0 * c
    gemm(0.5, a, b, 2.0, c)
    assert np.allclose(c, expected, atol=1e-5)


@pytest.mark.parametrize("order", ["C", "F"])
def test_half_of_a_square(order):
    a = np.asarray(np.random.default_rng(0).standard_normal((30, 50)), np.float32, order=order)
    c = np.zeros((30, 30), np.float32, order="F")
    add_square(a, c)
    add_square(a, c)
    assert np.allclose(np.tril(c), np.tril(2 * a @ a.T), atol=1e-4)
    assert not np.triu(c, 1).any()


def test_arrays_without_contiguous_lines_are_refused():
    a = np.zeros((8, 8), np.float32)[::2, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        gemm(1.0, a, a, 0.0, np.zeros((4, 4), np.float32))


def test_the_sums_of_a_gram_matrix_are_short(threads):
    """What `certify` allows for rounding does not depend on how the library of a processor sums."""
    block = 100 + torch.randn(1500, 300, generator=torch.Generator().manual_seed(0))
    gram = GramSum(300, torch.float32, CPU)
    with at_work(CPU, 1 << 20):
        gram.add([block[:700], block[700:]])
    exact = (block.double().T @ block.double()).numpy()
    error = np.tril(gram.take().numpy().T - exact)[np.tril_indices(300)]
    assert error.std() <= np.finfo(np.float32).eps * exact.diagonal().max()
