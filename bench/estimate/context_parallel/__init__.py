"""Estimates of context-parallel attention on many GPUs: what its transfers cost, and which of them are hidden.

steps: what each rank does, recorded from llama_kernels.distributed itself. costs: what a step takes. schedule: the
steps of all ranks, simulated event by event. paper: the same in closed form, for any number of ranks. cases: the models
and lengths that are estimated. picture: a figure of them.
"""
