"""The two training scripts repeat each other on purpose; this keeps the copies identical."""

import difflib
import re
from pathlib import Path

SCRIPTS = ("quantum_diffusion_mnist.py", "quantum_diffusion_pathmnist.py")
SOURCES = [(Path(__file__).parent.parent / name).read_text() for name in SCRIPTS]

# What must differ, each with its reason.
DIFFERENT = {
    '"""Diffusion': "the docstring",
    "import": "of the data sets",
    "from": "of the data sets",
    "CLASS_NAMES": "digits and tissues",
    "CLASS_IDS": "tissues have names and numbers",
    "CLASS_PREFIX": "mnist3, but pathmnist_stroma",
    "DEFAULT_CLASS": "of each data set",
    "DATA_FLAGS": "--digits, but --labels and --augment",
    "load_images": "the data set",
    "main": "--augment for tissue",
}


def statements(source: str) -> dict[str, str]:
    """The text of every top-level statement with the comments after it, by its first name."""
    found = {}
    for text in re.split(r"\n(?=[\w@])", source):
        name = re.match(r"(?:def |class )?([^\w\s]*\w+)", text)[1]
        found[name] = found.get(name, "") + text.rstrip() + "\n"
    return found


def differences(left: str, right: str) -> list[str]:
    """For each statement that should be the same in both and is not, the diff."""
    a, b = statements(left), statements(right)
    pairs = [(a[k].split("\n"), b[k].split("\n")) for k in a.keys() & b.keys() - DIFFERENT.keys()]
    return ["\n".join(difflib.ndiff(*pair)) for pair in pairs if pair[0] != pair[1]]


def test_shared_definitions_are_identical_and_the_exceptions_are_needed():
    found, a, b = differences(*SOURCES), *map(statements, SOURCES)
    assert not found, "\n\n".join(found)
    assert not [name for name in DIFFERENT if a[name] == b[name]] and len(a.keys() & b.keys()) > 60
