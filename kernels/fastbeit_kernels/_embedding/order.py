"""The tokens of all images as one list: those of visible patches first, then all others.

A token is named image * (N + 1) + token. Visible ones come in the order of images and of the
raster, so that any tile of consecutive rows of the list is full but the last: the products take
ceil(visible / rows) tiles, however many patches of an image are masked. How many are visible is
known on the device alone; nobody waits for it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mark_hidden(positions_ptr, flags_ptr, count_ptr, slots, patches, BLOCK: tl.constexpr):
    """positions ``[B, M]`` → hidden 0 or 1 ``[B, N]``, count of visible ones ``[B]``.

    Positions outside 0 to N - 1 hide nothing. Repeats write the same number.
    """
    image = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    hidden = flags_ptr + image * patches
    for start in range(0, patches, BLOCK):
        tl.store(hidden + start + lanes, tl.zeros([BLOCK], tl.int32), mask=start + lanes < patches)
    tl.debug_barrier()
    for start in range(0, slots, BLOCK):
        slot = start + lanes
        position = tl.load(positions_ptr + image * slots + slot, mask=slot < slots, other=-1)
        tl.store(hidden + position, 1, mask=(position >= 0) & (position < patches))
    tl.debug_barrier()
    seen = tl.zeros([BLOCK], tl.int32)
    for start in range(0, patches, BLOCK):
        seen += 1 - tl.load(hidden + start + lanes, mask=start + lanes < patches, other=1)
    tl.store(count_ptr + image, tl.sum(seen))


@triton.jit
def order_tokens(flags_ptr, count_ptr, order_ptr, visible_ptr, batch, patches, BLOCK: tl.constexpr):
    """hidden ``[B, N]``, count ``[B]`` → order ``[B * (N + 1)]``, visible ``[1]``, their sum."""
    image = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    before_l = tl.zeros([BLOCK], tl.int32)
    all_l = tl.zeros([BLOCK], tl.int32)
    for start in range(0, batch, BLOCK):
        count = tl.load(count_ptr + start + lanes, mask=start + lanes < batch, other=0)
        all_l += count
        before_l += tl.where(start + lanes < image, count, 0)
    visible = tl.sum(all_l)
    next_visible = tl.sum(before_l)
    first = image * (patches + 1)
    # What precedes among the others: all tokens of earlier images that are not visible.
    next_hidden = visible + first - next_visible
    tl.store(order_ptr + next_hidden, first)
    next_hidden += 1
    for start in range(0, patches, BLOCK):
        patch = start + lanes
        inside = patch < patches
        places = image.to(tl.int64) * patches + patch
        hides = tl.load(flags_ptr + places, mask=inside, other=0)
        sees = tl.where(inside, 1 - hides, 0)
        token = first + 1 + patch
        # cumsum counts the lane itself too.
        tl.store(order_ptr + next_visible + tl.cumsum(sees, 0) - 1, token, mask=sees > 0)
        tl.store(order_ptr + next_hidden + tl.cumsum(hides, 0) - 1, token, mask=hides > 0)
        next_visible += tl.sum(sees)
        next_hidden += tl.sum(hides)
    if image == 0:
        tl.store(visible_ptr, visible)


@triton.jit
def count_visible(visible_ptr, batch, patches, MASKED: tl.constexpr):
    """How many rows of the list are visible patches."""
    if MASKED:
        return tl.load(visible_ptr)
    return batch * patches


@triton.jit
def listed_tokens(rows, order_ptr, batch, patches, MASKED: tl.constexpr):
    """Names of the tokens in rows of the list; past its end, that of its last row.

    Without masks there is no list: row r is patch r % N of image r // N, and CLS come last.
    """
    rows = tl.minimum(rows, batch * (patches + 1) - 1)
    if MASKED:
        return tl.load(order_ptr + rows)
    # Each patch comes behind as many CLS as its image has images before it, and its own.
    patch = rows + rows // patches + 1
    return tl.where(rows < batch * patches, patch, (rows - batch * patches) * (patches + 1))
