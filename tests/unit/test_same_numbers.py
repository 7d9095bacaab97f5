"""The comparison that a change of structure is held to."""

import math

from tests.same_numbers import differences


def test_one_bit_is_a_difference_and_nan_is_not():
    before = [{"step": 0, "loss/policy": 0.1, "grad/norm": math.nan}]
    assert differences(before, [dict(before[0])]) == []
    after = [{**before[0], "loss/policy": math.nextafter(0.1, 1)}]
    assert differences(before, after) == [
        "step 0: loss/policy 0.1 -> 0.10000000000000002",
    ]
    assert differences(before, [{**before[0], "new": 1}]) == ["step 0: new None -> 1"]
    assert differences(before, []) == ["1 steps before, 0 after"]
