"""The house rules as functions from a module's name and source to the faults in it."""

import ast
import sys
from collections.abc import Iterator

ORDER = (
    "errors",
    "config",
    "runtime",
    "sequence",
    "positions",
    "attention",
    "cache",
    "mixers",
    "model",
    "recurrence",
    "data",
    "model.tokenizer_export",  # an exported folder holds a model and its tokenizer
    "model.hf_save",
    "model.hf",
    "generate",
    "report.units",
    "report.terminal",  # how a step reads on a terminal; the trainer prints it
    "train.engine",  # what a checkpoint is made of
    "train.optimizer",
    "checkpoint",
    "train",
    "eval",
    "report",
    "demo",
    "bench",
    "cli",
    "__main__",
)
"""Rooms, and modules that stand apart from their room, from low to high. A lower one never imports a higher one."""

STRANGERS = {("data", "model"), ("data", "runtime"), ("report", "train"), ("report", "model")}
"""Rooms that do not know each other although their order would allow it."""

MAY_COMMUNICATE = ("runtime", "sequence.collectives", "train", "checkpoint", "eval", "bench")
MAX_LINES = 500

_UNSAFE_PACKAGES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
_UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
_UNSAFE_NAMES = {
    "torch.load", "torch.save", "torch.package", "torch.hub", "torch.jit.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader",
    "yaml.FullLoader", "os.system", "os.popen",
}  # fmt: skip
_OBJECT_COLLECTIVES = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip
_UNSAFE_ARGUMENTS = {"trust_remote_code", "allow_pickle", "shell"}
# mpi4py pickles in its lower-case methods and moves buffers in the capitalised ones.
_PICKLING_MPI = {
    "send", "recv", "isend", "irecv", "ssend", "bsend", "sendrecv", "bcast", "gather", "scatter", "allgather",
    "alltoall", "reduce", "allreduce", "scan", "exscan", "mprobe",
}  # fmt: skip


def place(module: str) -> str:
    """The entry of :data:`ORDER` that ``longctx.a.b`` belongs to.

    Raises:
        KeyError: the room is not in the order.
    """
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in ORDER:
            return name
    raise KeyError(f"{module} is in no room of ORDER; add the room")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)


def wrong_imports(module: str, source: str) -> list[str]:
    """Imports that climb the order, join strangers, or are relative."""
    faults, here = [], place(module)
    for line, name in imports(ast.parse(source)):
        if name.startswith("."):
            faults.append(f"{module}:{line} imports {name} relatively")
        if not name.startswith("longctx.") or name == "longctx.__version__":
            continue
        there = place(name)
        rooms = (here.split(".")[0], there.split(".")[0])
        if ORDER.index(there) > ORDER.index(here):
            faults.append(f"{module}:{line} imports {name}: {here} is below {there}")
        elif rooms in STRANGERS:
            faults.append(f"{module}:{line} imports {name}: {rooms[0]} must not know {rooms[1]}")
    return faults


def unsafe_code(module: str, source: str) -> list[str]:
    """Pickle, code execution and object collectives (law 10)."""
    tree = ast.parse(source)
    imported = {name for _, name in imports(tree)}
    faults = [f"imports {name}" for name in imported if name.split(".")[0] in _UNSAFE_PACKAGES]
    faults += [f"imports {name}" for name in imported if name in _UNSAFE_NAMES]
    uses_mpi = any(name.split(".")[0] == "mpi4py" for name in imported)
    for node in ast.walk(tree):
        faults += [f"line {getattr(node, 'lineno', 0)}: {what}" for what in _unsafe_node(node, uses_mpi)]
    return [f"{module}: {fault}" for fault in faults]


def _unsafe_node(node: ast.AST, uses_mpi: bool) -> Iterator[str]:
    if isinstance(node, ast.Name) and node.id in _UNSAFE_CALLS:
        yield f"uses {node.id}"
    if isinstance(node, ast.Attribute) and (ast.unparse(node) in _UNSAFE_NAMES or node.attr in _OBJECT_COLLECTIVES):
        yield f"uses {ast.unparse(node)}"
    if isinstance(node, ast.keyword) and node.arg in _UNSAFE_ARGUMENTS and ast.unparse(node.value) != "False":
        yield f"passes {node.arg}"
    if isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
        yield f"names {node.value}"
    called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
    if uses_mpi and called in _PICKLING_MPI:
        yield f"calls {called}, which pickles in mpi4py"


def communication(module: str, source: str) -> list[str]:
    """Uses of torch.distributed outside of the rooms that may communicate."""
    inner = module.removeprefix("longctx.")
    if any(inner == room or inner.startswith(f"{room}.") for room in MAY_COMMUNICATE):
        return []
    tree = ast.parse(source)
    lines = [line for line, name in imports(tree) if f"{name}.".startswith("torch.distributed.")]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    lines += [node.lineno for node in attributes if ast.unparse(node) == "torch.distributed"]
    return [f"{module}:{line} uses torch.distributed" for line in lines]


def heavy_imports(module: str, source: str) -> list[str]:
    """In config: any torch. In cli: anything at module level but the standard library and longctx itself."""
    tree = ast.parse(source)
    room = place(module)
    if room == "config":
        found = [
            (line, name) for line, name in imports(tree) if name.split(".")[0] in ("torch", "numpy", "transformers")
        ]
    elif room == "cli":
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        known = sys.stdlib_module_names | {"longctx"}
        found = [pair for node in top for pair in imports(node) if pair[1].split(".")[0] not in known]
    else:
        found = []
    return [f"{module}:{line} imports {name}" for line, name in found]
