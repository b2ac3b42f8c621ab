"""The two training scripts repeat each other on purpose; this keeps the copies identical."""

import ast
import difflib
from pathlib import Path

ROOT = Path(__file__).parent.parent
MNIST = (ROOT / "quantum_diffusion_mnist.py").read_text()
PATHMNIST = (ROOT / "quantum_diffusion_pathmnist.py").read_text()

# What both have and must differ, each with its reason.
DIFFERENT = {
    "Expr": "the docstring",
    "Import": "of the data sets",
    "ImportFrom": "of the data sets",
    "CLASS_NAMES": "digits and tissues",
    "CLASS_IDS": "tissues have names and numbers",
    "CLASS_PREFIX": "mnist3, but pathmnist_stroma",
    "ALL_CLASSES": "ten digits, nine tissues",
    "DEFAULT_CLASS": "of each data set",
    "FOLD": "digits are folded, tissue is not",
    "WIDTHS": "tissue has a level of 28x28 pixels",
    "load_images": "the data set",
    "add_data_flags": "--digits, but --labels and --augment",
    "main": "--augment for tissue",
}

# What only one of them has.
ONLY_MNIST = {"read_mnist", "unpack"}
ONLY_PATHMNIST = {"PATHMNIST_CLASSES", "read_pathmnist", "symmetries", "Symmetries"}


def name_of(statement: ast.stmt) -> str:
    """What a statement defines, or its kind."""
    if isinstance(statement, ast.Assign):
        return statement.targets[0].id
    return getattr(statement, "name", type(statement).__name__)


def statements(source: str) -> dict[str, str]:
    """The text of every top-level statement with the comments before it, by its name."""
    lines = source.split("\n")
    found = {}
    end = 0
    for statement in ast.parse(source).body:
        name = name_of(statement)
        text = "\n".join(lines[end : statement.end_lineno]).strip()
        found[name] = f"{found[name]}\n{text}" if name in found else text
        end = statement.end_lineno
    return found


def test_shared_definitions_are_identical():
    ours = statements(MNIST)
    theirs = statements(PATHMNIST)
    assert ours.keys() - theirs.keys() == ONLY_MNIST
    assert theirs.keys() - ours.keys() == ONLY_PATHMNIST

    shared = ours.keys() & theirs.keys() - DIFFERENT.keys()
    assert len(shared) > 100
    for name in shared:
        difference = difflib.ndiff(ours[name].split("\n"), theirs[name].split("\n"))
        assert ours[name] == theirs[name], "\n".join(difference)


def test_the_exceptions_are_needed():
    ours = statements(MNIST)
    theirs = statements(PATHMNIST)
    assert not [name for name in DIFFERENT if ours[name] == theirs[name]]
