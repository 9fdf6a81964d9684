"""Estimates of speed without a GPU."""

ROW_OPS = ("rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "rope_qkv")
OPS = (*ROW_OPS, "attention", "attention_varlen", "windows", "decode", "chunks")  # that `python -m bench estimate` has
