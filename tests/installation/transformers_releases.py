"""`make transformers`: tests/integrations with one release of Transformers after another.

    python -m tests.installation.transformers_releases 4.57.6 5.3.0

Each release is installed aside, with its requirements, into an environment that takes all other packages from this one.
Writes build/transformers/table.md, and beside it the output of each run. The exit status is 1 if a test fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The last of each minor release, up to the one before that of constraints.txt.
RELEASES = (
    "4.57.6", "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0", "5.10.4",
    "5.11.0", "5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1",
    "5.22.2", "5.23.0",
)  # fmt: skip
# What is installed beside a release because the newest release of a package needs newer requirements.
BESIDE = {"4.57.6": ["datasets<5"]}


def install(release: str, folder: Path) -> Path:
    """Make an environment with this release, unless there is one. Returns its Python."""
    python = folder / "bin/python"
    if (folder / "installed").exists():
        return python
    venv.create(folder, clear=True, with_pip=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # behind this environment's own packages
    pip = [str(python), "-m", "pip", "install", "-q", f"transformers=={release}", *BESIDE.get(release, ())]
    subprocess.run(pip, check=True)
    (folder / "installed").touch()
    return python


def test(python: Path, output: Path, arguments: list[str]) -> str:
    """Run the tests on the reference path. Returns the last line of pytest's output, which it writes to `output`."""
    command = [str(python), "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", *arguments]
    env = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with output.open("w") as file:
        subprocess.run(command, env={**os.environ, **env}, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    return output.read_text().rstrip().rpartition("\n")[2]


def main() -> int:
    name = "python -m tests.installation.transformers_releases"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n\n")[0])
    parser.add_argument("releases", nargs="*", default=RELEASES, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "build/transformers")
    parser.add_argument("--workers", default="2", help="processes of pytest, default: %(default)s")
    parser.add_argument("--tests", nargs="+", default=["tests/integrations"], help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for release in args.releases:
        python = install(release, args.out / release)
        rows.append((release, test(python, args.out / f"{release}.txt", ["-n", args.workers, *args.tests])))
        print(*rows[-1], sep=": ", flush=True)
    lines = ["| Transformers | tests |", "|---|---|", *(f"| {release} | {result} |" for release, result in rows)]
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    return int(any("failed" in result or "error" in result or "passed" not in result for _, result in rows))


if __name__ == "__main__":
    sys.exit(main())
