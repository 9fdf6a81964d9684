"""README, CONTRIBUTING and docs/: code runs, links have targets, and generated parts are up to date."""

from __future__ import annotations

import ast
import collections
import os
import re
from pathlib import Path

import pytest
import torch

import llama_kernels as lk
from tests.conftest import INTERPRETED
from tools import diagrams

ROOT = Path(lk.__file__).parent.parent
FOLDERS = ["docs", "examples", "bench", "tests"]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))]
]

# --- code ------------------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The last line of a block that raises: the type of the error and its message.
_RAISES = re.compile(r"^# (\w+Error): (.*)\n\Z", re.MULTILINE)


def code_of(page: str) -> list[str]:
    return _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def folder_with_a_llama(tmp_path_factory) -> Path:
    """A working directory for the code, in which path/to/llama is a small Llama."""
    folder = tmp_path_factory.mktemp("samples")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "path/to/llama")
    return folder


@pytest.mark.skipif(INTERPRETED, reason="readers do not set TRITON_INTERPRET")
@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("tests/") and code_of(page)])
def test_the_code_of_a_page_runs(page, folder_with_a_llama, monkeypatch):
    """The blocks of a page run one after another and share their variables."""
    monkeypatch.chdir(folder_with_a_llama)
    monkeypatch.syspath_prepend(str(ROOT))
    torch.manual_seed(0)
    variables = {"__name__": page}
    for block in code_of(page):
        raised = _RAISES.search(block)
        code = compile(block, page, "exec", dont_inherit=True)
        if raised is None:
            exec(code, variables)
        else:
            with pytest.raises(Exception, match=re.escape(raised[2])) as caught:
                exec(code, variables)
            assert caught.type.__name__ == raised[1]


@pytest.mark.once
def test_the_main_pages_have_code_that_runs():
    assert {"README.md", "docs/index.md", "docs/quick_start.md", "docs/transformers.md"} <= {
        page for page in PAGES if code_of(page)
    }


# --- links -----------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"\[[^\]]+\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _CODE.sub(_without_marks, path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _without_marks(code: re.Match[str]) -> str:
    return "" if code[0].startswith("```") else code[0].strip("`")


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    """Links to other hosts are not checked."""
    source = ROOT / page
    for target, anchor in _LINK.findall(_CODE.sub("", source.read_text(encoding="utf-8"))):
        path = Path(os.path.normpath(source.parent / target)) if target else source
        assert path.exists(), f"{page} links to {target}, which does not exist"
        assert path.is_relative_to(ROOT), f"{page} links to {target}, which is outside the repository"
        if anchor and path.suffix == ".md":
            assert anchor in anchors_of(path), f"{page} links to {target}#{anchor}; {path.name} has no such heading"


# "`name` in [file](path)" and "`name` and `other` in [file](path)"
_NAMES_IN_FILE = re.compile(r"((?:`\w+`(?:, | and )?)+) in\s+\[[^\]]+\]\(([^)\s#]+\.py)\)")


def names_in_files() -> list[tuple[str, str, str]]:
    """(page, name, file as the page links to it) for each name that a page says is in a file."""
    found = []
    for page in PAGES:
        for names, target in _NAMES_IN_FILE.findall((ROOT / page).read_text(encoding="utf-8")):
            found += [(page, name, target) for name in re.findall(r"`(\w+)`", names)]
    return found


@pytest.mark.once
@pytest.mark.parametrize(("page", "name", "target"), names_in_files())
def test_a_file_has_the_names_that_a_page_says_are_in_it(page, name, target):
    file = Path(os.path.normpath((ROOT / page).parent / target))
    assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{page}: there is no {name} in {target}"


@pytest.mark.once
def test_every_page_of_the_site_is_in_its_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/.-]+\.md", navigation)) - {"contributing.md", "changelog.md"}
    assert listed == {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}


# --- numbers ---------------------------------------------------------------------------------------------------------

