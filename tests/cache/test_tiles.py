"""One attention over rows of different lengths gives what an attention for each row does."""

import pytest
import torch
from torch.testing import assert_close

from sparsight.attention import decode
from sparsight.cache.pool_rows import CAPACITY_STEP, rounded_up, tiles_of
from sparsight.compression.eviction import VACANT

SIZE, VALUE_SIZE, HEADS = 8, 6, 2
USED = [[1, 16, 17, 40], [33, 2, 48, 5]]


def storage(used):
    """First slots ``[L, N]``, keys, values and positions of rows with a gap in front of each, and slots left over."""
    capacities = rounded_up(used) + CAPACITY_STEP
    starts = capacities.flatten().cumsum(0).view_as(used) - rounded_up(used)
    slots = int(capacities.sum()) + 3
    positions = torch.full((slots,), VACANT, dtype=torch.int32)
    for start, count in zip(starts.flatten().tolist(), used.flatten().tolist(), strict=True):
        positions[start : start + count] = torch.arange(count, dtype=torch.int32)
    return starts, torch.randn(slots, SIZE), torch.randn(slots, VALUE_SIZE), positions


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("scaling", [None, 20.0])
@pytest.mark.parametrize("vacated", [(), (3, 20)])
def test_rows_of_any_length_get_what_each_gets_alone(group, scaling, vacated):
    torch.manual_seed(0)
    used = torch.tensor(USED)
    starts, keys, values, positions = storage(used)
    for slot in vacated:
        # In the longest row of the first layer.
        positions[starts[0, 3] + slot] = VACANT
    query = torch.randn(used.shape[1] // HEADS, HEADS * group, 1, SIZE)
    for layer, tiles in enumerate(tiles_of(starts, used, positions)):
        output = decode.attend_tiles(query, keys, values, HEADS, tiles, scaling)
        for row, (start, count) in enumerate(zip(starts[layer].tolist(), used[layer].tolist(), strict=True)):
            held = [slot for slot in range(start, start + count) if positions[slot] != VACANT]
            sequence, head = divmod(row, HEADS)
            heads = slice(head * group, (head + 1) * group)
            alone = query[sequence, None, heads], keys[None, None, held], values[None, None, held]
            assert_close(output[sequence, None, heads], decode.attend(*alone, None, None, scaling))
