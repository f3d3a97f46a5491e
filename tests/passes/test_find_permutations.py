"""Which channels may be permuted, what moves with them, and what keeps them in order.

Every claim is checked by doing it: a permuted module computes the same in fp64, but for the order
of one sum.
"""

import random

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, linear, scaled_dot_product_attention, silu, softmax
from torch.utils.checkpoint import checkpoint

from amber_compile import Plan, Settings
from amber_compile.passes.find_permutations import Permutable, find_permutations
from amber_compile.passes.find_projections import find_projections
from amber_compile.permute import join_orders, permutation_tensors, permute_channels
from amber_compile.plan import Move, PlannedSite

B, S, H, K = 2, 6, 8, 16
X = torch.randn(B, S, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Parameters by name, and a function of the input and them."""

    def __init__(self, function, **shapes):
        super().__init__()
        torch.manual_seed(1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape).double()))
        self.function = function

    def forward(self, x):
        return self.function(x, self)


MLP = {"gate": (K, H), "up": (K, H), "down": (H, K)}


@pytest.fixture
def find(capture):
    """Return ``find(module)``: what may be permuted, by site, and why not the rest."""

    def found(module, x=X, **options):
        gm, _ = capture(module, x, **options)
        permutable, reasons = find_permutations(gm, find_projections(gm))
        return {one.site: one for one in permutable}, reasons

    return found


def permute(module: nn.Module, found: dict[str, Permutable], seed: int = 0) -> Plan:
    """Permute every site that was found, at random; return the plan that says how."""
    draw = torch.Generator().manual_seed(seed)
    sites, tensors = {}, {}
    for site, one in found.items():
        own = one.moves[0]
        weight = module.get_parameter(own.parameter)
        weight = weight if own.dim == 1 else weight.t()
        orders = [torch.randperm(one.size, generator=draw) for _ in range(one.groups)]
        tensors[site] = permutation_tensors(weight, join_orders(torch.stack(orders), own.repeats))
        sites[site] = PlannedSite(tuple(weight.shape), Settings(), None, one.moves)
    plan = Plan(sites, {}, tensors)
    assert permute_channels(module, plan).changed == tuple(found)
    return plan


@torch.no_grad()
def assert_exact(module: nn.Module, found: dict[str, Permutable], x=X) -> None:
    """Assert that permuting changes the outputs by no more than sums in another order do.

    The budget: twice what fp32 changes, whose steps are 2^29 times as coarse, and a rounding of the
    largest output for each of its K terms.
    """
    before = module(x)
    coarse = module.float()(x.float())
    permute(module.double(), found)
    after = module(x)
    for one, two, rough in zip(*map(outputs, (before, after, coarse)), strict=True):
        budget = 2 * (rough.double() - one).abs().max() * 2.0**-29
        assert (one - two).abs().max() <= budget + K * 2.0**-53 * one.abs().max()


def outputs(value) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


# ---- what may be permuted ----


def mlp(x, p):
    return linear(silu(linear(x, p.gate)) * linear(x, p.up), p.down)


def test_gate_up_down(find):
    found, reasons = find(Net(mlp, **MLP))
    assert found["down"] == Permutable(
        "down",
        1,
        K,
        (Move("down", 1, 0, K), Move("gate", 0, 0, K), Move("up", 0, 0, K)),
    )
    assert reasons == dict.fromkeys(
        ("gate", "up"), "the order of its channels matters: they are an input of the graph"
    )
    assert_exact(Net(mlp, **MLP), found)


def attention(x, p, queries=4, groups=2, repeat="expand"):
    """Attention of ``queries`` heads that share the values of ``groups``."""
    q = linear(x, p.q).view(B, S, queries, 4).transpose(1, 2)
    k = linear(x, p.k).view(B, S, groups, 4).transpose(1, 2)
    v = linear(x, p.v).view(B, S, groups, 4).transpose(1, 2)
    q, k = q * torch.arange(4), k * torch.arange(4)  # channels are told apart, as by RoPE
    if repeat == "expand":
        k, v = (
            one[:, :, None].expand(B, groups, queries // groups, S, 4).reshape(B, queries, S, 4)
            for one in (k, v)
        )
    elif repeat == "interleave":
        k, v = (one.repeat_interleave(queries // groups, dim=1) for one in (k, v))
    if repeat == "eager":
        k, v = (one.repeat_interleave(queries // groups, dim=1) for one in (k, v))
        y = softmax(q @ k.transpose(2, 3) / 2, dim=-1) @ v
    else:
        y = scaled_dot_product_attention(q, k, v, enable_gqa=repeat == "gqa", is_causal=True)
    return linear(y.transpose(1, 2).contiguous().view(B, S, -1), p.o)


ATTENTION = {"q": (16, H), "k": (8, H), "v": (8, H), "o": (H, 16)}


@pytest.mark.parametrize("repeat", ["expand", "interleave", "gqa", "eager"])
def test_values_and_output_within_heads(find, repeat):
    net = Net(lambda x, p: attention(x, p, repeat=repeat), **ATTENTION)
    found, reasons = find(net)
    moves = (Move("o", 1, 0, 4, 2), Move("v", 0, 0, 4, 1))
    assert found == {"o": Permutable("o", 2, 4, moves)}
    assert set(reasons) == {"q", "k", "v"}
    assert_exact(net, found)


def test_one_group_for_all_queries(find):
    net = Net(
        lambda x, p: attention(x, p, groups=1),
        **ATTENTION | {"k": (4, H), "v": (4, H)},
    )
    found, _ = find(net)
    moves = (Move("o", 1, 0, 4, 4), Move("v", 0, 0, 4, 1))
    assert found == {"o": Permutable("o", 1, 4, moves)}
    assert_exact(net, found)


def fused_qkv(x, p):
    """As GPT-NeoX has it: queries, keys and values of a head side by side."""
    q, k, v = linear(x, p.qkv).view(B, S, 2, 12).transpose(1, 2).chunk(3, dim=-1)
    y = scaled_dot_product_attention(q * torch.arange(4), k * torch.arange(4), v)
    return linear(y.transpose(1, 2).reshape(B, S, 8), p.o)


def sliced_qkv(x, p):
    """As Phi-3 has it: all queries, then all keys, then all values."""
    qkv = linear(x, p.qkv, p.bias)
    parts = (qkv[..., :8], qkv[..., 8:16], qkv[..., 16:])
    q, k, v = (one.view(B, S, 2, 4).transpose(1, 2) for one in parts)
    y = scaled_dot_product_attention(q * torch.arange(4), k * torch.arange(4), v)
    return linear(y.transpose(1, 2).reshape(B, S, 8), p.o)


def test_fused_queries_keys_and_values(find):
    net = Net(fused_qkv, qkv=(24, H), o=(H, 8))
    found, _ = find(net)
    moves = (Move("o", 1, 0, 4), Move("qkv", 0, 8, 12))
    assert found == {"o": Permutable("o", 2, 4, moves)}
    assert_exact(net, found)
    net = Net(sliced_qkv, qkv=(24, H), bias=(24,), o=(H, 8))
    found, _ = find(net)
    moves = (Move("o", 1, 0, 4), Move("qkv", 0, 16, 4), Move("bias", 0, 16, 4))
    assert set(found["o"].moves) == set(moves)
    assert found["o"].moves[0] == moves[0]
    assert_exact(net, found)


def with_lora(x, p):
    up = linear(x, p.up) + linear(linear(x, p.a), p.b) * 0.5
    return linear(silu(linear(x, p.gate)) * up, p.down)


FIRES = {
    "biases": (
        lambda x, p: linear(linear(x, p.up, p.bias).relu(), p.down),
        {"up": (K, H), "bias": (K,), "down": (H, K)},
        {"up", "bias"},
    ),
    "chunk": (
        lambda x, p: linear(silu(linear(x, p.up).chunk(2, -1)[0]), p.down),
        {"up": (2 * K, H), "down": (H, K)},
        {"up"},
    ),
    "split": (
        lambda x, p: linear(torch.mul(*linear(x, p.up).split(K, dim=-1)), p.down),
        {"up": (2 * K, H), "down": (H, K)},
        {"up"},
    ),
    "slices": (
        lambda x, p: linear(linear(x, p.up)[..., :K] * linear(x, p.up)[..., K:], p.down),
        {"up": (2 * K, H), "down": (H, K)},
        {"up"},
    ),
    "addmm": (
        lambda x, p: torch.addmm(p.end, torch.addmm(p.bias, x.view(-1, H), p.up).tanh(), p.down),
        {"up": (H, K), "bias": (K,), "down": (K, H), "end": (H,)},
        {"up", "bias"},
    ),
    "matmul and casts": (
        lambda x, p: (x @ p.up.t()).to(p.down.dtype).pow(2).contiguous() @ p.down.mT,
        {"up": (K, H), "down": (H, K)},
        {"up"},
    ),
    "a weight a channel": (
        lambda x, p: linear(linear(x, p.up) * p.scale + p.shift, p.down),
        {"up": (K, H), "scale": (K,), "shift": (1, 1, K), "down": (H, K)},
        {"up", "scale", "shift"},
    ),
    "flattened rows": (
        lambda x, p: linear(linear(x, p.up).reshape(B * S, K), p.down).view(B, S, H),
        {"up": (K, H), "down": (H, K)},
        {"up"},
    ),
    "dropout that does nothing": (
        lambda x, p: linear(dropout(linear(x, p.up), 0.5, training=False), p.down),
        {"up": (K, H), "down": (H, K)},
        {"up"},
    ),
    "lora": (with_lora, MLP | {"a": (3, H), "b": (K, 3)}, {"gate", "up", "b"}),
    "a norm over tokens": (
        lambda x, p: linear(softmax(linear(x, p.up), dim=1), p.down),
        {"up": (K, H), "down": (H, K)},
        {"up"},
    ),
    "called twice": (
        lambda x, p: linear(linear(x, p.up) * linear(x.flip(1), p.up), p.down),
        {"up": (K, H), "down": (H, K)},
        {"up"},
    ),
    "read twice": (
        lambda x, p: linear(linear(x, p.up), p.down) + linear(linear(x, p.other), p.down),
        {"up": (K, H), "other": (K, H), "down": (H, K)},
        {"up", "other"},
    ),
    "two from four": (
        lambda x, p: linear(linear(x, p.up).view(B, S, 4, 4).transpose(1, 2).sum(1), p.down),
        {"up": (K, H), "down": (H, 4)},
        {"up"},
    ),
}


@pytest.mark.parametrize(("function", "shapes", "movers"), FIRES.values(), ids=FIRES.keys())
def test_what_moves_along(find, function, shapes, movers):
    net = Net(function, **shapes)
    found, _ = find(net)
    assert {move.parameter for move in found["down"].moves} == {"down", *movers}
    assert found["down"].moves[0].parameter == "down"
    assert_exact(net, {"down": found["down"]})


def test_moving_less_than_all_is_not_exact(find):
    """The budget of these tests is small enough to see a mistake."""
    net = Net(mlp, **MLP)
    found, _ = find(net)
    less = Permutable("down", 1, K, found["down"].moves[:2])
    with pytest.raises(AssertionError):
        assert_exact(net, {"down": less})


def test_a_chain_takes_every_other_weight(find):
    net = Net(
        lambda x, p: linear(linear(linear(x, p.a).relu(), p.b).relu(), p.c),
        a=(K, H),
        b=(K, K),
        c=(H, K),
    )
    found, reasons = find(net)
    assert set(found) == {"b"}
    assert reasons["c"] == "it would permute the weight of b, which is permuted itself"
    assert_exact(net, found)


# ---- what keeps them in order ----


def norm(h):
    return h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def rope(h):
    first, second = h[..., : K // 2], h[..., K // 2 :]
    return torch.cat((-second, first), dim=-1) * torch.arange(K).cos()


STAYS = {
    "a norm": (norm, "mean mixes them"),
    "layer_norm": (lambda h: nn.functional.layer_norm(h, (K,)), "layer_norm mixes them"),
    "softmax": (lambda h: softmax(h, -1), "softmax mixes them"),
    "rope": (rope, "cos makes them"),
    "positions": (lambda h: h * torch.arange(K), "arange makes them"),
    "one channel": (lambda h: h * h[..., :1], "one of them is picked"),
    "another channel": (lambda h: h * h[..., 3, None], "one of them is picked"),
    "some channels": (lambda h: h[..., ::2].repeat_interleave(2, -1), "some of them are picked"),
    "flip": (lambda h: h.flip(-1), "flip makes them"),
    "sort": (lambda h: h.sort(-1)[0], "sort makes them"),
    "cumsum": (lambda h: h.cumsum(-1), "cumsum makes them"),
    "roll": (lambda h: torch.roll(h, 1, -1), "roll makes them"),
    "channels as tokens": (
        lambda h: h.transpose(1, 2).reshape(B, S, K),
        "reshape makes them",
    ),
    "in place": (lambda h: h.clone().add_(1), "add_ makes them"),
    "dropout in training": (lambda h: dropout(h, 0.5, training=True), "dropout makes them"),
    "overlapping parts": (
        lambda h: torch.cat((h[..., :10] * 1, h[..., 4:10]), -1),
        "cat puts others beside them",
    ),
    "einsum": (lambda h: torch.einsum("bsk,bsk->bsk", h, h), "einsum makes them"),
    "a table": (lambda h: h[..., torch.arange(K)], "getitem makes them"),
    "a condition": (lambda h: torch.where(h.argmax(-1, True) > 3, h, -h), "argmax may mix"),
}


@pytest.mark.parametrize(("function", "reason"), STAYS.values(), ids=STAYS.keys())
def test_an_operation_that_needs_the_order(find, function, reason):
    net = Net(lambda x, p: linear(function(linear(x, p.up)), p.down), up=(K, H), down=(H, K))
    found, reasons = find(net)
    assert found == {}
    assert reasons["down"].startswith(f"the order of its channels matters: {reason}")


READERS = {
    "the result": (lambda x, h, p: (linear(h, p.down), h), "they leave the graph"),
    "a part of the result": (lambda x, h, p: (linear(h, p.down), h[..., :4]), "cut into parts"),
    "a norm beside it": (lambda x, h, p: linear(h, p.down) + norm(h)[..., :H], "mean mixes them"),
    "another projection": (
        lambda x, h, p: linear(h, p.down) + linear(h, p.other),
        "other reads the same channels",
    ),
    "the residual stream": (
        lambda x, h, p: linear(h + torch.cat((x, x), -1), p.down),
        "cat puts others beside them",
    ),
    "an argument": (lambda x, h, p: linear(h * x.repeat(1, 1, 2), p.down), "repeat makes them"),
}


@pytest.mark.parametrize(("function", "reason"), READERS.values(), ids=READERS.keys())
def test_whoever_else_reads_them(find, function, reason):
    net = Net(
        lambda x, p: function(x, silu(linear(x, p.up)), p), up=(K, H), down=(H, K), other=(H, K)
    )
    found, reasons = find(net)
    assert found == {}
    assert reason in reasons["down"]


def test_a_residual_stream_of_two_layers(find):
    def blocks(x, p):
        h = x + linear(linear(norm(x), p.up).relu(), p.down)
        return h + linear(linear(norm(h), p.up2).relu(), p.down2)

    net = Net(blocks, up=(K, H), down=(H, K), up2=(K, H), down2=(H, K))
    found, reasons = find(net)
    assert set(found) == {"down", "down2"}
    assert set(reasons) == {"up", "up2"}
    assert_exact(net, found)


def test_a_buffer_stays_as_it_is(find):
    net = Net(lambda x, p: linear(linear(x, p.up) * p.table[:S], p.down), up=(K, H), down=(H, K))
    net.register_buffer("table", torch.rand(2 * S, K).double())  # somebody else may read it
    found, reasons = find(net)
    assert found == {}
    assert reasons["down"].endswith("they are an input of the graph")


def test_weights_that_something_else_reads(find):
    net = Net(
        lambda x, p: linear(linear(x, p.up), p.down) + p.up.cumsum(0).sum(), up=(K, H), down=(H, K)
    )
    found, reasons = find(net)
    assert found == {}
    assert "cumsum" in reasons["down"]


def test_heads_that_are_mixed_take_one_order_for_all(find):
    def mixed(x, p):
        v = linear(x, p.v).view(B, S, 2, 4)
        v = v.flip(2)
        return linear(v.reshape(B, S, 8), p.o)

    found, reasons = find(Net(mixed, v=(8, H), o=(H, 8)))
    assert found == {}  # what flip does to the other dimensions is not known
    assert "flip" in reasons["o"]

    def sum_of_heads(x, p):
        v = linear(x, p.v).view(B, S, 2, 4)
        v = v + v.sum(2, keepdim=True)
        return linear(v.reshape(B, S, 8), p.o)

    net = Net(sum_of_heads, v=(8, H), o=(H, 8))
    found, _ = find(net)
    moves = (Move("o", 1, 0, 4, 2), Move("v", 0, 0, 4, 2))
    assert found == {"o": Permutable("o", 1, 4, moves)}
    assert_exact(net, found)


def test_a_nested_graph_is_left_alone(find):
    def nested(x, p):
        h = checkpoint(lambda h: linear(h, p.up).relu(), x, use_reentrant=False)
        return linear(h, p.down)

    found, reasons = find(Net(nested, up=(K, H), down=(H, K)))
    assert found == {}
    assert set(reasons) == {"up", "down"}


def test_symbolic_sizes_are_left_alone(find):
    found, reasons = find(Net(mlp, **MLP), dynamic=True)
    assert found == {}
    assert set(reasons.values()) == {"the graph has symbolic sizes"}


def test_experts_are_left_alone(find):
    net = Net(lambda x, p: torch.bmm(torch.bmm(x, p.up), p.down), up=(B, H, K), down=(B, K, H))
    found, reasons = find(net)
    assert found == {}
    assert "stack of matrices" in reasons["down"]


# ---- any program ----

STEPS = {
    "silu": lambda h, o, p: silu(h),
    "mul": lambda h, o, p: h * o,
    "add": lambda h, o, p: h + o,
    "sub": lambda h, o, p: o - h,
    "scale": lambda h, o, p: h * p.scale,
    "project": lambda h, o, p: linear(h, p.square),
    "tokens": lambda h, o, p: h - h.mean(1, keepdim=True),
    "channels": lambda h, o, p: h - h.mean(-1, keepdim=True),
    "softmax": lambda h, o, p: softmax(h, -1),
    "heads": lambda h, o, p: h.view(B, S, 4, 4).transpose(1, 2).transpose(1, 2).reshape(B, S, K),
    "crossed": lambda h, o, p: h.view(B, S, 4, 4).transpose(2, 3).reshape(B, S, K),
    "head sum": lambda h, o, p: (
        h.view(B, S, 4, 4) + h.view(B, S, 4, 4).sum(2, keepdim=True)
    ).reshape(B, S, K),
    "within": lambda h, o, p: (
        h.view(B, S, 4, 4) + h.view(B, S, 4, 4).sum(3, keepdim=True)
    ).reshape(B, S, K),
    "swap": lambda h, o, p: torch.cat(h.chunk(2, -1)[::-1], -1),
    "halves": lambda h, o, p: torch.stack(h.chunk(2, -1), 2).flatten(2),
    "product of halves": lambda h, o, p: torch.mul(*h.chunk(2, -1)).repeat_interleave(2, -1),
    "attend": lambda h, o, p: scaled_dot_product_attention(h, o, h),
    "attend heads": lambda h, o, p: (
        scaled_dot_product_attention(*(one.view(B, S, 2, 8).transpose(1, 2) for one in (o, o, h)))
        .transpose(1, 2)
        .reshape(B, S, K)
    ),
    "pick": lambda h, o, p: h + o[..., 5, None],
    "flip": lambda h, o, p: h.flip(-1),
    "gram": lambda h, o, p: (h.transpose(1, 2) @ o / 8).tanh().transpose(1, 2)[:, :S].contiguous(),
    "in place": lambda h, o, p: h.clone().mul_(o),
    "expand": lambda h, o, p: (h[..., :8].unsqueeze(-1).expand(B, S, 8, 2)).reshape(B, S, K),
}


def random_program(seed: int):
    draw = random.Random(seed)
    steps = [(name, draw.random(), draw.random()) for name in draw.choices([*STEPS], k=3)]

    def program(x, p):
        values = [linear(x, p.one), linear(x, p.two, p.bias)]
        for name, first, second in steps:
            h, o = (values[int(share * len(values))] for share in (first, second))
            values.append(STEPS[name](h, o, p))
        return linear(values[-1], p.down)

    return program


SHAPES = {
    "one": (K, H),
    "two": (K, H),
    "bias": (K,),
    "scale": (K,),
    "square": (K, K),
    "down": (H, K),
}


def test_what_is_found_in_any_program_is_exact(find):
    claims = 0
    for seed in range(24):
        net = Net(random_program(seed), **SHAPES)
        found, _ = find(net)
        claims += len(found)
        if found:
            assert_exact(net, found)
    assert claims > 5
