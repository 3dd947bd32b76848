"""The FNAC training stack: data, model, training, evaluation and pictures, on the kernels of ``fnac_kernels``.

Nothing is imported here, so that each part loads only the libraries it needs.
"""
