"""Every number in the pages' tables of results is what the committed CSVs say; links exist."""

import re
from pathlib import Path

import benchmark_circuits as benchmark
import pandas as pd
import pytest
from conftest import only, tiny
from scipy import stats

import quantum_diffusion_mnist as qd
import quantum_diffusion_pathmnist as pathmnist

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "result_gif" / "README.md"
PAGES = [README, RESULTS]
RESULT_FILES = RESULTS.parent / "results"


def table(page: Path, name: str) -> list[dict[str, str]]:
    """The rows below ``<!-- table: name -->``, without Markdown's marks."""
    text = page.read_text(encoding="utf-8").replace("`", "").replace("*", "")
    lines = re.search(rf"<!-- table: {name} -->\n((?:\|.*\n)+)", text)[1].splitlines()
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def assert_rounded(cell: str, value: float) -> None:
    """The cell is the value, rounded to the cell's decimals."""
    decimals = len(cell.partition(".")[2])
    assert abs(float(cell) - value) <= 0.5001 * 10.0**-decimals, (cell, value)


def test_the_words_on_one_model_for_ten_digits_are_the_csvs():
    single = measured("A").query("arm == 'classical' and seed == 100")["label_accuracy"]
    rows = pd.read_csv(RESULT_FILES / "mnist_conditional" / "comparison.csv")
    rows = rows[~rows["label"].isin(["mean", "all"])]
    classical, quantum = (
        rows.loc[rows["arm"] == arm, "label_accuracy"] for arm in ("classical", "quantum")
    )
    real = rows["floor_label_accuracy"]
    assert len(single) == len(classical) == len(quantum) == 10

    text = words_of(RESULTS)
    words = (
        r"as ([\d.]+) % of their .* seed 0\) it is ([\d.]+) % \(`classical`\) and "
        r"([\d.]+) % \(`quantum`\), of real images ([\d.]+) %"
    )
    shown = re.search(words, text).groups()
    for cell, column in zip(shown, (single, classical, quantum, real), strict=True):
        assert_rounded(cell, 100 * column.mean())


def test_counted_runs_are_those_measured():
    total = 0
    for row in table(RESULTS, "progress"):
        file = RESULT_FILES / "study" / f"{row['block']}.csv"
        made = 0
        if file.exists():
            made = pd.read_csv(file)["run"].str.partition(": ")[0].nunique()
        assert int(row["made"]) == made, row
        total += made
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"({total} of 310 planned runs are made)" in text


# ---------------------------------------------------- the study, recomputed from its measurements
# The differences of the page: arm and steps of a run and of its base.
DIGITS = {
    "quantum − classical": (("quantum", 1250), ("classical", 1250)),
    "quantum − matched": (("quantum", 1250), ("matched", 1250)),
    "classical − matched": (("classical", 1250), ("matched", 1250)),
}
TISSUE = {"quantum − matched, tissue": (("quantum", 5000), ("matched", 5000))}
FEW = {
    "quantum − matched, 25 images": (("quantum", 1250), ("matched", 1250)),
    "quantum − matched, 100 images": (("quantum", 1250), ("matched", 1250)),
}
SIZES = dict(zip(FEW, (25, 100), strict=True))  # training images; of all others the whole class
CONTROL = {"quantum 1150 steps − quantum": (("quantum", 1150), ("quantum", 1250))}
OTHERS = ["se", "product", "frozen", "published", "cz", "ising", "brickwork", "reupload"]
CIRCUITS = {
    f"{arm} − {base}": ((arm, 1250), (base, 1250))
    for base in ("matched", "classical")
    for arm in OTHERS
}
BESIDE_QUANTUM = {f"{arm} − quantum": ((arm, 1250), ("quantum", 1250)) for arm in OTHERS}
SEEDS_OF_CIRCUITS = 3  # whole ones
DIFFERENCES = DIGITS | TISSUE | FEW | CONTROL | CIRCUITS | BESIDE_QUANTUM

# The page's rows of answers.
ANSWERS = ["quantum − classical", "quantum − matched", *TISSUE, *FEW, "classical − matched"]

# The rows of the table of all measures, and the columns of the CSVs.
MEASURES = {
    "FID / real": "fid_ratio",
    "KID": "kid",
    "precision": "precision",
    "recall": "recall",
    "label accuracy": "label_accuracy",
    "near-copies": "near_copies",
}


