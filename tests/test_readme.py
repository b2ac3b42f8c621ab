"""Every number in the README's tables of results is what the committed CSVs say; links exist."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parent.parent
README, RESULTS = PAGES = ROOT / "README.md", ROOT / "result_gif" / "README.md"
STUDIES = {"scaling": 21 * 6, "mnist": 8 * 6, "pathmnist": 6 * 6}  # cells
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def table(page: Path, name: str) -> list[dict[str, str]]:
    """The rows below ``<!-- table: name -->``, without Markdown's marks."""
    text = page.read_text(encoding="utf-8").replace("`", "").replace("*", "")
    lines = re.search(rf"<!-- table: {name} -->\n((?:\|.*\n)+)", text)[1].splitlines()
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows and all(len(row) == len(heads) for row in rows)
    return [dict(zip(heads, row, strict=True)) for row in rows]


def check(cell: str, expected: list[float]) -> None:
    """The cell's numbers are the expected ones at the precision that is printed."""
    numbers = NUMBER.findall(cell)
    assert len(numbers) == len(expected), cell
    for text, value in zip(numbers, expected, strict=True):
        assert abs(float(text) - value) <= 0.5001 * 10.0 ** -len(text.split(".")[1]), (cell, value)


def difference(arms: list[dict[tuple[str, str], float]]) -> list[float]:
    """Mean over seeds of the paired differences, classes averaged, and the ends of its interval."""
    first, second = arms
    assert first.keys() == second.keys()
    seeds = sorted({seed for _, seed in first})
    pairs = [np.mean([first[k] - second[k] for k in first if k[1] == seed]) for seed in seeds]
    mean = np.mean(pairs)
    if len(pairs) == 1:
        return [mean]
    half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)
    return [mean, mean - half, mean + half]


@pytest.mark.parametrize("study", STUDIES)
def test_tables_are_the_csvs(study):
    path = RESULTS.parent / "results" / study / "comparison.csv"
    with path.open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    cells = 0
    for row in table(RESULTS, study):
        size, label = row.pop("N", "").replace(",", ""), row.pop("class", "")
        here = [r for r in runs if r["n_train"] == size and f"_{label}" in r["run"]]
        metric, of = row.pop("metric", None), row.pop("arm", None)
        for heading, cell in row.items():
            name = re.sub("[ -]", "_", (metric or heading).lower().replace("real ", "floor_"))
            name = "floor_" + name if heading == "real" else name
            arms = [a for a in heading.split(",")[0].split(" − ") if a in {r["arm"] for r in here}]
            arms = arms or ([of] if of else sorted({r["arm"] for r in here}))
            values = [{(r["label"], r["seed"]): float(r[name]) for r in here if r["arm"] == a}
                      for a in arms]  # fmt: skip
            mean = [np.mean([v for arm in values for v in arm.values()])]
            check(cell, difference(values) if " − " in heading else mean)
            cells += 1
    assert cells == STUDIES[study]


def test_readme_is_short_and_repeats_the_tables():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 230 and len(text.encode()) <= 16 * 1024
    full = {study: table(RESULTS, study) for study in ("scaling", "mnist")}
    for row in table(README, "summary"):
        size = re.search(r"([\d,]+) images", row["data"])
        rows = [r for r in full["scaling" if size else "mnist"] if r["metric"] == row["metric"]]
        (there,) = [r for r in rows if not size or r["N"] == size[1]]
        for arm in ("matched", "quantum", "real"):
            assert row[arm] == there[arm]
        last = [[NUMBER.findall(v) for k, v in r.items() if " − " in k] for r in (row, there)]
        assert last[0] == last[1]


@pytest.mark.parametrize("page", PAGES, ids=["README", "results"])
def test_links_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert len(local) >= 3 and all((page.parent / target).exists() for target in local), local


def test_costs_are_those_of_the_benchmark():
    rows = csv.DictReader((ROOT / "result_gif/results/cost.csv").open())
    measured = {row["what"]: row["value"] for row in rows}
    text = README.read_text(encoding="utf-8").split("<!-- table: cost -->")[1].split("\n\n")[0]
    shown = [line.split("|")[-2].strip() for line in text.splitlines()[3:]]
    names = ("training step quantum / classical", "training step matched / classical")
    names += ("layer lightning.qubit / exact", "layer default.qubit / exact")
    values = [float(measured[name]) for name in names]
    assert shown == [f"{value:.3f}" if value < 10 else f"{value:,.0f}" for value in values]
