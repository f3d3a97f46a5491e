"""A report as a deep Llama leaves it, without compiling one: 80 layers of 7 projections and a head.

deep_report(80)     one prefill graph of 75 nodes a layer, before and after; one decode graph
"""

from collections import Counter
from dataclasses import replace

from amber_compile import Report, Settings
from amber_compile.decision import Decision, dense, sparse
from amber_compile.report import GraphReport, Site
from amber_compile.sketch import Sketch, SketchNode, Stage

HIDDEN, INNER = 8192, 28672
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (1024, HIDDEN),
    "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SPARSE = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
NORM = ("to", "pow", "mean", "add", "rsqrt", "mul", "to", "mul")
ROPE = ("view", "transpose", "mul", "getitem", "getitem", "neg", "cat", "mul", "add")


class _Layers:
    """Nodes, one after the other; with ``selects`` as the pass leaves them."""

    def __init__(self, selects: bool, size: str) -> None:
        self.selects = selects
        self.size = size
        self.inputs: list[SketchNode] = []
        self.nodes: list[SketchNode] = []
        self.counts: Counter[str] = Counter()

    def add(
        self, target: str, *inputs: str, module: str, site: str = "", width: int = HIDDEN
    ) -> str:
        name = f"{target}_{self.counts[target]}"
        self.counts[target] += 1
        value = f"bf16[1, {self.size}, {width}]"
        node = SketchNode(
            name, "call_function", target, inputs, value, site, ", ".join(inputs), module
        )
        self.nodes.append(node)
        return name

    def chain(self, targets: tuple[str, ...], last: str, module: str) -> str:
        for target in targets:
            last = self.add(target, last, module=module)
        return last

    def linear(self, x: str, layer: str, leaf: str) -> str:
        site, shape = f"{layer}.{leaf}" if layer else leaf, SHAPES.get(leaf, (128256, HIDDEN))
        held = SketchNode(
            f"l_self_modules_{site.replace('.', '_modules_')}_parameters_weight_",
            "placeholder",
            f"{site}.weight",
            value=f"bf16[{shape[0]}, {shape[1]}]",
            module=site,
        )
        self.inputs.append(held)
        if self.selects and leaf in SPARSE:
            x = self._select(x, site, shape[1])
        return self.add("linear", x, held.name, module=site, site=site, width=shape[0])

    def _select(self, x: str, site: str, width: int) -> str:
        factor = SketchNode(
            f"amber_weight_norm_{len(self.inputs)}",
            "placeholder",
            "factor",
            value=f"f32[{width}]",
            module="amber",
        )
        self.inputs.append(factor)
        arguments = f"{x}, {factor.name}, 2, 4, 'norm', 0, 1, None"
        name = f"nm_select_default_{len(self.inputs)}"
        value = f"bf16[1, {self.size}, {width}]"
        read = (x, factor.name)
        self.nodes.append(
            SketchNode(
                name,
                "call_function",
                "amber.nm_select",
                read,
                value,
                "",
                arguments,
                f"{site}.select",
            )
        )
        return name

    def layer(self, layer: str, x: str) -> str:
        attention = f"{layer}.self_attn"
        normed = self.chain(NORM, x, f"{layer}.input_layernorm")
        q, k, v = (self.linear(normed, layer, f"self_attn.{one}_proj") for one in "qkv")
        q, k = self.chain(ROPE, q, attention), self.chain(ROPE, k, attention)
        v = self.chain(("view", "transpose", "expand", "reshape"), v, attention)
        y = self.add("scaled_dot_product_attention", q, k, v, module=attention)
        y = self.chain(("reshape", "transpose", "contiguous", "reshape"), y, attention)
        x = self.add("add", x, self.linear(y, layer, "self_attn.o_proj"), module=layer)
        normed = self.chain(NORM, x, f"{layer}.post_attention_layernorm")
        gate = self.linear(normed, layer, "mlp.gate_proj")
        gate = self.add("silu", gate, module=f"{layer}.mlp.act_fn", width=INNER)
        up = self.linear(normed, layer, "mlp.up_proj")
        y = self.add("mul", gate, up, module=f"{layer}.mlp", width=INNER)
        return self.add("add", x, self.linear(y, layer, "mlp.down_proj"), module=layer)


def deep_sketch(layers: int, *, selects: bool, size: str = "s50") -> Sketch:
    """Return the graph of a Llama; with ``selects`` as Amber rewrites it."""
    made = _Layers(selects, size)
    x = made.add("embedding", "l_args_0_", module="model.embed_tokens")
    for at in range(layers):
        x = made.layer(f"model.layers.{at}", x)
    logits = made.linear(made.chain(NORM, x, "model.norm"), "", "lm_head")
    tokens = SketchNode("l_args_0_", "placeholder", "args.0", value=f"i64[1, {size}]")
    end = SketchNode("output", "output", "output", (logits,), "", "", f"({logits},)")
    return (tokens, *made.inputs, *made.nodes, end)


def deep_sites(layers: int, decided: Decision | None = None, errors: bool = True) -> list[Site]:
    """Return the projections; three of seven are sparse, unless ``decided`` says otherwise."""
    sites = [
        _site(f"model.layers.{at}.{leaf}", leaf, decided, 0.05 + 0.3 * at / layers + 0.01 * place)
        for at in range(layers)
        for place, leaf in enumerate(SHAPES)
    ]
    head = Site(
        "lm_head", (128256, HIDDEN), 1e9, "linear", dense("rule: lm_head stays dense"), "head"
    )
    return [site if errors else replace(site, error=None) for site in (*sites, head)]


def _site(name: str, leaf: str, decided: Decision | None, error: float) -> Site:
    shape = SHAPES[leaf]
    rule = sparse(Settings("2:4", correction="norm")) if leaf in SPARSE else None
    decision = decided or rule or dense(f"rule: {leaf.rpartition('.')[2]} stays dense")
    return Site(
        name,
        shape,
        float(shape[0] * shape[1]),
        "linear",
        decision,
        share=float(decision.sparse),
        kernel="nm_select, C++" if decision.sparse else "",
        error=error if decision.sparse else None,
    )


def deep_report(layers: int = 80) -> Report:
    """Return a report of one prefill and one decode graph."""
    stages = [
        Stage.of("traced", deep_sketch(layers, selects=False)),
        Stage.of("sparsify_projections", deep_sketch(layers, selects=True)),
    ]
    traced = [Stage.of("traced", deep_sketch(layers, selects=False, size="1"))]
    prefill = GraphReport("prefill", deep_sites(layers), 3 * layers, 1.2, stages=stages)
    prefill.output_error = 0.21
    one = deep_sites(layers, dense("decode: one token"), errors=False)
    return Report([prefill, GraphReport("decode", one, 0, 0.1, stages=traced)])
