"""Makes a virtual environment that has this repository and every package of the Python that runs this file.

    python3 tools/link_environment.py .venv

Nothing is installed, so neither pip nor a network is needed: a .pth file in the new environment lists the folders. The
Python may have its packages in site-packages, in dist-packages or in the user's folder. It may also be in a virtual
environment, whose packages `python -m venv --system-site-packages` would not include.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PTH = "packages_of_the_python_that_made_this.pth"


def search_path(python: Path) -> list[str]:
    """The sys.path of `python`."""
    command = [python, "-c", "import json, sys; print(json.dumps(sys.path))"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout)


def link(folder: Path) -> None:
    """Make the environment at `folder`. An existing folder is replaced."""
    if folder.exists():
        shutil.rmtree(folder)
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    own = search_path(python)  # the standard library, and an empty site-packages
    of_packages = [path for path in search_path(Path(sys.executable)) if path and path not in own]
    site_packages = next(Path(path) for path in own if Path(path).name == "site-packages")
    (site_packages / PTH).write_text("\n".join([str(ROOT), *of_packages]) + "\n")


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python tools/link_environment.py FOLDER")
        return 2
    folder, python = Path(sys.argv[1]).absolute(), sys.executable
    if folder == Path(sys.prefix).absolute():
        print(f"{python} belongs to {folder}, which would be replaced. Choose another with PYTHON=/path/to/python3")
        return 1
    if importlib.util.find_spec("torch") is None:
        print(f"TORCH=present uses the torch of {python}, and it has none. Choose another Python with "
              "PYTHON=/path/to/python3, or leave out TORCH=present to download torch.")  # fmt: skip
        return 1
    link(folder)
    command = [folder / "bin" / "python", "-c", "import llama_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if done.returncode:
        print(f"llama_kernels cannot be imported with the packages of {python}:\n{done.stderr.strip()}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