def measured(*names: str) -> pd.DataFrame:
    """The rows of some of the study's tables, one for each run and class."""
    files = [RESULT_FILES / "study" / f"{name}.csv" for name in names]
    rows = pd.concat(pd.read_csv(file) for file in files)
    return rows[~rows["label"].isin(["mean", "all"])]


def pairs_of(rows: pd.DataFrame, difference: str) -> pd.DataFrame:
    """The pairs of a difference, both runs judged by the same classifier."""
    rows = rows[rows["n_train"].fillna(0) == SIZES.get(difference, 0)]
    both = []
    for arm, steps in DIFFERENCES[difference]:
        is_it = (rows["arm"] == arm) & (rows["steps"] == steps)
        both.append(rows[is_it].set_index(["label", "seed", "features"]))
    return both[0].merge(both[1], left_index=True, right_index=True, suffixes=("", "_base"))


def percent(pairs: pd.DataFrame) -> pd.Series:
    """The relative differences of FID."""
    return 200 * (pairs["fid"] - pairs["fid_base"]) / (pairs["fid"] + pairs["fid_base"])


def units_of(rows: pd.DataFrame, difference: str) -> pd.Series:
    """The independent relative differences: of a pair; of tissue, of a seed's nine classes."""
    values = percent(pairs_of(rows, difference))
    if difference in TISSUE:
        values = values.groupby("seed").mean()
    return values


def standard_error(values: pd.Series) -> float:
    return values.std() / len(values) ** 0.5


def assert_interval(cell: str, values: pd.Series) -> None:
    """The cell is Student's 95 % interval of the mean, "[-1.00, +1.00]"."""
    half = stats.t.ppf(0.975, len(values) - 1) * standard_error(values)
    low, high = cell.strip("[]").split(", ")
    assert_rounded(low, values.mean() - half)
    assert_rounded(high, values.mean() + half)


def p_different(values: pd.Series) -> float:
    """Two-sided: of a mean other than 0."""
    return 2 * stats.t.sf(abs(values.mean()) / standard_error(values), len(values) - 1)


def p_equivalent(values: pd.Series) -> float:
    """Of a mean within 4 %: the test against the nearer end of the margin."""
    return stats.t.sf((4 - abs(values.mean())) / standard_error(values), len(values) - 1)


def holm(p: dict[str, float], tests: int) -> dict[str, float]:
    """Adjusted p; tests that are planned and not made have p = 1."""
    adjusted = {}
    least = 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        least = max(least, min(1.0, (tests - rank) * p[name]))
        adjusted[name] = least
    return adjusted


@pytest.mark.parametrize(
    "name, tables, tested, tests",
    [
        ("answers", ["A", "C", "D"], ANSWERS, 6),
        ("control", ["A", "repeated", "B"], [*DIGITS, *CONTROL], 4),
        ("circuits", ["A", "E"], [*DIGITS, *CIRCUITS], 19),
    ],
)
def test_the_studys_tests_are_recomputed(name, tables, tested, tests):
    rows = measured(*tables)
    units = {difference: units_of(rows, difference) for difference in tested}
    different = holm({key: p_different(values) for key, values in units.items()}, tests)
    equivalent = holm({key: p_equivalent(values) for key, values in units.items()}, tests)

    page = table(RESULTS, name)
    shown = {"answers": ANSWERS, "control": [*CONTROL], "circuits": [*CIRCUITS][: len(OTHERS)]}
    planned = dict.fromkeys(DIGITS, 50) | dict.fromkeys(TISSUE, 5) | dict.fromkeys(FEW, 10)
    planned |= dict.fromkeys(CONTROL, 30) | dict.fromkeys(CIRCUITS, 2 * SEEDS_OF_CIRCUITS)
    assert [row["difference"] for row in page] == shown[name]
    for row in page:
        values = units[row["difference"]]
        assert len(values) == int(row["n"]) == planned[row["difference"]]
        assert_rounded(row["mean, %"], values.mean())
        assert_interval(row["95 % interval"], values)

        p = different[row["difference"]], equivalent[row["difference"]]
        assert (row["p, different"], row["p, equivalent"]) == (f"{p[0]:.2g}", f"{p[1]:.2g}")
        words = {
            (True, True): "different but within the margin",
            (True, False): "different",
            (False, True): "equivalent",
            (False, False): "undecided",
        }
        assert row["verdict"] == words[p[0] < 0.05, p[1] < 0.05]


