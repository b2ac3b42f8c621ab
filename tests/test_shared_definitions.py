"""The two training scripts repeat each other on purpose; this keeps the copies identical."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("quantum_diffusion_mnist.py", "quantum_diffusion_pathmnist.py")

# The definitions that must differ, each with its reason.
DIFFERENT = {
    "CLASS_NAMES": "digits and tissues",
    "CLASS_IDS": "tissues have names and numbers",
    "CLASS_PREFIX": "mnist3, but pathmnist_stroma",
    "DEFAULT_CLASS": "of each data set",
    "DATA_FLAGS": "--digits, but --labels and --augment",
    "load_images": "the data set",
    "main": "--augment for tissue",
}


def definitions(source: str) -> dict[str, str]:
    """The text of every top-level function, class, constant and ``if``, with comments."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        first, names = node.lineno, [type(node).__name__]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
            first = min([first, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            targets = [part for target in node.targets for part in ast.walk(target)]
            names = {part.id for part in targets if isinstance(part, ast.Name)}
        elif not isinstance(node, ast.If):  # imports and the docstring
            continue
        for name in names:
            found[name] = "\n".join([found.get(name, ""), *lines[first - 1 : node.end_lineno]])
    return found


def differences(left: str, right: str) -> list[str]:
    """For each shared definition that is not the same in both, its name and the diff."""
    a, b = definitions(left), definitions(right)
    return [
        f"{name} differs:\n"
        + "\n".join(
            difflib.unified_diff(a[name].splitlines(), b[name].splitlines(), *SCRIPTS, lineterm="")
        )
        for name in a.keys() & b.keys() - DIFFERENT.keys()
        if a[name] != b[name]
    ]


@pytest.fixture(scope="module")
def sources():
    return [(ROOT / name).read_text() for name in SCRIPTS]


def test_shared_definitions_are_identical(sources):
    found = differences(*sources)
    assert not found, "\n\n".join(found)


def test_the_exceptions_are_needed(sources):
    a, b = map(definitions, sources)
    for name in DIFFERENT:
        assert a[name] != b[name], f"{name} is the same in both: take it off the list"
    assert len(a.keys() & b.keys()) > 40


@pytest.mark.parametrize("side", [0, 1])
def test_the_guard_sees_one_changed_line(sources, side):
    for line, name in [
        ("GIF_BYTES = 400_000", "GIF_BYTES"),
        ("        self.done += 1", "Trainer"),
        ('    """Sinusoidal embedding (Vaswani', "timestep_embedding"),
        ("@dataclass(frozen=True)", "Settings"),
        ("[[0, 1], [1, 3], [2, 1]] = 1, -1", "AXES"),
        ('if "OMP_WAIT_POLICY" not in os.environ:', "If"),
    ]:
        changed = list(sources)
        assert changed[side].count(line) == 1
        changed[side] = changed[side].replace(line, line + "  # changed")
        (message,) = differences(*changed)
        assert name in message.split(" differs")[0] and "# changed" in message


def test_neither_script_imports_the_other(sources):
    for source in sources:
        assert "import quantum_diffusion" not in source
        assert "from quantum_diffusion" not in source
