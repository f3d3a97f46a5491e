"""Amber's passes inside compile pipelines that people already have.

inductor    a custom pass of Inductor, for ``torch.compile(model)`` without another backend
vllm        the same for vLLM's pass manager
"""