def test_other_circuits_are_compared_with_quantum_too():
    """On the same pairs; the table has whole seeds alone, each with all eight arms."""
    rows = measured("A", "E")
    others = rows[rows["arm"].isin(OTHERS)]
    assert others["seed"].nunique() == SEEDS_OF_CIRCUITS
    assert len(others) == 8 * 2 * SEEDS_OF_CIRCUITS
    for row in table(RESULTS, "circuits"):
        arm = row["difference"].removesuffix(" − matched")
        values = percent(pairs_of(rows, f"{arm} − quantum"))
        assert len(values) == int(row["n"])
        mean, interval = row["minus quantum, %"].split(" ", 1)
        assert_rounded(mean, values.mean())
        assert_interval(interval, values)


def test_the_words_on_other_circuits_are_recomputed():
    page = table(RESULTS, "circuits")
    nearest = min(page, key=lambda row: float(row["p, different"]))
    assert nearest["difference"] == "se − matched"
    words = f"{float(nearest['mean, %']):+.1f} %, adjusted p = {nearest['p, different']}"
    assert words in words_of(README)
    assert words in words_of(RESULTS)
    assert {row["verdict"] for row in page} == {"undecided"}  # none is shown to differ

    rows = measured("A", "E")
    for arm in ("product", "frozen", "published"):
        values = percent(pairs_of(rows, f"{arm} − quantum"))
        half = stats.t.ppf(0.975, len(values) - 1) * standard_error(values)
        low = values.mean() - half
        high = values.mean() + half
        words = f": `{arm}` {values.mean():+.1f} % ({low:+.1f} to {high:+.1f} %)"
        assert words in words_of(RESULTS), words


@pytest.mark.parametrize(
    "name, block, differences, clear",
    [
        ("measures", "A", DIGITS, "Four of 18 leave 0 out"),
        ("tissue", "C", TISSUE, "None of 6 leaves 0 out"),
    ],
)
def test_the_studys_measures_are_means(name, block, differences, clear):
    """Over classes and five seeds; intervals over the seeds' means, as in comparison.md."""
    rows = measured(block)
    page = table(RESULTS, name)
    assert [row["measure"] for row in page] == [*MEASURES]
    found = 0
    for row in page:
        column = MEASURES[row["measure"]]
        # Tissue's labels of seed 100 were read by a classifier that is lost.
        same = rows[rows["seed"] > 100] if (block, column) == ("C", "label_accuracy") else rows
        for arm in {arm for pair in differences.values() for arm, _ in pair}:
            assert_rounded(row[arm], same.loc[same["arm"] == arm, column].mean())
        assert_rounded(row["real"], same[f"floor_{column}"].mean())
        for difference in differences:
            pairs = pairs_of(rows, difference)
            by_seed = (pairs[column] - pairs[f"{column}_base"]).groupby("seed").mean()
            mean, interval = row[difference].split(" ", 1)
            assert_rounded(mean, by_seed.mean())
            assert_interval(interval, by_seed)
            found += p_different(by_seed) < 0.05
    numbers = ["None", "One", "Two", "Three", "Four", "Five", "Six"]
    assert clear.startswith(f"{numbers[found]} of {len(page) * len(differences)}")
    assert clear in words_of(RESULTS)


def test_the_table_of_few_images_is_means():
    rows = measured("D")
    page = table(RESULTS, "few")
    assert [int(row["training images"]) for row in page] == 4 * [25] + 4 * [100]
    for row in page:
        some = rows[rows["n_train"] == int(row["training images"])]
        more = {"SSIM, nearest training image": "ssim_nearest"}
        column = (MEASURES | more)[row["measure"]]
        for arm in ("matched", "quantum"):
            assert_rounded(row[arm], some.loc[some["arm"] == arm, column].mean())
        assert_rounded(row["real"], some[f"floor_{column}"].mean())


def test_tissue_is_compared_with_the_same_real_images():
    rows = measured("C")
    assert len(pairs_of(rows, *TISSUE)) == 45
    assert rows["features"].nunique() == 1
    assert (rows.groupby("label")["n_real"].nunique() == 1).all()
    n_real = rows.groupby("label")["n_real"].first()
    text = words_of(RESULTS)
    assert f"{n_real.min()} to {n_real.max()} training images of each class, {n_real.sum()}" in text

    # Below the table: KID without background, FID / real of all classes together.
    others = rows[rows["label"] != "1"]
    kid = others.groupby("arm")["kid"].mean()
    real = others["floor_kid"].mean()
    assert f"without it {kid['matched']:.3f} and {kid['quantum']:.3f}, real {real:.3f}" in text
    together = pd.read_csv(RESULT_FILES / "study" / "C.csv").query("label == 'all'")
    ratios = together.groupby("arm")["fid_ratio"].mean()
    shown = f"it is {ratios['matched']:.2f} (`matched`) and {ratios['quantum']:.2f} (`quantum`)"
    assert shown in text


