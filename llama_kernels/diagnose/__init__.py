"""`python -m llama_kernels`: the environment report for bug reports, and the parity check.

environment.py collects versions, GPUs and settings. kernels.py says which kernel runs for each op, and why. text.py
prints both. check.py runs the parity check: cases.py has its calls, rule.py the bounds. `import llama_kernels` imports
none of these files.
"""
