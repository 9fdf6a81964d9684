"""tools/link_environment.py: the environment that it makes finds the packages of the Python that runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
OFFLINE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env={**OFFLINE, **env})


def put_package(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "some_package.py").write_text("")


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python3*/site-packages"))


def virtual_environment(folder: Path) -> tuple[Path, dict[str, str]]:
    venv.create(folder, symlinks=True)
    put_package(site_packages(folder))
    return folder / "bin" / "python", {}


def virtual_environment_with_a_path_file(folder: Path) -> tuple[Path, dict[str, str]]:
    venv.create(folder, symlinks=True)
    put_package(folder / "elsewhere")
    (site_packages(folder) / "elsewhere.pth").write_text(f"{folder / 'elsewhere'}\n")
    return folder / "bin" / "python", {}


def python_with_user_packages(folder: Path) -> tuple[Path, dict[str, str]]:
    # sys._base_executable is that of the virtual environment in Python 3.10.
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    env = {"PYTHONUSERBASE": str(folder)}
    command = (python, "-c", "import site; print(site.getusersitepackages())")
    put_package(Path(run(*command, **env).stdout.strip()))
    return python, env


@pytest.mark.parametrize("make", [virtual_environment, virtual_environment_with_a_path_file, python_with_user_packages])
def test_the_environment_finds_the_packages_of_the_python_that_made_it(make, tmp_path):
    python, env = make(tmp_path / "outer")
    link = f"import sys; sys.path.append({str(ROOT)!r}); from tools.link_environment import link, Path; "
    done = run(python, "-c", f"{link} link(Path({str(tmp_path / 'made')!r}))", **env)
    assert done.returncode == 0, done.stderr
    find = "import importlib.util as i; print(*(i.find_spec(n).origin for n in ('some_package', 'llama_kernels')))"
    found = run(tmp_path / "made" / "bin" / "python", "-c", find).stdout.split()
    assert found[0].startswith(str(tmp_path / "outer")) and found[1] == str(ROOT / "llama_kernels" / "__init__.py")
    assert len(list(site_packages(tmp_path / "made").iterdir())) == 1


def test_a_python_without_torch_is_refused(tmp_path):
    python, _ = virtual_environment(tmp_path / "outer")
    done = run(python, ROOT / "tools" / "link_environment.py", tmp_path / "made")
    assert done.returncode == 1 and "and it has none. Choose another Python with PYTHON=" in done.stdout
    assert not (tmp_path / "made").exists()


def test_an_environment_cannot_replace_itself(tmp_path):
    python, _ = virtual_environment(tmp_path / "outer")
    done = run(python, ROOT / "tools" / "link_environment.py", tmp_path / "outer")
    assert done.returncode == 1 and "belongs to" in done.stdout and python.exists()
