"""Every number in the pages' tables of results is what the committed CSVs say; links exist."""

import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import only, tiny
from scipy import stats

import quantum_diffusion_mnist as qd

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "result_gif" / "README.md"
PAGES = [README, RESULTS]
CELLS = {
    "scaling": 21 * 6,
    "four_arms": 8 * 6,
    "mnist": 20 * 8,
    "mnist_conditional": 11 * 4,
    "pathmnist": 20 * 7,
    "seeds": 8 * 6,
}
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def table(page: Path, name: str) -> list[dict[str, str]]:
    """The rows below ``<!-- table: name -->``, without Markdown's marks."""
    text = page.read_text(encoding="utf-8").replace("`", "").replace("*", "")
    lines = re.search(rf"<!-- table: {name} -->\n((?:\|.*\n)+)", text)[1].splitlines()
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def expected(arms: list[str], values: pd.Series) -> list[float]:
    """The numbers of a cell.

    Of one arm, or of none (real images), the mean; of two the mean difference and, from several
    seeds, the ends of its interval. values: by arm, class and seed.
    """
    if len(arms) == 0:
        return [values.mean()]
    if len(arms) == 1:
        return [values[arms[0]].mean()]

    first, second = arms
    by_seed = (values[first] - values[second]).groupby("seed").mean()
    mean = by_seed.mean()
    if len(by_seed) == 1:
        return [mean]
    half = stats.t.ppf(0.975, len(by_seed) - 1) * by_seed.sem()
    return [mean, mean - half, mean + half]


def column_of(words: str) -> str:
    """The column of comparison.csv that a heading stands for: "floor_fid" of "real FID"."""
    return re.sub("[ -]", "_", words.lower().replace("real ", "floor_"))


@pytest.mark.parametrize("study", CELLS)
def test_tables_are_the_csvs(study):
    runs = pd.read_csv(RESULTS.parent / "results" / study / "comparison.csv")
    cells = 0
    for row in table(RESULTS, study):
        # The runs that the row is about: of a size, of a class, of both or of all.
        size = row.pop("N", ".*").replace(",", "")
        label = row.pop("class", "")
        one_class = f"(?:_|mnist){label or '.*'}_n{size}_[^:]*$"
        here = runs[runs["run"].str.contains(f"{one_class}|: {label}$")]
        here = here.set_index(["arm", "label", "seed"])

        # Metric and arm stand in the row or in the heading.
        metric = row.pop("metric", None)
        arm_of_row = row.pop("arm", None)
        for heading, cell in row.items():
            column = column_of(metric or heading)
            if heading == "real":
                column = f"floor_{column}"
            words = heading.split(",")[0].split(" − ")
            arms = [word for word in words if word in set(runs["arm"])]
            if not arms and arm_of_row:
                arms = [arm_of_row]

            found = NUMBER.findall(cell)
            for text, value in zip(found, expected(arms, here[column]), strict=True):
                decimals = len(text.split(".")[1])
                assert abs(float(text) - value) <= 0.5001 * 10.0**-decimals, row
            cells += 1
    assert cells == CELLS[study]


def test_readme_repeats_the_tables():
    full = {study: table(RESULTS, study) for study in ("scaling", "four_arms", "seeds")}
    for row in table(README, "summary"):
        match = re.search(r"([\d,]+) images", row["data"])
        size = match[1] if match else None
        if "seeds" in row["data"]:
            study = "seeds"
        elif size is not None:
            study = "scaling"
        else:
            study = "four_arms"

        # The same numbers in the same columns.
        wanted = (row["metric"], size)
        (there,) = [other for other in full[study] if (other["metric"], other.get("N")) == wanted]
        numbers = {key.split(",")[0]: NUMBER.findall(cell) for key, cell in there.items()}
        _data, _metric, *columns = row
        for key in columns:
            assert NUMBER.findall(row[key]) == numbers[key.split(",")[0]], row


@pytest.mark.parametrize("page", PAGES, ids=["README", "results"])
def test_links_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert len(local) >= 3 and all((page.parent / target).exists() for target in local), local


def test_costs_are_those_of_the_benchmark():
    measured = pd.read_csv(ROOT / "result_gif/results/cost.csv", index_col="what")["value"]
    rows = table(README, "cost")
    assert [row["--arm"] for row in rows] == [arm for arm in qd.ARMS if arm != "classical"]
    for row in rows:
        arm = row["--arm"]
        columns = {
            "training step / classical": (f"training step {arm} / classical", "{:.2f}"),
            "circuit, exact, ms": (f"circuit {arm}, exact", "{:.1f}"),
            "circuit, lightning.qubit, s": (f"circuit {arm}, lightning.qubit", "{:.1f}"),
        }
        for heading, (name, form) in columns.items():
            is_measured = name in measured.index
            expected = form.format(float(measured[name])) if is_measured else "–"
            assert row[heading] == expected, (arm, heading)


# ------------------------------------------------------------------------ what README promises


def python_blocks():
    """The Python of README, block by block."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_weights_of_the_arms_are_counted():
    rows = table(README, "arms")
    assert [row["--arm"] for row in rows] == list(qd.ARMS)
    for row in rows:
        gate = qd.make_gate(128, qd.Settings(row["--arm"], simulator="lightning.qubit"))
        trained = [p for p in gate.parameters() if p.requires_grad] if gate is not None else []
        count = int(row["weights"].split(",")[0] + row["weights"].partition(",")[2][:3])
        assert sum(p.numel() for p in trained) == count, row


def test_the_circuit_of_the_page_runs_exactly(monkeypatch):
    names = dict(vars(qd))
    exec(python_blocks()[0], names)
    entry = re.search(r"`\"xy\": (Arm\(.*?\)),`", README.read_text(encoding="utf-8"))[1]
    monkeypatch.setitem(qd.ARMS, "xy", eval(entry, names))
    qd.check_circuit(qd.Settings("xy"))  # against PennyLane


@pytest.mark.usefixtures("quick_loss_curve")
def test_the_notebook_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    qd.main(tiny("runs", "--use_quantum", "--timesteps", "60"))
    only(tmp_path / "runs").rename(tmp_path / "runs" / "quantum_mnist3_nall_seed0")
    capsys.readouterr()

    names = {}
    exec(python_blocks()[1], names)
    assert len(capsys.readouterr().out.splitlines()) == len(
        qd.GaussianDiffusion(60).sampling_levels(50)
    )
    assert names["images"].shape == names["without"].shape == (16, 1, 28, 28)
