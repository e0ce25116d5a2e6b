"The package is what the notebooks export, in the course's order, and what is built of it is whole."
import ast, os, re, shutil, subprocess, sys, tarfile, zipfile
from email.parser import Parser
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from notebooks import ROOT, directives, exported, find_notebooks, modules, read, readme

import sd_scratch

COURSE = [p for p in find_notebooks() if re.match(r"\d\d_", p.name) and p.parent == ROOT / "nbs"]


def module_of(notebook):
    "Return the name of the module that a notebook exports, or None."
    for cell in read(notebook).cells:
        if name := directives(cell).get("default_exp"): return name[0]


def imported(tree):
    "Yield the modules of the package that a module imports, wherever in it the import stands."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["sd_scratch" if node.level else None, node.module]))
            names = [f"{base}.{a.name}" for a in node.names] if base == "sd_scratch" else [base]
        else: continue
        yield from (n.split(".")[1] for n in names if re.match(r"sd_scratch\.\w", n))


def run(*args, **kwargs):
    "Run a program to its end, and show what it said if it failed."
    done = subprocess.run(args, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_package_is_the_export_of_the_notebooks():
    want, have = exported(), modules()
    assert sorted(have) == sorted(want)
    assert not [name for name in want if have[name] != want[name]], "run: python tests/notebooks.py export"


def test_imports_go_backwards():
    order = [m for m in map(module_of, COURSE) if m]
    assert len(set(order)) == len(order) > 0
    for i, name in enumerate(order):
        used = set(imported(ast.parse((ROOT / f"sd_scratch/{name}.py").read_text(encoding="utf-8"))))
        assert used <= set(order[:i]), f"{name} imports from later notebooks"


def test_imported_finds_every_form():
    source = "import sd_scratch.a, os\nfrom sd_scratch.b import x\nfrom sd_scratch import c as d\ndef f():\n  from .e import y\n  from . import g\nfrom h import i"
    assert sorted(imported(ast.parse(source))) == ["a", "b", "c", "e", "g"]


def test_version():
    assert re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text(), re.MULTILINE)[1] == sd_scratch.__version__


def test_readme_is_the_front_page():
    text, pictures = readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run: python tests/notebooks.py readme"
    assert {name: (ROOT / name).read_bytes() for name in pictures} == pictures


def links(text):
    "Return the targets of the links and pictures in a Markdown text, code left out."
    text = re.sub(r"(?s)```.*?```|`[^`\n]+`", "", text)
    return re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *find_notebooks()]


@cache
def markdown(path):
    "Return the text of a page: a Markdown file, or a notebook's Markdown cells."
    return path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")


def anchors(text):
    "Return the names by which Jupyter lets links jump to the headings of a text."
    return {re.sub(r"[`*]", "", h).strip().replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", text)}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_local_links_exist(path):
    "Every link to a file finds it, and every link into a page finds its heading."
    for link in links(markdown(path)):
        if re.match(r"[a-z]+:", link): continue
        file, _, anchor = map(unquote, link.partition("#"))
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor and target.suffix in (".ipynb", ".md"): assert anchor in anchors(markdown(target)), f"{link}: its headings are {sorted(anchors(markdown(target)))}"


@pytest.mark.parametrize("path", COURSE, ids=lambda p: p.stem)
def test_glossary_has_every_word_earned(path):
    "Each term that a notebook earns stands in the glossary, with a link to a heading of that notebook."
    earned = re.search(r"(?ms)^## Words earned\n(.*?)(?=^## |\Z)", markdown(path))
    entries = dict(re.findall(r"(?m)^- \*\*(.+?)\*\*(.*)$", markdown(ROOT / "nbs/glossary.ipynb")))
    for term in re.findall(r"(?m)^- \*\*(.+?)\*\*", earned[1] if earned else ""): assert f"]({path.name}#" in entries.get(term, ""), term


def test_front_page_names_every_notebook():
    text = "\n".join(c.source for c in read(ROOT / "nbs/index.ipynb").cells)
    assert sorted(set(re.findall(r"\]\((\d\d_\w+\.ipynb)\)", text))) == [p.name for p in COURSE]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Build the sdist, and from it the wheel; return both and the wheel's files in a folder."
    folder = tmp_path_factory.mktemp("built").resolve()
    source = folder / "source"
    shutil.copytree(ROOT / "sd_scratch", source / "sd_scratch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CONTRIBUTING.md"): shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file: file.extractall(folder / "wheel")
    return sdist, wheel, folder / "wheel"


def package_files():
    "Return all files of the package, as paths from the project's root."
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "sd_scratch").rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert {n for n in names if ".dist-info/" not in n} == package_files()
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_sdist_holds_what_the_build_needs(built):
    with tarfile.open(built[0]) as file: names = {n.partition("/")[2] for n in file.getnames()}
    assert names >= package_files() | {"settings.ini", "setup.py", "README.md", "LICENSE"}


def test_wheel_metadata(built):
    info = next(built[2].glob("*.dist-info"))
    facts = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    needed = [r for r in facts.get_all("Requires-Dist") if "extra ==" not in r]
    assert facts["Version"] == sd_scratch.__version__ and facts["Requires-Python"] == ">=3.11"
    assert any(r.startswith("torch>=") for r in needed)
    assert not [r for r in needed if re.search(r"[<=~]=?[\d.]", r.replace(">=", ""))], "lower bounds only"
    assert "sd-scratch = sd_scratch.cli:main" in (info / "entry_points.txt").read_text()


def test_wheel_imports_without_the_checkout(built):
    names = [f"sd_scratch.{Path(n).stem}" for n in modules() if "/" not in n and not n.startswith("_")]
    code = f"import importlib, sd_scratch\nfor name in {names}: importlib.import_module(name)\nprint(sd_scratch.__file__)"
    assert run(sys.executable, "-P", "-c", code, cwd=built[2].parent, env=os.environ | {"PYTHONPATH": str(built[2])}).strip() == str(built[2] / "sd_scratch/__init__.py")


def test_command_line_imports_no_more_than_it_needs():
    code = "import sys, sd_scratch.cli; print(*sys.modules)"
    assert not {"matplotlib.pyplot", "diffusers", "transformers", "IPython", "nbdev"} & set(run(sys.executable, "-c", code, cwd=ROOT).split())


def test_shipped_model_is_small():
    assert sum(p.stat().st_size for p in (ROOT / "sd_scratch/weights/tiny").rglob("*") if p.is_file()) <= 12e6
