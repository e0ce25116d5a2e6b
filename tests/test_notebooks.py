"Every notebook runs from top to bottom on its own, and what is committed of it is whole."
import ast, re, subprocess, sys
from copy import deepcopy

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.clean import clean_nb
from notebooks import ROOT, directives, find_notebooks, is_run, read

NOTEBOOKS = find_notebooks()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())
MISSING = re.compile(r"^FileNotFoundError: (.*(?:emoji font|SD_SCRATCH_DATA).*)", re.MULTILINE)
SHOWS = re.compile(r"print|show_\w+|display|plt\.show")


def outputs(path):
    "Yield a notebook's saved outputs."
    for cell in read(path).cells: yield from cell.get("outputs", [])


def shows(source):
    "Say whether a cell calls what prints or plots, outside the functions that it defines."
    nodes = [ast.parse(TransformerManager().transform_cell(source))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Call) and SHOWS.fullmatch(ast.unparse(node.func)): return True
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)): nodes += ast.iter_child_nodes(node)
    return False


def test_shows():
    for source in ("print(1)", "for i in x:\n    show_images(i)", "f(x)\n%time plt.show()\nprint()"): assert shows(source), source
    for source in ("x = 1", "def f(): print(1)", "test_stdout(lambda: print(1), '1')", "!ls", "fingerprint(x)"): assert not shows(source), source


def test_notebooks_are_found():
    assert {p.stem for p in NOTEBOOKS} >= {"index", "00_start"}


@pytest.mark.notebook
@each_notebook
def test_runs(path):
    "A fresh process runs every cell that is to be run."
    done = subprocess.run([sys.executable, ROOT / "tests/notebooks.py", "run", path], capture_output=True, text=True)
    if done.returncode and (missing := MISSING.search(done.stderr)): pytest.skip(missing[1])
    assert done.returncode == 0, done.stderr
    assert int(re.search(r": (\d+) cells", done.stdout)[1]) == sum(map(is_run, read(path).cells))


@each_notebook
def test_no_saved_error(path):
    assert not [o.evalue for o in outputs(path) if o.output_type == "error"]


@each_notebook
def test_outputs_are_saved(path):
    "A cell that prints or plots was run before it was committed."
    cells = [c for c in read(path).cells if c.cell_type == "code" and is_run(c) and not {"export", "exports", "hide"} & directives(c).keys()]
    silent = [c.source for c in cells if shows(c.source) and not c.outputs]
    assert not silent, f"python tests/notebooks.py run {path.relative_to(ROOT)} --save"


@each_notebook
def test_no_path_of_the_machine_that_ran_it(path):
    shown = [str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs(path)]
    assert not re.findall(r"(?:/work|/root|/home|/Users|/tmp)/\S+", "\n".join(shown))


@each_notebook
def test_is_clean(path):
    "No execution counts and no editor's metadata, so that a change shows only what changed."
    nb = read(path)
    clean = deepcopy(nb)
    clean_nb(clean)
    assert clean == nb, f"nbdev_clean --fname {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "solutions"], ids=lambda p: p.stem)
def test_each_exercise_has_its_check(path):
    "The notebook of the same name calls every check that the solutions export, and its stubs are empty."
    checks = {name for cell in read(path).cells if "export" in directives(cell) for name in re.findall(r"^def (check_\w+)", cell.source, re.MULTILINE)}
    code = [c for c in read(path.parent.parent / path.name).cells if c.cell_type == "code"]
    called = {name: c for c in code for name in re.findall(r"(?m)^(check_\w+)\(", c.source) if name in checks}
    assert called.keys() == checks and checks
    assert not [name for name, c in called.items() if "not solved yet" not in str(c.outputs)]
