"""The kernels for NVIDIA GPUs, in Triton and Gluon.

Importing this package imports neither: a module that holds a kernel is imported when the first
CUDA tensor asks for it, so that a machine without a GPU needs no Triton.
"""
