"""bias[h, i, j] = table[index[i, j], h], and dtable[r, h] = Σ dbias[h, i, j] over index[i, j] = r.

The gradient is gathered, not scattered: a program owns one table row and adds up the places where
it was used, in a fixed order, without atomics. Where these places are comes from the index sorted
by table row (any index), or, for the index of a grid, from arithmetic: the offset (dy, dx), query
minus key, has table row (dy + h - 1)(2w - 1) + dx + w - 1 and was used by (h - |dy|)(w - |dx|)
pairs; behind these rows come CLS→token, token→CLS and CLS→CLS.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand_table(
    table_ptr,
    index_ptr,
    bias_ptr,
    table_row,
    table_head,
    index_row,
    index_column,
    tokens,
    bias_row,
    heads,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row of queries, COLUMNS keys, all heads (padded to HEADS)."""
    blocks = tl.cdiv(tokens, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.arange(0, HEADS)
    inside = columns < tokens
    used = tl.load(index_ptr + row * index_row + columns * index_column, mask=inside, other=0)
    mask = inside[None, :] & (head < heads)[:, None]
    pointers = table_ptr + used.to(tl.int64)[None, :] * table_row + head[:, None] * table_head
    values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    target = bias_ptr + head[:, None].to(tl.int64) * tokens * bias_row + row * bias_row
    tl.store(target + columns[None, :], values, mask=mask)


@triton.jit
def grid_count(row, tokens, rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """In how many places a grid's index holds table row ``row``."""
    dy = row // (2 * WIDTH - 1) - (HEIGHT - 1)
    dx = row % (2 * WIDTH - 1) - (WIDTH - 1)
    pairs = (HEIGHT - tl.abs(dy)) * (WIDTH - tl.abs(dx))
    return tl.where(row == rows - 1, 1, tl.where(row >= rows - 3, tokens - 1, pairs))


@triton.jit
def grid_places(row, numbers, rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(query, key) of the places ``numbers`` where a grid's index holds table row ``row``."""
    dy = row // (2 * WIDTH - 1) - (HEIGHT - 1)
    dx = row % (2 * WIDTH - 1) - (WIDTH - 1)
    across = WIDTH - tl.abs(dx)
    key_y = numbers // across + tl.maximum(-dy, 0)
    key_x = numbers % across + tl.maximum(-dx, 0)
    key = 1 + key_y * WIDTH + key_x
    query = key + dy * WIDTH + dx
    # CLS→token, token→CLS, CLS→CLS.
    behind = row - (rows - 3)
    query = tl.where(behind < 0, query, tl.where(behind == 1, numbers + 1, 0))
    key = tl.where(behind < 0, key, tl.where(behind == 0, numbers + 1, 0))
    return query, key


@triton.jit
def reduce_to_table(
    dbias_ptr,
    order_ptr,
    starts_ptr,
    dtable_ptr,
    dbias_head,
    dbias_row,
    dbias_column,
    tokens,
    rows,
    heads,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One table row: its places, BLOCK at a time, then the sum over the block.

    ``order`` are the places i * tokens + j sorted by table row, ``starts`` where each row's begin.
    With HEIGHT > 0 neither is read: the index is that of a HEIGHT x WIDTH grid.
    """
    row = tl.program_id(0)
    head = tl.arange(0, HEADS)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([HEADS, BLOCK], tl.float32)
    begin = 0
    if HEIGHT > 0:
        count = grid_count(row, tokens, rows, HEIGHT, WIDTH)
    else:
        begin = tl.load(starts_ptr + row)
        count = tl.load(starts_ptr + row + 1) - begin
    for start in range(0, count, BLOCK):
        numbers = start + lanes
        exists = numbers < count
        if HEIGHT > 0:
            query, key = grid_places(row, numbers, rows, HEIGHT, WIDTH)
        else:
            place = tl.load(order_ptr + begin + numbers, mask=exists, other=0)
            query = place // tokens
            key = place % tokens
        offsets = query.to(tl.int64) * dbias_row + key * dbias_column
        pointers = dbias_ptr + head[:, None].to(tl.int64) * dbias_head + offsets[None, :]
        mask = (head < heads)[:, None] & exists[None, :]
        sums += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(sums, 1).to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + row * heads + head, total, mask=head < heads)
