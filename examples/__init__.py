"""Scripts to run and to copy from."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are local folders; read when Transformers is imported
