"""Every number in the pages' tables of results is what the committed CSVs say; links exist."""

import re
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

ROOT = Path(__file__).parent.parent
README, RESULTS = PAGES = ROOT / "README.md", ROOT / "result_gif" / "README.md"
CELLS = {"scaling": 21 * 6, "four_arms": 8 * 6, "mnist": 20 * 8, "pathmnist": 6 * 6, "seeds": 8 * 6}
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def table(page: Path, name: str) -> list[dict[str, str]]:
    """The rows below ``<!-- table: name -->``, without Markdown's marks."""
    text = page.read_text(encoding="utf-8").replace("`", "").replace("*", "")
    lines = re.search(rf"<!-- table: {name} -->\n((?:\|.*\n)+)", text)[1].splitlines()
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def expected(arms: list[str], values: pd.Series) -> list[float]:
    """Of one arm (or real images) the mean; of two the mean difference and, from several seeds,
    the ends of its interval. values: by arm, class and seed."""
    if len(arms) < 2:
        return [values[arms[0]].mean() if arms else values.mean()]
    seeds = (values[arms[0]] - values[arms[1]]).groupby("seed").mean()
    half = stats.t.ppf(0.975, len(seeds) - 1) * seeds.sem()
    mean = seeds.mean()
    return [mean, mean - half, mean + half] if len(seeds) > 1 else [mean]


@pytest.mark.parametrize("study", CELLS)
def test_tables_are_the_csvs(study):
    runs = pd.read_csv(RESULTS.parent / "results" / study / "comparison.csv")
    cells = 0
    for row in table(RESULTS, study):
        size, label = row.pop("N", ".*").replace(",", ""), row.pop("class", "")
        here = runs[runs["run"].str.contains(f"(?:_|mnist){label or '.*'}_n{size}_")]
        metric, of = row.pop("metric", None), row.pop("arm", None)
        for heading, cell in row.items():
            name = re.sub("[ -]", "_", (metric or heading).lower().replace("real ", "floor_"))
            name = "floor_" + name if heading == "real" else name
            arms = [x for x in heading.split(",")[0].split(" − ") if x in {*runs["arm"]}]
            values = here.set_index(["arm", "label", "seed"])[name]
            found = NUMBER.findall(cell)
            for text, value in zip(found, expected(arms or [of][: bool(of)], values), strict=True):
                assert abs(float(text) - value) <= 0.5001 * 10.0 ** -len(text.split(".")[1]), row
            cells += 1
    assert cells == CELLS[study]


def test_readme_repeats_the_tables():
    full = {study: table(RESULTS, study) for study in ("scaling", "four_arms", "seeds")}
    for row in table(README, "summary"):
        size = (re.search(r"([\d,]+) images", row["data"]) or [None, None])[1]
        study = "seeds" if "seeds" in row["data"] else "scaling" if size else "four_arms"
        (there,) = [r for r in full[study] if (r["metric"], r.get("N")) == (row["metric"], size)]
        there = {key.split(",")[0]: NUMBER.findall(value) for key, value in there.items()}
        for key in [*row][2:]:
            assert NUMBER.findall(row[key]) == there[key.split(",")[0]], row


@pytest.mark.parametrize("page", PAGES, ids=["README", "results"])
def test_links_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert len(local) >= 3 and all((page.parent / target).exists() for target in local), local


def test_costs_are_those_of_the_benchmark():
    measured = pd.read_csv(ROOT / "result_gif/results/cost.csv", index_col="what")["value"]
    text = README.read_text(encoding="utf-8").split("<!-- table: cost -->")[1].split("\n\n")[0]
    shown = [line.split("|")[-2].strip() for line in text.splitlines()[3:]]
    names = ("training step quantum / classical", "training step matched / classical")
    names += ("layer lightning.qubit / exact", "layer default.qubit / exact")
    values = [float(measured[name]) for name in names]
    assert shown == [f"{value:.3f}" if value < 10 else f"{value:,.0f}" for value in values]
