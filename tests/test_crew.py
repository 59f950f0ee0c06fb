"""Threads that share out an edit: order, errors, settings that come back, and BLAS without a lock."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import spectra
import torch
from environments import dependency_folders
from stand_ins import script
from threadpoolctl import threadpool_info

from mergekit_monosoup.spectral import edit_update, edit_weight
from mergekit_monosoup.spectral.crew import at_work, crew, torch_threads
from mergekit_monosoup.spectral.kernels.compiled import gemm, syrk
from mergekit_monosoup.spectral.precision import full_float32
from mergekit_monosoup.spectral.products import GramSum

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    with torch_threads(request.param):
        yield request.param


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

    def pools():
        return [pool for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = pools()
    with pytest.raises(ValueError, match="seven"), at_work(CPU, 1 << 20):
        crew().map(fail, range(20))
    assert torch.get_num_threads() == threads
    assert crew().size == 1
    assert pools() == before


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


def test_after_an_error_nothing_further_is_begun(threads):
    begun, ended = [], []

    def fail(i):
        begun.append(i)
        if i == 0:
            raise KeyboardInterrupt
        time.sleep(0.01)
        ended.append(i)

    with pytest.raises(KeyboardInterrupt), at_work(CPU, 1 << 20):
        crew().map(fail, range(1000))
    assert len(begun) < 100
    assert sorted(ended) == sorted(i for i in begun if i != 0)


def test_what_is_mapped_within_a_map_is_done_by_its_own_thread(threads):
    def inner(i):
        name = threading.current_thread().name
        assert crew().size == 1
        assert crew().map(lambda _: threading.current_thread().name, range(3)) == [name] * 3
        return i

    with at_work(CPU, 1 << 20):
        assert crew().map(inner, range(20)) == list(range(20))


def test_small_tensors_are_no_work_for_many(threads):
    with at_work(CPU, 1000):
        assert crew().size == 1
        assert torch.get_num_threads() == 1
    with at_work(CPU, 3 << 16):
        assert crew().size == min(3, threads)
    assert torch.get_num_threads() == threads


# In a process of its own, whose BLAS has two threads whatever the tests run with.
MANY_THREADS = """
    import threading, torch
    from threadpoolctl import threadpool_info
    from mergekit_monosoup.spectral import edit_update

    def limits():
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        return torch.get_num_threads(), [pool["num_threads"] for pool in pools]

    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    dw = torch.randn(900, 300, generator=generator)
    before, expected = limits(), edit_update(dw)[0]
    assert 2 in before[1], before
    wrong = []

    def edit():
        torch.get_num_threads()  # a thread begins with what any other has set last
        torch.set_num_threads(2)
        for _ in range(3):
            if not torch.allclose(edit_update(dw)[0], expected, atol=2e-5):
                wrong.append("result")
            if torch.get_num_threads() != 2:
                wrong.append("torch")

    for _ in range(3):
        workers = [threading.Thread(target=edit) for _ in range(4)]
        for worker in workers:
            worker.start()
        edit()
        for worker in workers:
            worker.join()
        assert limits() == before, (limits(), before)

    # The first thread that limited BLAS is gone, and another one can.
    from mergekit_monosoup.spectral.crew import at_work, crew
    seen = []

    def look():
        torch.get_num_threads()
        torch.set_num_threads(2)
        with at_work(dw.device, 1 << 20):
            crew().map(lambda _: seen.append(limits()[1]), range(4))

    other = threading.Thread(target=look)
    other.start()
    other.join()
    print(*wrong, *{n for found in seen for n in found})
"""


def test_edits_in_several_threads_leave_the_settings_as_they_were(environment):
    environment.see(*dependency_folders())
    threads = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    assert environment.output(*script(MANY_THREADS), **threads) == "1"


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
    syrk(a, c)
    syrk(a, c)
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


@pytest.mark.parametrize(
    ("lengths", "sections"),
    [
        ([100], [100]),
        ([5000, 5000, 100], [5000, 5100]),
        ([9000, 100], [9000, 100]),
        ([1000] * 40, [8000] * 5),
    ],
)
def test_sections_are_short_for_any_number_of_threads(lengths, sections, threads):
    """Blocks that are added at a time belong to as many sections of 8192 rows as it takes."""
    blocks = [torch.ones(length, 4) for length in lengths]
    gram = GramSum(4, torch.float32, CPU)
    with at_work(CPU, 1 << 20):
        gram.add(blocks)
    total = float(sum(lengths))
    assert gram.sections == pytest.approx(total**2 / sum(length**2 for length in sections))
    assert torch.equal(torch.triu(gram.take()), torch.triu(torch.full((4, 4), total).double()))


def test_precision_of_an_accelerator_comes_back_with_the_last_user():
    """The setting is torch's own, and is there without an accelerator."""
    device, before = torch.device("cuda"), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_float32(device):
            with full_float32(device):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        with full_float32(CPU):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
