"""Rewrite a program that somebody else will compile, run or save.

    program, report = rewrite(program, AmberConfig(pattern="2:4"))

rewriting      what is done with any program, and the public function
one_token      calls that nothing tells from prefill
modules        what modules do that a graph calls
graph_module   graphs of Dynamo, of make_fx and of symbolic_trace
exported       programs of torch.export
"""

from .rewriting import rewrite

__all__ = ["rewrite"]
