"""Estimates of speed without a GPU, by models of the machine code.

    lines.py           the calls of `python -m bench estimate`, each with its estimates
    ours.py            our ops, by the models; few_rows.py, packed.py and windows.py have other kinds of calls
    memory.py          the model of memory-bound kernels
    attention.py       the model of attention: tiles.py counts the steps of its tiles, sm/ simulates one SM
    kernels.py         compiles the launches of a call for a GPU that is not there
    constants.py       the numbers of the models; result.py an estimate; errors.py how far estimates are off
    calibrate.py       kernels of others (peers/) beside their speeds (published.py); measured.py has ours
    layer.py           a decoder layer: layer_times.py has its ops, layer_picture.py draws it
    context_parallel/  what the network costs `cp_attention`

bounds.py and training_bounds.py have another method: bounds from below, by bytes and FLOPs alone.
"""

ROW_OPS = ("rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "rope_qkv")
OPS = (*ROW_OPS, "attention", "attention_varlen", "windows", "decode", "chunks")  # that `python -m bench estimate` has
