"""Run the notebooks, export the package from them, make README.md from the front page.

    python tests/notebooks.py run [NOTEBOOK ...] [--save]
    python tests/notebooks.py export
    python tests/notebooks.py readme
"""
import argparse, os, posixpath, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter
from nbdev.clean import clean_nb
from nbdev.process import extract_directives
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def find_notebooks(root: Path = ROOT) -> list[Path]:
    "List the notebooks of the course, as nbdev does: no checkpoints, no names that begin with _ or a dot."
    found = (root / "nbs").rglob("*.ipynb")
    return sorted(p for p in found if not any(part[0] in "._" for part in p.relative_to(root).parts))


def read(path: Path) -> nbformat.NotebookNode:
    "Read a notebook."
    return nbformat.read(path, as_version=4)


def directives(cell) -> dict[str, list[str]]:
    "Return a cell's nbdev directives: `#| eval: false` gives {'eval:': ['false']}."
    return extract_directives(cell, remove=False)


def is_run(cell) -> bool:
    "Say whether a cell holds code that is run."
    return cell.cell_type == "code" and bool(cell.source.strip()) and directives(cell).get("eval:") != ["false"]


def replace(path: Path, content: bytes):
    "Write a file whole or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file: file.write(content)
    try:
        os.chmod(file.name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(file.name, path)
    finally: Path(file.name).unlink(missing_ok=True)


def run(path: Path, save: bool = False, timeout: int = 900) -> int:
    "Run a notebook in a fresh kernel in its own folder, save its outputs if asked, and return how many cells were run."
    nb = read(path)
    for cell in nb.cells:
        if cell.cell_type == "code" and not is_run(cell): cell.metadata["tags"] = ["skip-execution"]
    env = os.environ | {
        "IN_TEST": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}
    client = NotebookClient(nb, kernel_name="python3", timeout=timeout, startup_timeout=300, resources={"metadata": {"path": str(path.parent)}},
                            store_widget_state=False, record_timing=False, coalesce_streams=True, extra_arguments=["--log-level=ERROR"])
    client.execute(env=env)
    ran = client.code_cells_executed
    if save:
        clean_nb(nb)
        nb.metadata = nbformat.from_dict({"kernelspec": KERNEL})
        replace(path, (nbformat.writes(nb).rstrip("\n") + "\n").encode())
    return ran


def exported(root: Path = ROOT) -> dict[str, bytes]:
    "Export the notebooks in a temporary folder, and return the generated modules: path in the package -> content."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for notebook in find_notebooks(root):
            target = copy / notebook.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(notebook, target)
        shutil.copy(root / "settings.ini", copy)
        subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=copy, env=env, check=True)
        package = copy / "sd_scratch"
        return {p.relative_to(package).as_posix(): p.read_bytes() for p in sorted(package.rglob("*.py"))}


def modules(root: Path = ROOT) -> dict[str, bytes]:
    "Return the modules that the package holds: path in the package -> content. All of them are generated."
    package = root / "sd_scratch"
    return {p.relative_to(package).as_posix(): p.read_bytes() for p in sorted(package.rglob("*.py"))}


def export():
    "Make the package's modules what the notebooks export: write what differs, delete what no notebook exports any more."
    new, old = exported(), modules()
    for name in old.keys() - new.keys(): (ROOT / "sd_scratch" / name).unlink()
    for name in sorted(new):
        if new[name] != old.get(name): replace(ROOT / "sd_scratch" / name, new[name])


def relink(markdown: str, base: str = "nbs") -> str:
    "Make links that are relative to the folder `base` relative to the project's root; code stays as it is."
    def link(match):
        code, start, target = match.groups()
        if code or re.match(r"[a-z]+:|#|/", target): return match[0]
        return start + posixpath.normpath(posixpath.join(base, target))
    return re.sub(r"(?s)(```.*?```|`[^`\n]+`)|(\]\(|(?:src|href)=\")([^)\s\"]+)", link, markdown)


def readme() -> tuple[str, dict[str, bytes]]:
    "Return the front page as Markdown, and the pictures of its outputs: path -> content."
    nb = read(ROOT / "nbs/index.ipynb")
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [cell for cell in nb.cells if "hide" not in directives(cell)]
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = relink(cell.source)
        else:
            if directives(cell).get("echo:") == ["false"]: cell.metadata.tags = ["output-only"]
            cell.source = re.sub(r"(?m)\A(#\|.*\n?)+", "", cell.source)
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=("output-only",)))
    text, resources = MarkdownExporter(config=config).from_notebook_node(
        nb, {"output_files_dir": "nbs/index_files", "unique_key": "index"})
    text = "<!-- Made from nbs/index.ipynb by `python tests/notebooks.py readme`: edit the notebook. -->\n\n" + text.strip() + "\n"
    return re.sub(r"\n{3,}", "\n\n", text), dict(resources.get("outputs") or {})


def write_readme():
    "Write README.md and the pictures it shows."
    text, pictures = readme()
    shutil.rmtree(ROOT / "nbs/index_files", ignore_errors=True)
    for name, content in pictures.items(): replace(ROOT / name, content)
    replace(ROOT / "README.md", text.encode())


def main(args=None) -> int:
    "Run the program; return its exit status."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run notebooks, each in a fresh kernel; all of them when none is named")
    runner.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    runner.add_argument("--save", action="store_true", help="save the outputs in the notebook, cleaned")
    runner.add_argument("--timeout", type=int, default=900, metavar="SECONDS", help="for one cell (default: %(default)s)")
    commands.add_parser("export", help="make the package's modules from the notebooks")
    commands.add_parser("readme", help="make README.md from nbs/index.ipynb")
    args = parser.parse_args(args)
    if args.command == "export": export()
    elif args.command == "readme": write_readme()
    else:
        notebooks, failed = args.notebooks or find_notebooks(), []
        if absent := [p for p in notebooks if not p.is_file()]: parser.error(f"no such notebook: {', '.join(map(str, absent))}")
        for path in notebooks:
            start = time.perf_counter()
            try: print(f"{path}: {run(path.resolve(), args.save, args.timeout)} cells, {time.perf_counter() - start:.0f} s", flush=True)
            except Exception as error:
                if not isinstance(error, CellExecutionError): error = f"{type(error).__name__}: {error}"
                print(re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip(), file=sys.stderr, flush=True)
                failed.append(path)
        if failed: print(f"failed: {', '.join(map(str, failed))}", flush=True)
        return bool(failed)
    return 0


if __name__ == "__main__": sys.exit(main())
