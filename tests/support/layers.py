"""Who may know whom: rooms of the package and of the engine, and the arrows between their files.

`python tests/support/layers.py` draws them.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "unicom_ext"
# A file of a room imports from its own room and from lower floors, the top one first.
FLOORS = (
    ("cli",),
    ("pipeline",),
    ("train",),
    ("interchange", "report"),
    ("encoders",),
    ("cluster", "retrieval", "checkpoint", "optim", "compat"),
    ("loss", "data"),
    ("ops", "distributed", "utils"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
COMPILED = {"_engine", "_C"}
IMPORT_COMPILED = {"unicom_ext/ops/library.py", "unicom_ext/cli/doctor.py"}

# What a folder of csrc/ may include, besides itself.
INCLUDES = {
    "core": (),
    "cpu/kernels": ("core",),
    "cpu/host": ("cpu/kernels", "core"),
    "cuda/kernels": ("core",),
    "cuda/host": ("cuda/kernels", "core"),
    "bind/ops": ("core",),
    "bind/cpu": ("bind/ops", "cpu/host", "core"),
    "bind/cuda": ("bind/ops", "cuda/host", "cuda/kernels", "core"),
    "bind": ("cpu/host", "cpu/kernels", "core"),  # interface.cpp: which kernels there are
}
FOLDERS = (  # by floors, as they are drawn
    ("bind/cpu", "bind/cuda"),
    ("bind", "bind/ops"),
    ("cpu/host", "cuda/host"),
    ("cpu/kernels", "cuda/kernels"),
    ("core",),
)
OF_THE_TESTS = {"cuda_emulation.h"}  # which stands in for cuda_runtime.h

Arrows = dict[str, set[str]]  # from each file to those that it names, all relative to the root


# ---- Python ----


def python_arrows(root: Path = ROOT) -> Arrows:
    """Imports of each file of the package: at its top, inside functions, for type checkers."""
    files = {_module(path.relative_to(root)): path for path in (root / PACKAGE).rglob("*.py")}
    arrows = {}
    for module, path in sorted(files.items()):
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = set()
        for name in _imported(ast.parse(path.read_text()), package):
            while name and name not in files and name.rpartition(".")[2] not in COMPILED:
                name = name.rpartition(".")[0]  # something in a module, not a module
            if name.partition(".")[0] == PACKAGE:
                found.add(_path(files.get(name), name, root))
        arrows[_path(path, module, root)] = found
    return arrows


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _path(path: Path | None, module: str, root: Path) -> str:
    """A compiled module has no file in the sources."""
    return str(path.relative_to(root)) if path else module.replace(".", "/")


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of all that is imported: of modules, and of things in modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join(
                [*above, *filter(None, [node.module])] if node.level else [node.module]
            )
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(path: str) -> str | None:
    """Room of a file of the package, None for those that stand at its root."""
    name = path.split("/")[1].removesuffix(".py")
    return name if name in FLOOR_OF else None


def python_faults(arrows: Mapping[str, set[str]]) -> list[str]:
    faults = []
    for path, targets in sorted(arrows.items()):
        room = room_of(path)
        if "/" in path.removeprefix(f"{PACKAGE}/") and room is None:
            faults.append(f"{path}: its folder is in no floor")
        for target in sorted(targets):
            if Path(target).stem in COMPILED:
                if path not in IMPORT_COMPILED:
                    faults.append(f"{path} -> {target}: only ops/library.py imports it")
            elif room is None:
                continue  # what stands at the root sees every room
            elif (there := room_of(target)) is None:
                faults.append(f"{path} -> {target}: public paths are for users")
            elif there != room and FLOOR_OF[there] <= FLOOR_OF[room]:
                faults.append(f"{path} -> {target}: runs up")
    return faults + circles(arrows)


def reexports_only(path: Path) -> bool:
    """Whether a file holds nothing but imports and names of what it imports."""
    return all(
        isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        for node in ast.parse(path.read_text()).body
    )


# ---- C++ ----


def engine_arrows(root: Path = ROOT) -> Arrows:
    """Includes of each file under csrc/ of files of ours; those of libraries as <name>."""
    source, arrows = root / "csrc", {}
    for path in sorted(source.rglob("*")):
        if path.suffix not in (".h", ".cuh", ".cpp", ".cu"):
            continue
        found = set()
        for name in re.findall(r'^\s*#\s*include\s+(<.+?>|".+?")', path.read_text(), re.MULTILINE):
            if name.startswith("<"):
                found.add(name)
            elif name.strip('"') not in OF_THE_TESTS:
                found.add(str((path.parent / name.strip('"')).resolve().relative_to(root)))
        arrows[str(path.relative_to(root))] = found
    return arrows


def folder_of(path: str) -> str:
    return str(Path(path).parent.relative_to("csrc"))


def engine_faults(arrows: Mapping[str, set[str]], root: Path = ROOT) -> list[str]:
    faults = []
    for path, targets in arrows.items():
        folder = folder_of(path)
        if folder not in INCLUDES:
            faults.append(f"{path}: its folder is in no layer")
            continue
        allowed = (folder, *INCLUDES[folder])
        for target in sorted(targets):
            if target.startswith("<"):
                if re.match(r"<(torch|ATen|c10)/", target) and not folder.startswith("bind"):
                    faults.append(f"{path} -> {target}: torch is for bind/")
            elif target not in arrows:
                faults.append(f"{path} -> {target}: is not there")
            elif folder_of(target) not in allowed:
                faults.append(f"{path} -> {target}: may include {', '.join(allowed)}")
            elif target.endswith(".cuh") and not path.endswith((".cu", ".cuh")):
                faults.append(f"{path} -> {target}: a device-only header")
        if path.endswith(".h") and path != "csrc/core/macros.h" and (
            found := re.search(DEVICE, re.sub(r"//.*", "", (root / path).read_text()))
        ):  # fmt: skip
            faults.append(f"{path}: {found[0]}, so its name must end in .cuh")
    return faults + circles(arrows)


LIBRARIES = r"<(torch|ATen|c10)/"
DEVICE = r"__(global|device|shared)__|\b(threadIdx|blockIdx)\b|__syncthreads|<cuda_(fp16|bf16)\.h>"


# ---- both ----


def circles(arrows: Mapping[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return ["a circle: " + " <- ".join(error.args[1])]
    return []


def between(arrows: Mapping[str, set[str]], room: Callable[[str], str | None]) -> Arrows:
    """The arrows between rooms, from those between files."""
    rooms: Arrows = {}
    for path, targets in arrows.items():
        if (here := room(path)) is not None:
            rooms.setdefault(here, set()).update(
                there
                for target in targets
                if not target.startswith("<") and (there := room(target)) not in (None, here)
            )
    return rooms


def picture() -> str:
    """The rooms of both, floor by floor, each with the rooms that it knows."""
    package = between(python_arrows(), room_of)
    engine = between(engine_arrows(), folder_of)
    lines = []
    for title, rooms, floors in (
        (f"{PACKAGE}/", package, FLOORS),
        ("csrc/", engine, FOLDERS),
    ):
        order = [room for floor in floors for room in floor]
        lines += ["", title]
        for floor in floors:
            lines.append("  " + "-" * 12)
            for room in floor:
                known = sorted(rooms.get(room, ()), key=order.index)
                lines.append(f"  {room:<12} -> {', '.join(known)}" if known else f"  {room}")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    print(picture())
