"""What operations do to the axes of their operands, one rule each.

    elementwise, cast, dropout in eval mode    axes of operands that meet are one
    view, transpose, expand, chunk, getitem    axes move, are split, merged or cut into parts
    linear, matmul, addmm, attention           contracted axes are one; the others stay
    mean, softmax, layer_norm, cat, stack      the dimension that is worked on is blocked

An operation with a rule does the same to every order of an axis that the rule does not block. A
rule returns the axes of the result, or None (or fails) where it does not know the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Node
from torch.utils._pytree import tree_leaves

from amber_compile.passes.channel_axes import (
    Dim,
    Dims,
    block,
    fresh,
    leaves,
    regroup,
    size_of,
    unify,
)
from amber_compile.passes.channel_call import Call
from amber_compile.passes.weight_operand import operation
from amber_compile.projection import value_of

ELEMENTWISE = {
    *("add", "sub", "mul", "truediv", "div", "neg", "pow", "abs", "exp", "square", "sqrt", "rsqrt"),
    *("reciprocal", "sigmoid", "tanh", "erf", "silu", "gelu", "relu", "relu6", "leaky_relu", "elu"),
    *("hardswish", "hardsigmoid", "softplus", "mish", "logsigmoid", "maximum", "minimum", "clamp"),
    *("where", "masked_fill", "rsub", "clone", "contiguous", "detach", "positive"),
}
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "logsumexp"}


def _elementwise(call: Call) -> Dims:
    return _broadcast(*call.operands)


def _cast(call: Call) -> Dims:
    return call.x


def _dropout(call: Call) -> Dims | None:
    training, chance = call.argument(2, "training", True), call.argument(1, "p", 0.5)
    return call.x if not training or chance == 0 else None


def _view(call: Call) -> Dims | None:
    return regroup(call.x, call.sizes)


def _transpose(call: Call) -> Dims:
    order = list(range(len(call.x)))
    first, second = call.argument(1, "dim0"), call.argument(2, "dim1")
    order[first], order[second] = order[second], order[first]
    return tuple(call.x[at] for at in order)


def _turned(call: Call) -> Dims:
    """``t``, ``T`` and ``mT``: of a matrix."""
    *rest, rows, columns = call.x
    if rest and operation(call.node) != "mT":
        raise ValueError
    return (*rest, columns, rows)


def _permute(call: Call) -> Dims:
    order: Any = tree_leaves(call.node.args[1:]) or call.node.kwargs["dims"]
    return tuple(call.x[at] for at in order)


def _expand(call: Call) -> Dims:
    sizes = call.sizes
    behind = [()] * (len(sizes) - len(call.x)) + list(call.x)
    return tuple(dim or fresh(size) for dim, size in zip(behind, sizes, strict=True))


def _repeat_interleave(call: Call) -> Dims:
    times, dim = int(call.argument(1, "repeats")), call.argument(2, "dim")
    found = list(call.x)
    found[dim] = (*found[dim], *fresh(times))
    return tuple(found)


def _getitem(call: Call) -> Any:
    source, index = call.argument(0, "source"), call.argument(1, "index")
    several = call.several(source)
    if several is not None:
        return several[index]
    held = call.of(source)
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(one, int | slice | type(None) | type(...)) for one in items):
        return None
    taken = sum(one is not None and one is not ... for one in items)
    at = items.index(...) if ... in items else len(items)
    items[at : at + 1] = [slice(None)] * (len(held) - taken)
    return _indexed(held, items)


def _indexed(held: Dims, items: Sequence[Any]) -> Dims:
    dims, found = list(held), list[Dim]()
    for item in items:
        if item is None:
            found.append(())
            continue
        dim = dims.pop(0)
        if isinstance(item, slice):
            found.append(_cut(dim, item))
        else:
            block(dim, "one of them is picked")
    return tuple(found)


def _cut(dim: Dim, item: slice) -> Dim:
    """Return a slice of a dimension: a part of its axis, if it has but one."""
    if any(not isinstance(one, int | None) for one in (item.start, item.stop, item.step)):
        raise TypeError
    size = size_of(dim)
    start, stop, step = item.indices(size)
    if (start, stop, step) == (0, size, 1):
        return dim
    axes = leaves(dim)
    if step == 1 and len(axes) == 1 and stop > start:
        return (axes[0].part(start, stop),) if stop - start > 1 else _picked(dim)
    block(dim, "some of them are picked")
    return fresh(len(range(start, stop, step)), "some of them are picked")


def _picked(dim: Dim) -> Dim:
    block(dim, "one of them is picked")
    return ()


def _chunk(call: Call) -> list[Dims]:
    """``chunk`` and ``split``: as many slices as there are outputs."""
    dim = call.argument(2, "dim", 0)
    found, start = [], 0
    for part in value_of(call.node):
        stop = start + int(part.shape[dim])
        dims = list(call.x)
        dims[dim] = _cut(dims[dim], slice(start, stop))
        found.append(tuple(dims))
        start = stop
    return found


def _linear(call: Call) -> Dims:
    weight = call.dims(1, "weight")
    unify(call.x[-1], weight[1])
    bias = call.argument(2, "bias")
    if bias is not None:
        unify(call.dims(2, "bias")[0], weight[0])
    return (*call.x[:-1], weight[0])


def _matmul(call: Call) -> Dims | None:
    x, y = call.x, call.dims(1, "other" if "other" in call.node.kwargs else "mat2")
    return _product(x, y)


def _addmm(call: Call) -> Dims | None:
    product = _product(call.dims(1, "mat1"), call.dims(2, "mat2"))
    return product and _broadcast(call.x, product)


def _product(x: Dims, y: Dims) -> Dims | None:
    """Return the axes of a product of matrices, or stacks of them."""
    if len(x) < 2 or len(y) < 2:
        return None
    unify(x[-1], y[-2])
    return (*_broadcast(x[:-2], y[:-2]), x[-2], y[-1])


def _attention(call: Call) -> Dims | None:
    q, k, v = (call.dims(at, name) for at, name in enumerate(("query", "key", "value")))
    if call.argument(4, "dropout_p", 0.0) or min(map(len, (q, k, v))) < 3:
        return None
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    for positions in (q[-2], k[-2]):
        block(positions, "they are positions in a sequence")
    heads = _broadcast(k[:-2], v[:-2])
    if call.argument(7, "enable_gqa", False):
        queries = fresh(size_of(q[-3]) // size_of(heads[-1]))
        heads = (*heads[:-1], (*heads[-1], *queries))
    heads = _broadcast(q[:-2], heads)
    if isinstance(call.argument(3, "attn_mask"), Node):
        mask = call.dims(3, "attn_mask")
        block([axis for dim in mask[-2:] for axis in dim], "they are positions in a sequence")
        heads = _broadcast(heads, mask[:-2])
    return (*heads, q[-2], v[-1])


def _softmax(call: Call) -> Dims:
    block(call.x[call.argument(1, "dim")], "softmax mixes them")
    return call.x


def _reduction(call: Call) -> Dims | None:
    dim = call.argument(1, "dim")
    if dim is None or call.argument(2, "keepdim", False) not in (True, False):
        return None
    reduced = {at % len(call.x) for at in ([dim] if isinstance(dim, int) else dim)}
    for at in reduced:
        block(call.x[at], f"{operation(call.node)} mixes them")
    if len(call.sizes) == len(call.x):
        return tuple(() if at in reduced else own for at, own in enumerate(call.x))
    return tuple(own for at, own in enumerate(call.x) if at not in reduced)


def _norm(call: Call) -> Dims:
    count = len(call.argument(1, "normalized_shape"))
    for dims in (call.x[-count:], *call.operands[1:]):
        block([axis for dim in dims for axis in dim], f"{operation(call.node)} mixes them")
    return call.x


def _cat(call: Call) -> Dims:
    dim = call.argument(1, "dim", 0)
    first, *others = (call.of(one) for one in call.argument(0, "tensors"))
    for other in others:
        for at, (one, same) in enumerate(zip(first, other, strict=True)):
            if at != dim % len(first):
                unify(one, same)
    for dims in (first, *others):
        block(dims[dim], "cat puts others beside them")
    found = list(first)
    found[dim] = fresh(call.sizes[dim], "cat puts others beside them")
    return tuple(found)


def _stack(call: Call) -> Dims:
    dim, tensors = call.argument(1, "dim", 0), call.argument(0, "tensors")
    found = list(_broadcast(*(call.of(one) for one in tensors)))
    found.insert(dim % (len(found) + 1), fresh(len(tensors), "stack puts them side by side"))
    return tuple(found)


def _broadcast(*operands: Dims) -> Dims:
    """Make the axes of operands that meet elementwise one, and return those of the result."""
    rank = max((len(dims) for dims in operands), default=0)
    found: list[Dim] = [()] * rank
    for dims in operands:
        for at, dim in enumerate(dims, rank - len(dims)):
            if found[at] and dim:
                unify(found[at], dim)
            found[at] = found[at] or dim
    return tuple(found)


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    **dict.fromkeys(("t", "T", "mT"), _turned),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("chunk", "split"), _chunk),
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), _matmul),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    "permute": _permute,
    "repeat_interleave": _repeat_interleave,
    "getitem": _getitem,
    "dropout": _dropout,
    "linear": _linear,
    "addmm": _addmm,
    "scaled_dot_product_attention": _attention,
    "cat": _cat,
    "stack": _stack,
}
