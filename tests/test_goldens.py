"""Our code against the outputs of the authors' own layer function, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_cases import CASES, RULES, load_case

pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_equal_to_the_authors_outputs(case, rule):
    from mergekit.merge_methods import merge_tensors

    w0, w1, expected = load_case(case, rule)
    parameters = {} if RULES[rule] is None else {"energy": RULES[rule]}
    merged = merge_tensors(
        [torch.from_numpy(w0), torch.from_numpy(w1)],
        "monosoup",
        base_index=0,
        parameters=parameters,
    )
    assert merged.dtype == torch.float64
    assert np.abs(merged.numpy() - expected).max() <= 1e-12 * np.abs(w1 - w0).max()
