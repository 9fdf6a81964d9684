"""Measurements and reports of machine code. Not installed: run from a checkout, for example `python -m bench`.

    commands/    the commands of `python -m bench`, and their arguments
    works/       what is measured: ops at shapes, with their least bytes and FLOPs. providers/: who computes them
    training/    training steps of Transformers models
    measuring/   checks numbers and takes times, in a process that a failing provider may end
    reporting/   pictures, tables, the page, comparisons and goals. results/: runs worth keeping
    estimate/    speed without a GPU, by models of the machine code. gpus.py: the rates of data sheets
    codegen/     `python -m bench.codegen`, the compile gate
    gpu_check/   `python -m bench.gpu_check`, every check that needs a GPU

tiles.py, host.py and cpu.py are commands of their own: other tiles, host time, CPU tensors. attention_options.py has
the arguments of the registered ops of attention, for the bench and the tests.
"""
