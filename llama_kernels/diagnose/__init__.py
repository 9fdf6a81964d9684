"""`python -m llama_kernels`: the environment report that a bug report needs, and the parity check.

environment.py collects versions, GPUs and settings, kernels.py says which kernel each op takes and why, text.py prints
both. check.py runs the parity check: cases.py holds its calls, eager.py what they are compared with, rule.py the
bounds. Nothing here is imported by `import llama_kernels`.
"""