def test_the_judges_tables_are_recomputed():
    page = table(RESULTS, "judges")
    adjusted = []
    for row, name in zip(page, ("A", "judge1", "judge2"), strict=True):
        rows = measured(name).query("seed != 100")
        equivalent = p_equivalent(percent(pairs_of(rows, "quantum − classical")))
        adjusted.append(f"{6 * equivalent:.2g}")
        for difference in DIGITS:
            values = percent(pairs_of(rows, difference))
            assert len(values) == int(row["n"])
            mean, interval = row[difference].split(" ", 1)
            assert_rounded(mean, values.mean())
            assert_interval(interval, values)
    assert f"is {adjusted[1]} and {adjusted[2]} by these" in words_of(RESULTS)
    assert f"on the same pairs, {adjusted[0]})" in words_of(RESULTS)


def words_of(page: Path) -> str:
    """A page's text with single spaces and usual minus signs."""
    return " ".join(page.read_text(encoding="utf-8").replace("−", "-").split())


def p_of_columns(square: pd.DataFrame) -> float:
    """Two-way analysis of variance: the p of columns whose means do not differ."""
    rows = square.mean(axis=1)
    columns = square.mean()
    rest = square.sub(rows, axis=0) - columns + rows.mean()
    freedom = (len(rows) - 1) * (len(columns) - 1)
    ratio = len(rows) * columns.var() / ((rest**2).to_numpy().sum() / freedom)
    return stats.f.sf(ratio, len(columns) - 1, freedom)


def test_the_words_on_digits_and_seeds_are_recomputed():
    text = words_of(RESULTS)
    without_one = []
    p_of_seeds = []
    p_of_digits = []
    by_seed = {}
    for difference in DIGITS:
        values = percent(pairs_of(measured("A"), difference))
        square = values.droplevel("features").unstack("seed")  # digits x seeds
        by_seed[difference] = square.mean()
        p_of_seeds.append(f"{p_of_columns(square):.2f}")
        p_of_digits.append(f"{p_of_columns(square.T):.2f}")

        means = square.mean(axis=1)
        name = difference.replace(" − ", "` - `")
        assert f"{means.min():+.1f} and {means.max():+.1f} % (`{name}`)" in text
        rests = [square.drop(digit).stack().mean() for digit in square.index]
        without_one.append(f"{min(rests):+.1f} and {max(rests):+.1f}")

    assert f"stay between {', '.join(without_one)} %" in text
    assert f"p = {', '.join(p_of_seeds)}), nor do the digits' ({', '.join(p_of_digits)})" in text

    equivalent = holm({key: p_equivalent(means) for key, means in by_seed.items()}, 6)
    different = holm({key: p_different(means) for key, means in by_seed.items()}, 6)
    least = min(equivalent.values()), min(different.values())
    assert all(p > 0.05 for p in least)
    words = f'"equivalent" would be at least {least[0]:.2g}, that of "different" {least[1]:.2g}'
    assert words in text


def test_the_words_on_machines_are_recomputed():
    """The same runs on two kinds of machine."""
    text = words_of(RESULTS)
    pairs = percent(pairs_of(measured("A"), "quantum − matched"))
    first = measured("A").query("arm == 'quantum' and seed == 101").set_index("label")["fid_ratio"]
    again = measured("repeated").set_index("label")["fid_ratio"]
    change = (200 * (again - first) / (again + first)).dropna()
    assert len(change) == 7
    words = (
        f"{change.min():+.1f} to {change.max():+.1f} % (standard deviation {change.std():.1f} %; "
        f"the pairs of `quantum` - `matched`: {pairs.std():.1f} %)"
    )
    assert words in text


