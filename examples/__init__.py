"""Scripts to run and to copy code from."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before Transformers is imported: models are local folders
