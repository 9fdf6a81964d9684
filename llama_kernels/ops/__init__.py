"""The operations: one file each, from tiles and kernels to the public function. Attention is a folder.

Read rms_norm.py first. rotation.py and rotation_checks.py have what the ops that rotate share, partials.py the sum of a
weight's gradient over programs. rope_attention.py is made of two other ops; every other op imports none.
"""