# (page, what it says, file, tables): the number before the words is that of the entries of the tables in the file.
COUNTS = [
    ("README.md", r"(\d+) injected mistakes", "tests/regressions/test_mutants.py", ("MUTANTS",)),
    ("docs/reliability.md", r"injects (\d+) mistakes", "tests/regressions/test_mutants.py", ("MUTANTS",)),
    (
        "docs/reliability.md",
        r"(\d+) faults injected into the cache",
        "tests/contracts/launcher/mutants.py",
        ("MUTANTS", "MUTANTS_OF_DESCRIPTORS"),
    ),
]


@pytest.mark.once
@pytest.mark.parametrize(("page", "words", "file", "tables"), COUNTS)
def test_a_page_says_how_many_entries_a_table_has(page, words, file, tables):
    entries = 0
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in tables:
            entries += len(node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts)
    said = re.findall(words, (ROOT / page).read_text(encoding="utf-8"))
    assert said == [str(entries)], f"{page} says {said}; {file} has {entries}"


@pytest.mark.once
def test_the_readme_counts_the_families_of_the_table():
    """The table of docs/transformers.md has a row for each family: ours, stock, or a dash for what it does not have."""
    _, _, table = (ROOT / "docs/transformers.md").read_text(encoding="utf-8").partition("<!-- families: made by")
    rows = [line.strip("| ").split(" | ")[1:4] for line in table.splitlines() if re.match(r"\| \w", line)][1:]
    kinds = collections.Counter(_kind(set(row)) for row in rows)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| (?:attention, RMSNorm|those of|some|none)[^|]*\| (\d+) \|", readme, re.MULTILINE)
    assert said == [str(kinds[which]) for which in ("all", "those it has", "some", "none")]
    assert set(re.findall(r"(\d+) (?:decoder|model)\s+families", readme)) == {str(len(rows))}
    assert re.findall(r"(\d+) of\s+\d+ decoder", readme) == [str(kinds["all"])]


def _kind(cells: set[str]) -> str:
    if cells <= {"ours", "—"}:
        return "those it has" if "—" in cells else "all"
    return "none" if cells <= {"stock", "—"} else "some"


# --- generated parts -------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_the_diagrams_are_up_to_date():
    page = diagrams.PAGE.read_text(encoding="utf-8")
    assert page == diagrams.with_sections(page), "docs/architecture.md is out of date: python -m tools.diagrams --write"


@pytest.mark.once
def test_the_architecture_names_every_folder():
    """Of the package each folder and file beside the public names, of the tests each folder."""
    page = diagrams.PAGE.read_text(encoding="utf-8")
    package, tests = ROOT / "llama_kernels", ROOT / "tests"
    parts = [path for path in package.iterdir() if path.is_dir() or path.suffix == ".py"]
    for path in parts:
        if not path.name.startswith("__"):
            assert f"(../{path.relative_to(ROOT)}" in page or f"(../{path.name}" in page, path
    for folder in tests.iterdir():
        if folder.is_dir() and not folder.name.startswith("__"):
            assert f"`{folder.name}`" in page, folder


@pytest.mark.once
def test_the_table_of_calls_has_every_op_of_the_reference():
    assert set(diagrams.public_functions()) == set(lk.reference.__all__), (
        "reference/__init__.py names the ops, and each is also a name in llama_kernels/__init__.py"
    )


@pytest.mark.once
def test_the_api_reference_has_every_public_name():
    hugging_face = pytest.importorskip("llama_kernels.integrations.transformers")
    text = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    documented = set(re.findall(r"^::: llama_kernels\.([\w.]+)$", text, re.MULTILINE))
    modules = {"nn": lk.nn, "reference": lk.reference}
    public = set(lk.__all__) - modules.keys() | {"nn.RMSNorm", "nn.RotaryEmbedding"}
    public |= {f"integrations.transformers.{name}" for name in hugging_face.__all__}
    public.add("integrations.trainer.LlamaKernelsCallback")
    public |= {f"distributed.{name}" for name in lk.distributed.__all__}
    assert documented == public, "each public name needs a line `::: llama_kernels.NAME` in one page of docs/api"
