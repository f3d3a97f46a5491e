"""Groups of consecutive channels in the registers of a thread: load, keep the N best, store.

    t     = the N-th largest key of a group
    keep  = key > t, and of the channels whose key is t the first as many as places are left

A thread holds whole groups: a *span* of max(M, 16 bytes) consecutive channels, loaded and stored
in pieces of 16 bytes. Channel j of all spans of a program is one tensor, so that the channels of a
group meet without any exchange between threads. t comes out of Batcher's odd-even merge sort of
either half of the group: of two descending lists a and b the N-th largest is

    max over i + j = N of min(a[i-1], b[j-1])            (a[-1] and b[-1] count as infinite)

16-bit values without a factor have keys of 15 bits. Their key carries the channel in its lower
half, so that no two are equal and ``keep = key >= t``. For 2:4 the pairs play a tournament, which
prefers the lower channel by itself. Other keys fill 32 bits and count their ties.
"""

# ruff: noqa: RET505, RUF005 - Triton compiles what follows a return, and cannot unpack in a tuple

from __future__ import annotations

import triton
import triton.language as tl

NAN_KEY = tl.constexpr(0x7F800001)  # what every NaN counts as, one more than infinity
NAN_KEY_BF16 = tl.constexpr(0x7F81)
NAN_KEY_FP16 = tl.constexpr(0x7C01)

# ---- keys ----------------------------------------------------------------------------------------


@triton.jit
def _key(x, factor, CHANNEL: tl.constexpr, UNIQUE: tl.constexpr):
    """Return integers that order like |x · factor|, every NaN being the largest."""
    if UNIQUE:
        nan: tl.constexpr = NAN_KEY_BF16 if x.dtype == tl.bfloat16 else NAN_KEY_FP16
        later: tl.constexpr = 0xFFFF - CHANNEL
        bits = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16) & 0x7FFF0000
        return tl.minimum(bits | later, (nan << 16) | later)
    else:
        score = x.to(tl.float32)
        if factor is not None:
            score = score * factor
        return tl.minimum(score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, NAN_KEY)


# ---- selection -----------------------------------------------------------------------------------
#
# Lists of tensors, one for each channel of a group.


@triton.jit
def _merged(a, b):
    """Merge two descending lists of equal length (Batcher's odd-even merge)."""
    LENGTH: tl.constexpr = len(a)
    if LENGTH == 1:
        return tl.maximum(a[0], b[0]), tl.minimum(a[0], b[0])
    else:
        even = _merged(a[0::2], b[0::2])
        odd = _merged(a[1::2], b[1::2])
        merged = (even[0],)
        for i in tl.static_range(LENGTH - 1):
            high, low = tl.maximum(odd[i], even[i + 1]), tl.minimum(odd[i], even[i + 1])
            merged = merged + (high, low)
        return merged + (odd[LENGTH - 1],)


@triton.jit
def _descending(keys):
    HALF: tl.constexpr = len(keys) // 2
    if HALF == 0:
        return keys
    else:
        return _merged(_descending(keys[:HALF]), _descending(keys[HALF:]))


@triton.jit
def _nth_largest(keys, N: tl.constexpr):
    HALF: tl.constexpr = len(keys) // 2
    a = _descending(keys[:HALF])
    b = _descending(keys[HALF:])
    REST: tl.constexpr = N - HALF
    nth = tl.maximum(a[N - 1], b[N - 1]) if N <= HALF else tl.minimum(a[REST - 1], b[HALF - 1])
    for i in tl.static_range(1, HALF + 1):
        if i < N and N - i <= HALF:
            nth = tl.maximum(nth, tl.minimum(a[i - 1], b[N - i - 1]))
    return nth


@triton.jit
def _best(keys, N: tl.constexpr, UNIQUE: tl.constexpr):
    """Mark the N largest keys; of equal ones the first."""
    M: tl.constexpr = len(keys)
    if N == 2 and M == 4:
        return _best_two_of_four(keys)
    else:
        nth = _nth_largest(keys, N)
        limit = nth
        places = tl.full(nth.shape, N, tl.int32)  # left for the keys that equal the N-th
        if not UNIQUE:
            for i in tl.static_range(M):
                places += (nth - keys[i]) >> 31
        best = ()
        for i in tl.static_range(M):
            best = best + (keys[i] >= limit,)
            if not UNIQUE:
                places = tl.where(keys[i] == nth, places - 1, places)
                limit = tl.where(places > 0, nth, nth + 1)
        return best


