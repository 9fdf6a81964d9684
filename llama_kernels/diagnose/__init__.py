"""`python -m llama_kernels`: the environment report that a bug report needs, and the parity check.

environment.py collects versions, GPUs and settings, kernels.py says which kernel each op takes and why, text.py prints
both. check.py runs the parity check, with the calls of cases.py, the plain PyTorch of eager.py and the bounds of
rule.py. `import llama_kernels` imports none of these files.
"""
