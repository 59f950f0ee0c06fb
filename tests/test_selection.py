"""The choice of a similarity-filtered soup, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from baselines import sfgs, soup_of
from expectations import assert_tensor
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import PerGroupValues
from rounding import as_float64
from soups import recorded_decisions, relatives

from mergekit_monosoup.alignment.selection import considered_in_order, select_soup
from mergekit_monosoup.errors import ConfigurationError, MissingTensorError, NonFiniteError, ParameterError

pytestmark = pytest.mark.usefixtures("registered")

SHARES = {2: (0.9, 0.8), 3: (0.9, -0.8, 0.7), 5: (0.9, 0.1, 0.8, -0.5, 0.6)}


def base_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (20, 30), "b": (30, 20), "c": (8, 4, 3, 3), "d": (3, 10, 12), "bias": (30,), "s": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def soup(base, tuned, **parameters):
    """The merged tensors and the decision."""
    with recorded_decisions() as decisions:
        merged = merge_state_dicts([base, *tuned], "sfgs", base=0, parameters=parameters)
    (decision,) = decisions
    return merged, decision


def arrays(tensors):
    return {name: as_float64(tensor) for name, tensor in tensors.items()}


def check(base, tuned, threshold, scores=None, layers="matrices"):
    parameters = {"threshold": threshold, "layers": layers}
    if scores is not None:
        parameters["score"] = scores
    merged, decision = soup(base, tuned, **parameters)
    w0, ws = arrays(base), [arrays(tensors) for tensors in tuned]
    taken, averages = sfgs(w0, ws, threshold, scores=scores, layers=layers)
    assert decision.taken == {index + 1 for index in taken}
    found = {int(c.model.split()[1]) - 1: c.average for c in decision.candidates if c.average is not None}
    assert found == pytest.approx(averages, abs=1e-6)
    exact = soup_of(w0, [ws[index] for index in taken])
    for name, tensor in base.items():
        inputs = [tensor, *(tensors[name] for tensors in tuned)]
        assert_tensor(merged[name], exact[name], inputs, tensor.dtype, name)
    return taken


@pytest.mark.parametrize("count", SHARES)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("layers", ["matrices", "all"])
def test_equals_the_reference_in_float32(count, threshold, layers):
    base = base_tensors()
    taken = check(base, relatives(base, SHARES[count], size=1.0), threshold, layers=layers)
    assert (len(taken) == 1) == (threshold == 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_reference_in_other_dtypes(dtype):
    base = base_tensors(dtype)
    tuned = relatives(base, SHARES[5], size=0.3)
    if dtype == torch.float64:
        _, decision = soup(base, tuned, threshold=0.0)
        assert decision.taken == {i + 1 for i in sfgs(arrays(base), [arrays(t) for t in tuned], 0.0)[0]}
    else:
        check(base, tuned, 0.0)


def test_descending_score_decides_the_order():
    base = base_tensors()
    tuned = relatives(base, SHARES[5], size=1.0)
    scores = [0.1, 0.2, 0.3, 0.9, 0.4]
    taken = check(base, tuned, 0.0, scores=scores)
    assert taken[0] == 3
    assert taken != check(base, tuned, 0.0)


def test_equal_scores_keep_the_order_listed():
    assert considered_in_order(4, [1.0, 2.0, 2.0, 1.0]) == (1, 2, 0, 3)
    assert considered_in_order(3, None) == (0, 1, 2)


def test_a_zero_update_does_not_count():
    base = base_tensors()
    tuned = relatives(base, (0.9, 0.8, 0.7), size=1.0)
    tuned[1]["a"] = base["a"].clone()
    tuned[0]["b"] = base["b"].clone()
    check(base, tuned, 0.0)


def test_a_checkpoint_that_is_the_base_has_no_direction():
    base = base_tensors()
    tuned = [relatives(base, (0.9,))[0], {name: tensor.clone() for name, tensor in base.items()}]
    assert check(base, tuned, 0.0) == [0]
    assert check(base, tuned, -0.5) == [0, 1]


def test_opposite_updates_are_not_averaged():
    base = base_tensors(torch.float64)
    there = relatives(base, (1.0,), size=1.0)[0]
    back = {name: 2 * base[name] - tensor for name, tensor in there.items()}
    _, decision = soup(base, [there, back], threshold=-0.5)
    assert decision.taken == {1}
    assert decision.candidates[1].average == pytest.approx(-1)


def test_updates_that_cancel_in_the_soup_do_not_count():
    u = torch.tensor([1.0, 0.0], dtype=torch.float64)
    updates = torch.stack([u, -u, u])
    products = torch.stack([updates @ updates.T, torch.ones(3, 3, dtype=torch.float64)])
    selection = select_soup(products, -1.0, (0, 1, 2))
    assert selection.taken == (0, 1, 2)
    # Only the second tensor is left to judge the third candidate by.
    assert selection.averages[2] == pytest.approx(1)


def test_one_checkpoint_is_its_own_soup():
    base = base_tensors(torch.bfloat16)
    tuned = relatives(base, (0.9,))
    merged, decision = soup(base, tuned)
    assert decision.taken == {1}
    assert all(torch.equal(merged[name], tuned[0][name]) for name in base)


def test_identical_checkpoints_are_all_taken():
    base = base_tensors(torch.bfloat16)
    tuned = relatives(base, (0.9,)) * 4
    merged, decision = soup(base, tuned, threshold=0.99)
    assert len(decision.taken) == 4
    assert all(torch.equal(merged[name], tuned[0][name]) for name in base)


def test_single_groups_are_whole_models_of_their_own():
    base = base_tensors()
    tuned = relatives(base, SHARES[3], size=1.0)
    tensors = [base["a"], *(t["a"] for t in tuned)]
    merged = merge_tensors(tensors, "sfgs", base_index=0)
    taken, _ = sfgs({"a": as_float64(base["a"])}, [{"a": as_float64(t["a"])} for t in tuned], 0.0)
    exact = soup_of({"a": as_float64(base["a"])}, [{"a": as_float64(tuned[i]["a"])} for i in taken])
    assert_tensor(merged, exact["a"], tensors, torch.float32)


def test_refusals():
    base = base_tensors()
    tuned = relatives(base, SHARES[3])
    with pytest.raises(ParameterError, match=r"'threshold' is 2; it must be in \[-1, 1\]"):
        soup(base, tuned, threshold=2)
    with pytest.raises(ParameterError, match="'score' is missing for 2"):
        soup(base, tuned, score=[1.0, None, 3.0])
    with pytest.raises(ParameterError, match="whole model, so give one value"):
        soup(base, tuned, threshold=PerGroupValues([0.1, 0.1, 0.1, 0.1, 0.1, 0.2]))
    with pytest.raises(TypeError, match="Unknown parameter"):
        soup(base, tuned, merge=1)
    with pytest.raises(MissingTensorError, match="layers: all"):
        merge_tensors([base["bias"]] * 3, "sfgs", base_index=0)
    broken = {**tuned[0], "b": torch.full_like(base["b"], torch.nan)}
    with pytest.raises(NonFiniteError):
        soup(base, [tuned[1], broken])
    from mergekit.merge_methods import get
    from mergekit.merge_methods.base import TensorGroup

    groups = [
        TensorGroup.from_tensors([base["a"]] * count, ids=range(count), base_index=0) for count in (3, 2)
    ]
    with pytest.raises(ConfigurationError, match="same inputs"):
        get("sfgs")(groups)