def test_readmes_table_is_that_of_the_answers():
    """Its rows in their order, means and intervals with one decimal; both arms copy few images."""
    endings = ["", "", "", ", but both copy the images", "; both copy the images", ""]
    for row, answer, ending in zip(
        table(README, "found"), table(RESULTS, "answers"), endings, strict=True
    ):
        low, high = map(float, answer["95 % interval"].strip("[]").split(", "))
        verdict = answer["verdict"].replace("equivalent", "equivalent within ±4 %")
        assert row["n"] == answer["n"]
        assert row["mean, %"].replace("−", "-") == f"{float(answer['mean, %']):+.1f}"
        assert row["95 % interval"].replace("−", "-") == f"{low:+.1f} to {high:+.1f}"
        assert row["verdict"] == verdict + ending


def test_the_words_of_both_pages_are_the_answers():
    """Means with one decimal, the p that is told, copies, and how good the images are."""
    outcome = words_of(RESULTS).partition("## The outcome")[2].partition("![")[0]
    found = words_of(README).partition("**What was found**")[2].partition("## Two commands")[0]
    answers = table(RESULTS, "answers")
    mean_of = {row["question"]: f"{float(row['mean, %']):+.1f} %" for row in answers}
    raw = p_different(percent(pairs_of(measured("A"), "quantum − matched")))
    copies = 100 * measured("D").groupby("n_train")["near_copies"].mean()
    assert copies.min() > 98  # README: both copy
    for phrase in (
        f"equivalent within ±4 %** ({mean_of['better than no gate?']}; the paper's two arms)",
        f"({mean_of['better than the cosine gate?']}, p = {raw:.1g}, adjusted for six questions "
        f"{answers[1]['p, different']}),",
        f"also on tissue ({mean_of['the same on tissue']}) and with 100 images "
        f"({mean_of['the same with 100 images']}).",
        f"the two are equivalent ({mean_of['the same with 25 images']}), which says little: "
        f"{copies[25]:.1f} % of what they",
        f"with 100 images {copies[100]:.1f} %.",
        f"(no gate - cosine gate: {mean_of['is no gate better than the cosine gate?']}, "
        f"{answers[5]['verdict']})",
    ):
        assert phrase in outcome, phrase

    ratios = measured("A").groupby("arm")["fid_ratio"].mean()
    assert f"on average {ratios.min():.2f} to {ratios.max():.2f} times those of real" in outcome
    assert f"average {ratios.min():.2f} to {ratios.max():.2f} times that of real images" in found


def test_the_words_on_gates_are_recomputed():
    rows = measured("gate_use")
    text = words_of(RESULTS)
    columns = ["fid_off", "fid_mean", "fid_other"]
    ratios = rows[columns].div(rows["fid"], axis=0).groupby(rows["arm"]).mean()
    counts = rows[columns].notna().groupby(rows["arm"]).sum()
    assert counts.loc["quantum"].tolist() == counts.loc["matched"].tolist() == [30, 10, 14]
    off, mean, other = (
        [f"{ratios.loc[arm, column]:.2f}" for arm in ("quantum", "matched")] for column in columns
    )
    assert f"to {off[0]} (`quantum`) and {off[1]} times (`matched`)" in text
    assert f"({mean[0]} and {mean[1]} times, ten models each)" in text
    assert f"gives {mean[0]} times the FID (ten models)" in words_of(README)
    assert f"({other[0]} and {other[1]} times on average, 14 models each; single" in text
    others = rows["fid_other"] / rows["fid"]
    assert f"single models {others.min():.1f} to {others.max():.1f})" in text

    means = rows["mean"].dropna().str.split(expand=True).astype(float)
    factor = 1 + means.groupby(rows["arm"]).mean()
    arms = ["quantum", "matched"]
    first = factor.iloc[:, 0].map("{:.2f}".format)
    last = factor.iloc[:, -1].map("{:.2f}".format)[arms]
    assert f"begins at {first['quantum']} (`quantum`) and {first['matched']} (`matched`)," in text
    assert f"on average over channels, and ends at {' and '.join(last)} (standard" in text
    bands = rows["over_channels"].dropna().str.split().str[-1].astype(float)
    bands = bands.groupby(rows["arm"]).mean()[arms].map("{:.2f}".format)
    assert f"(standard deviation over channels {' and '.join(bands)}): late in" in text

    circuits = rows[rows["arm"] == "quantum"]
    for column, form in (("units_start", "{:.3f}"), ("units", "{:.2f}")):
        last = circuits[column].str.split().str[-1].astype(float)
        words = form.format(last.mean())
        assert f"({words})" in text or f"(standard deviation {words})" in text