@triton.jit
def _best_two_of_four(keys):
    left_first = keys[0] >= keys[1]
    right_first = keys[2] >= keys[3]
    left_high, left_low = tl.maximum(keys[0], keys[1]), tl.minimum(keys[0], keys[1])
    right_high, right_low = tl.maximum(keys[2], keys[3]), tl.minimum(keys[2], keys[3])
    left = left_low >= right_high  # both places go to the left pair
    right = right_low > left_high
    one = (left | right) == 0
    return (
        left | (left_first & one),
        left | ((left_first == 0) & one),
        right | (right_first & one),
        right | ((right_first == 0) & one),
    )


@triton.jit
def _in_every_row(values, ROWS: tl.constexpr):
    """Return values [spans] for the spans of every row [rows * spans]."""
    SPANS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[None, :], (ROWS, SPANS)), (ROWS * SPANS,))


@triton.jit
def kept_channels(x, factor, copied, N: tl.constexpr, M: tl.constexpr):
    """Return the channels of spans with those dropped at +0; ``copied`` [spans] keep them all."""
    UNIQUE: tl.constexpr = factor is None and x[0].dtype != tl.float32
    kept = ()
    for group in tl.static_range(0, len(x), M):
        keys = ()
        for i in tl.static_range(group, group + M):
            one = None
            if factor is not None:
                one = _in_every_row(factor[i], x[i].shape[0] // factor[i].shape[0])
            keys = keys + (_key(x[i], one, i - group, UNIQUE),)
        best = _best(keys, N, UNIQUE)
        for i in tl.static_range(M):
            keep = best[i]
            if copied is not None:
                keep = keep | copied
            kept = kept + (tl.where(keep, x[group + i], 0.0),)
    return kept


# ---- memory --------------------------------------------------------------------------------------


@triton.jit
def _channels(pieces):
    """Return a list of [spans, channels] as the list of their channels [spans], in order."""
    SPANS: tl.constexpr = pieces[0].shape[0]
    WIDTH: tl.constexpr = pieces[0].shape[1]
    even = ()
    odd = ()
    for i in tl.static_range(len(pieces)):
        if WIDTH == 2:
            one, other = tl.split(pieces[i])
        else:
            one, other = tl.split(tl.reshape(pieces[i], (SPANS, WIDTH // 2, 2)))
        even = even + (one,)
        odd = odd + (other,)
    if WIDTH == 2:
        return even + odd
    else:
        return _channels(even + odd)


@triton.jit
def _piece(parts):
    """Return a list of channels [spans] as one tensor [spans, channels]."""
    HALF: tl.constexpr = len(parts) // 2
    if HALF == 0:
        return parts[0]
    else:
        pairs = ()
        for i in tl.static_range(HALF):
            pair = tl.join(parts[i], parts[i + HALF])
            if len(pair.shape) == 3:
                pair = tl.reshape(pair, (pair.shape[0], 2 * pair.shape[1]))
            pairs = pairs + (pair,)
        return _piece(pairs)


@triton.jit
def load_channels(
    row_ptr, column, channels, live,        # [spans, 1] or one; where spans begin; which exist
    SPAN: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Return the channels [spans] of spans."""
    loaded = ()
    for i in tl.static_range(0, SPAN, PIECE):
        at = column[:, None] + (i + tl.arange(0, PIECE))[None, :]
        loaded = loaded + _channels((tl.load(row_ptr + at, live & (at < channels), 0.0),))
    return loaded


@triton.jit
def store_channels(
    row_ptr, column, channels, live, values,  # as above, with the channels to store
    PIECE: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(0, len(values), PIECE):
        at = column[:, None] + (i + tl.arange(0, PIECE))[None, :]
        tl.store(row_ptr + at, _piece(values[i : i + PIECE]), live & (at < channels))