def test_ablations_are_means_over_digits_and_seeds():
    runs = pd.read_csv(RESULT_FILES / "ablations_six_runs.csv").set_index(["digit", "seed"])
    default = runs.loc[runs["variant"].str.startswith("as it was"), "fid"]
    rows = table(RESULTS, "ablations")
    assert len(rows) == 10
    for row in rows:
        variant = row["change"].removesuffix(" (taken)")
        difference = runs.loc[runs["variant"] == variant, "fid"] - default
        assert len(difference) == 6, row
        mean, error = row["FID"].split(" ± ")
        assert_rounded(mean, difference.mean())
        assert_rounded(error, difference.sem())


@pytest.mark.parametrize("page", PAGES, ids=["README", "results"])
def test_links_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert len(local) >= 3 and all((page.parent / target).exists() for target in local), local


def test_costs_are_those_of_the_benchmark():
    measured = pd.read_csv(ROOT / "result_gif/results/cost.csv", index_col="what")["value"]
    for row in table(README, "arms"):
        what = f"training step {row['--arm']} / classical"
        expected = "–"
        if row["--arm"] == "classical":
            expected = "1.00"
        elif what in measured.index:
            expected = f"{float(measured[what]):.2f}"
        assert row["step / classical"] == expected, row

    # In the text: milliseconds, and on how many threads.
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"{float(measured['training step classical']):.0f} ms on one thread of" in text
    assert f"{float(measured['training step quantum / classical']):.2f} times as long as" in text
    assert f"takes {float(measured['circuit quantum, exact']):.1f} ms exactly" in text
    shots = float(measured["training step quantum with 1,000 shots / classical"])
    assert f"takes {shots:.1f} times as long as that of `classical`" in text
    lightning, default = (
        float(measured[f"circuit quantum, {device}.qubit"]) for device in ("lightning", "default")
    )
    assert f"{lightning:.1f} s on `lightning.qubit`, {default:.0f} s on `default.qubit`" in text
    ratio = float(measured["circuit quantum, lightning.qubit / exact"])
    assert f"about {round(ratio, -1):.0f} times as long as here" in text
    with (ROOT / "result_gif/results/cost.csv").open() as file:
        assert ", 1 threads, " in file.read()


# ------------------------------------------------------------------------ what README promises


def python_of(page: Path) -> str:
    """The page's block of Python."""
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return block


def test_weights_of_the_arms_are_counted():
    rows = table(README, "arms")
    assert [row["--arm"] for row in rows] == list(qd.ARMS)
    for row in rows:
        gate = qd.make_gate(128, qd.Settings(row["--arm"], simulator="lightning.qubit"))
        trained = [p for p in gate.parameters() if p.requires_grad] if gate is not None else []
        count = int(row["weights"].split(",")[0] + row["weights"].partition(",")[2][:3])
        assert sum(p.numel() for p in trained) == count, row


def test_the_steps_of_the_benchmark_run(monkeypatch):
    """benchmark_circuits.py is no test, and would break unseen."""
    monkeypatch.setattr(benchmark, "BATCH", 2)
    benchmark.training_step("quantum", gate_noise=(0.001, 0.01))()
    benchmark.training_step("quantum", shots=10)()
    benchmark.training_step("classical", pathmnist)()
    benchmark.muon_step()()
    assert benchmark.sampling_step("quantum", 2)().shape == (2, 1, 28, 28)
    benchmark.circuit_call("quantum", "exact")()


def test_the_circuit_of_the_page_runs_exactly(monkeypatch):
    names = dict(vars(qd))
    exec(python_of(README), names)
    entry = re.search(r"`\"xy\": (Arm\(.*?\)),`", README.read_text(encoding="utf-8"))[1]
    monkeypatch.setitem(qd.ARMS, "xy", eval(entry, names))
    qd.check_circuit(qd.Settings("xy"))  # against PennyLane


@pytest.mark.usefixtures("quick_loss_curve")
def test_the_notebook_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    qd.main(tiny("runs", "--use_quantum", "--timesteps", "10"))
    only(tmp_path / "runs").rename(tmp_path / "runs" / "quantum_mnist3_nall_seed0")
    capsys.readouterr()

    names = {}
    exec(python_of(RESULTS), names)
    assert len(capsys.readouterr().out.splitlines()) == len(
        qd.GaussianDiffusion(10).sampling_levels(50)
    )
    assert names["images"].shape == names["without"].shape == (16, 1, 28, 28)
