"""The evaluation's command line on run folders that are written here: figures, tables, errors."""

import hashlib
import io
import json
import re
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.models import inception_v3

import cal_fid_ssim as evaluation
import cal_fid_ssim_medmnist
import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist
from quantum_diffusion_mnist import load_images, random_stream, save_grid, select_images

TRAIN = load_images("digits", None, "train")[1:]
TEST = load_images("digits", None, "test")[1:]
N = 40
RESULTS = Path(__file__).parents[1] / "result_gif" / "results"
BUDGET = {"steps": 2000, "batch_size": 16, "lr": 0.003, "ema_decay": 0.995, "n_qubits": 16}
BUDGET |= {"n_layers": 3, "timesteps": 1000, "sample_steps": 50}


def make_run(
    root, images, arm="classical", label=3, n_train=None, seed=0, source="digits",
    condition="", training=None, images_of={}, **more,  # noqa: B006
):  # fmt: skip
    """A finished run folder with these images (N, C, 28, 28)."""
    folder = root / f"{arm}{condition}_{source}{label}_n{n_train or 'all'}_seed{seed}"
    folder.mkdir(parents=True)
    if training is None:
        training = select_images(*TRAIN, label, n_train, seed)
    digest = hashlib.sha256(training.contiguous().numpy().tobytes()).hexdigest()
    settings = {"arm": arm, "data": source, "label": label, "n_train": n_train, "seed": seed}
    config = {"settings": settings | BUDGET, "condition": condition, "weights": {}}
    config |= {"images": {"sha256": digest} | images_of, "n_eval": len(images)} | more
    (folder / "config.json").write_text(json.dumps(config))
    save_grid(folder / "samples_final.png", images)
    return folder


def of_class(data, label):
    return data[0][data[1] == label]


def noisy(images, seed, deviation=40):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * deviation
    return (images + noise).clamp(0, 255).byte()


def features_of(model, images):
    with torch.inference_mode():
        return model[:-1](mnist.to_float(images)).double().numpy()


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CLASSIFIER_STEPS", 120)
        patch.setattr(evaluation, "FLOOR_DRAWS", 2)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def evaluate(data_dir):
    """Runs the command line; returns the runs' metrics.json."""

    def call(*arguments):
        evaluation.main([*map(str, arguments), "--data_dir", str(data_dir)])
        folders = [a for a in arguments if hasattr(a, "is_dir") and (a / "metrics.json").exists()]
        return [json.loads((folder / "metrics.json").read_text()) for folder in folders]

    return call


# ------------------------------------------------------------------------------------ one run


def test_copies_strangers_and_real_images(tmp_path, evaluate, capsys):
    """What the figures are for: copies of the training set, digits of another class and noise are
    each told from real images."""
    copies = make_run(tmp_path, select_images(*TRAIN, 3, 50, 0)[:N], n_train=50)
    others = make_run(tmp_path, of_class(TRAIN, 7)[:N], "quantum", n_train=50)
    copied, other = evaluate(copies, others)
    assert copied["metrics"]["near_copies"] == 1 and copied["metrics"]["distance_ratio"] == 0
    assert copied["metrics"]["ssim_nearest"] == pytest.approx(1)
    assert copied["metrics"]["label_accuracy"] > 0.9 > 0.1 > other["metrics"]["label_accuracy"]
    assert other["metrics"]["fid"] > 5 * other["floor"]["fid"]
    assert other["metrics"]["kid"] > 10 * other["metrics"]["kid_standard_error"]
    assert other["metrics"]["precision"] < 0.1 and other["metrics"]["near_copies"] == 0
    assert 0.2 < copied["floor"]["ssim_nearest"] < 0.95
    table = capsys.readouterr().out
    for text in ("FID biased upwards: n < 1000", "against embedded digits", copied["run"]):
        assert text in table
    assert copied["features"] in table and "classifier:" in table
    assert Image.open(copies / "closest_pairs.png").size[0] > 800


def test_figures_are_those_of_the_functions(tmp_path, evaluate, data_dir):
    images = noisy(of_class(TEST, 5)[:25], 1)
    run = make_run(tmp_path, images, label=5)
    (result,) = evaluate(run)
    model, record = evaluation.load_classifier("digits", data_dir / "evaluation", TRAIN, TEST, 0)
    reference = of_class(TRAIN, 5)
    a, b = features_of(model, images), features_of(model, reference)
    scale = np.sqrt((features_of(model, TRAIN[0][:128]) ** 2).mean())
    assert scale == pytest.approx(1, abs=1e-4)  # KID's kernel expects features of about 1
    figures = result["metrics"]
    assert result["n_generated"] == 25 and result["n_real"] == len(reference)
    assert result["classifier"] == record and record["test_accuracy"] > 0.9
    kid = evaluation.kernel_distance(a, b)
    chosen = torch.randperm(len(b), generator=random_stream(0, "evaluation", "equal"))[:25]
    usual, _ = evaluation.nearest_images(of_class(TEST, 5), reference)
    distance, nearest = evaluation.nearest_images(images, reference)
    threshold = np.percentile(usual, 1)
    expected = {
        "fid": evaluation.frechet_distance(a, b),
        "kid": kid[0],
        "kid_standard_error": kid[1],
        "label_accuracy": evaluation.accuracy(model, images, 5),
        "ssim_paired": evaluation.ssim(images, reference),
        "near_copies": (distance <= threshold).mean(),
        "distance_ratio": np.median(distance) / np.median(usual),
        "ssim_nearest": evaluation.ssim(images, reference[nearest]),
    }
    expected |= zip(
        ("precision", "recall"), evaluation.precision_recall(b[chosen], a, 3), strict=True
    )
    for key, value in expected.items():
        assert figures[key] == pytest.approx(float(value), rel=1e-4), key
    assert figures["fid_infinity"] is None  # 25 images, 64 features
    assert result["near_copy_threshold"] == threshold
    assert result["floor"]["near_copies"] == (usual <= threshold).mean()
    again = json.loads((run / "metrics.json").read_text())
    assert evaluate(run) == [again]  # deterministic


def test_floor_is_what_held_out_images_score(tmp_path, evaluate, monkeypatch):
    """All held-out images as if generated: their FID is the floor's, as each of its draws is the
    whole test class; beyond the test split's size the training split is halved."""
    held_out = of_class(TEST, 3)
    run = make_run(tmp_path / "a", held_out)
    (result,) = evaluate(run)
    assert result["floor"]["from"] == "test split" and result["floor"]["n"] == len(held_out)
    for key in ("fid", "kid", "label_accuracy", "ssim_diversity"):
        assert result["metrics"][key] == pytest.approx(result["floor"][key], rel=1e-5), key
    compared, compare = [], evaluation.Evaluator.compare

    def spy(self, sample, reference):
        compared.append((len(sample[0]), len(reference[0])))
        return compare(self, sample, reference)

    monkeypatch.setattr(evaluation.Evaluator, "compare", spy)
    many = make_run(tmp_path / "b", of_class(TRAIN, 3)[:100])
    (result,) = evaluate(many)
    assert result["floor"]["n"] == len(of_class(TRAIN, 3)) // 2
    assert result["floor"]["from"] == "training split, set aside"
    total = len(of_class(TRAIN, 3))  # no image on both sides
    assert compared == [(100, total)] + [(total // 2, total - total // 2)] * evaluation.FLOOR_DRAWS
    assert f"floor at n = {result['floor']['n']}" in result["note"]


def test_flags_change_what_they_should(tmp_path, evaluate, monkeypatch):
    run = make_run(tmp_path, noisy(of_class(TEST, 3)[:20], 2), n_train=25)
    (plain,) = evaluate(run)
    (everything,) = evaluate(run, "--reference", "all", "--n_real", 200)
    assert everything["n_real"] == 200 and plain["n_real"] == len(of_class(TRAIN, 3))
    assert everything["metrics"]["fid"] > 2 * plain["metrics"]["fid"]
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 20)
    (other_seed,) = evaluate(run, "--n_real", 60, "--seed", 1)
    assert other_seed["n_real"] == 60 and other_seed["features"] != plain["features"]
    assert other_seed["metrics"]["ssim_paired"] != plain["metrics"]["ssim_paired"]
    (pixels,) = evaluate(run, "--features", "none")
    assert pixels["metrics"]["fid"] is None and pixels["features"] == "none"
    assert pixels["metrics"]["ssim_diversity"] == plain["metrics"]["ssim_diversity"]


def test_inception_through_the_command_line(tmp_path, evaluate, capsys, monkeypatch):
    """And a name that no table, figure or terminal can take as it is."""
    monkeypatch.setattr(evaluation, "FLOOR_DRAWS", 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(inception_v3(init_weights=False).state_dict(), tmp_path / "weights.pth")
    run = make_run(tmp_path, of_class(TEST, 3)[:3])
    run = run.rename(tmp_path / "a|b$x$\nc\udcff")
    options = ("--features", "inception", "--inception_weights", tmp_path / "weights.pth")
    (result,) = evaluate(run, *options, "--n_real", 4)
    assert result["features"].startswith("inception:") and result["metrics"]["fid"] > 0
    assert "resize_size=[342]" in result["preprocessing"]
    printed = capsys.readouterr().out
    assert result["features"] in printed and "| a¦b$x$ c? " in printed


# -------------------------------------------------------------------------------- several runs


@pytest.fixture(scope="module")
def compared(tmp_path_factory, evaluate):
    """Two arms, one of them under a condition too, two sizes, three seeds; the second arm has more
    noise, and more yet under its condition."""
    root = tmp_path_factory.mktemp("compared")
    arms = (("matched", ""), ("quantum", ""), ("quantum", "shots10"))
    runs = [
        make_run(root, noisy(of_class(TEST, 3)[:20], seed, 20 * k + 5), arm, 3, n_train, seed,
                 condition=condition)
        for k, (arm, condition) in enumerate(arms)
        for n_train in (10, None)
        for seed in range(2)
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "draw_closest_pairs", lambda *_: None)
        return evaluate(*runs, "--out", root / "out"), root / "out"


def tables(text):
    """The rows of every Markdown table as dictionaries of stripped cells, by their section."""
    found = {}
    for section in ("\n" + text).split("\n#"):
        lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line] for line in lines]
        title = section.splitlines()[0].strip("# ") if section.strip() else ""
        found[title] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    return found


def test_comparison_files(compared):
    results, out = compared
    frame = pd.read_csv(out / "comparison.csv")
    assert list(frame["run"]) == [r["run"] for r in results]
    for prefix, part in (("", "metrics"), ("floor_", "floor")):
        values = [r[part]["fid"] for r in results]
        assert frame[f"{prefix}fid"].tolist() == pytest.approx(values)
    text = (out / "comparison.md").read_text()
    found = tables(text)
    arms = {(row["N"], row["arm"]): row for row in found["Comparison of runs"]}
    assert [arm for size, arm in arms if size == "all"] == [
        "matched", "quantum", "quantum shots10", evaluation.FLOOR
    ]  # fmt: skip
    values = frame[frame["run"].str.match("quantum_.*nall")]["fid"]
    half = stats.t.ppf(0.975, 1) * stats.sem(values)
    assert arms["all", "quantum"]["FID"] == f"{values.mean():.3g} ± {half:.3g}"
    assert "Budget: steps 2000" in text and "images 20." in text
    rows = found["Paired differences against matched"]
    assert {row["difference"] for row in rows} == {
        "quantum − matched", "quantum shots10 − matched"
    }  # fmt: skip
    assert {row["clear of 0"] for row in rows} == {"too few seeds"}
    limits = [row["95 % interval"] for row in rows if row["95 % interval"] != "–"]
    outside = sum(cell.endswith("*") for cell in limits)
    assert 0 < outside <= len(limits)
    assert f"{outside} of {len(limits)} intervals (Student's t over seeds) leave zero out" in text
    twins = found["Paired differences against quantum"]
    assert {row["difference"] for row in twins} == {"quantum shots10 − quantum"}
    assert (out / "samples.png").exists()


def test_figures_of_a_comparison(compared):
    _, out = compared
    names = {"comparison.csv", "comparison.md", "comparison.png", "scaling.png", "samples.png"}
    assert {path.name for path in out.iterdir()} == names
    for name in ("comparison.png", "scaling.png"):
        colours = np.asarray(Image.open(out / name))[..., :3].reshape(-1, 3).astype(int)
        assert (np.abs(colours - (0, 0x72, 0xB2)).max(axis=1) < 8).sum() > 100  # quantum


@pytest.mark.parametrize("name", ["mnist", "scaling", "pathmnist"])
def test_committed_tables_are_those_of_the_committed_csv(name):
    frame = evaluation.read_comparison(RESULTS / name / "comparison.csv")
    expected = (RESULTS / name / "comparison.md").read_text()
    assert evaluation.comparison_text(frame) == expected


def fake(arm, label, seed, fid, n_train=None, condition="", **more):
    """One run's line of comparison.csv; what is not given could not be measured."""
    line = {"run": "run", "arm": arm, "condition": condition, "data": "digits", "label": label}
    line |= {"n_train": n_train, "seed": seed, **BUDGET, "features": "none", "reference": "class"}
    line |= {"n_generated": 100, "n_real": 6000, "n_training": n_train or 6000, "note": ""}
    metrics = dict.fromkeys([*evaluation.METRICS, "kid_standard_error"], float("nan"))
    floor = {f"floor_{key}": value for key, value in metrics.items()}
    floor |= {"floor_fid": label / 2 + 0.5, "floor_n": 100, "floor_from": "test split"}
    return line | metrics | {"fid": fid} | floor | more


def frame_of(runs):
    return evaluation.read_comparison(io.StringIO(pd.DataFrame(runs).to_csv(index=False)))


def differences(runs, baseline="matched"):
    """The rows of paired differences, by arm."""
    found = tables(evaluation.comparison_text(frame_of(runs)))
    rows = found.get(f"Paired differences against {baseline}", [])
    return {row["difference"].split(" − ")[0]: row for row in rows}


def test_means_use_the_classes_that_all_runs_have():
    runs = [fake("quantum", label, s, label + s) for label in (1, 3) for s in (0, 1)]
    runs += [fake("matched", label, 0, 10 * label) for label in (1, 3, 5)]
    rows = tables(evaluation.comparison_text(frame_of(runs)))["Comparison of runs"]
    half = stats.t.ppf(0.975, 1) * stats.sem([2, 3])
    expected = {"quantum": f"2.5 ± {half:.3g}", "matched": "20", evaluation.FLOOR: "1.5"}
    assert {row["arm"]: row["FID"] for row in rows} == expected
    assert {row["classes"] for row in rows} == {"1/3"}


def spread(labels, seeds, step):
    return {(k, s): step * (9 + 7 * k + s) for k in range(labels) for s in range(seeds)}


@pytest.mark.parametrize(
    "differs, pairs, clear",
    [
        (spread(1, 5, -0.1), "5", "yes"),
        ({(3, s): (-1) ** s for s in range(5)}, "5", "no"),
        (spread(2, 2, 0.1), "4", "too few seeds"),
        (spread(5, 4, 0.1), "20", "too few seeds"),  # classes of a seed share its randomness
        (spread(7, 1, 0.1), "7", "too few seeds"),
        (spread(1, 5, 0), "5", "no"),
        ({(3, 0): 7.0, (3, 1): float("nan")}, "1", "too few seeds"),
    ],
)
def test_intervals_are_students_t_over_the_seeds_of_pairs(differs, pairs, clear):
    """Pairs are of equal class, size and seed; classes are averaged first; what could not be
    measured is left out."""
    runs = [fake("matched", k, s, 100 * s + k) for k, s in differs]
    runs += [fake("quantum", k, s, 100 * s + k + d) for (k, s), d in differs.items()]
    runs += [fake("quantum", 3, 9, 0), fake("quantum", 8, 0, 0), fake("quantum", 3, 0, 0, 10)]
    row = differences(runs)["quantum"]
    values = pd.Series(differs).groupby(level=1).mean().dropna()
    found = [row[key] for key in ("N", "metric", "pairs", "seeds", "clear of 0")]
    assert found == ["all", "FID", pairs, str(len(values)), clear]
    assert float(row["mean"]) == pytest.approx(values.mean(), rel=5e-3)
    if len(values) == 1 or not values.any():
        assert row["95 % interval"] == "–"
        return
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    limits = [float(limit) for limit in row["95 % interval"].strip("[] *").split(",")]
    assert limits == pytest.approx([low, high], rel=5e-3)
    assert row["95 % interval"].endswith("*") == (low > 0 or high < 0)


def test_an_arm_under_a_condition_is_compared_with_its_ideal_twin():
    runs = []
    for s in range(5):
        runs += [fake("matched", 3, s, 1.0 + s), fake("quantum", 3, s, 3.0 + s)]
        runs += [fake("quantum", 3, s, 6.0 + s, condition="shots1000")]
        runs += [fake("published", 3, s, 2.0 + s)]
    means = {arm: row["mean"] for arm, row in differences(runs).items()}
    assert means == {"quantum": "+2", "quantum shots1000": "+5", "published": "+1"}
    (twin,) = differences(runs, "quantum").values()
    assert (twin["difference"], twin["mean"]) == ("quantum shots1000 − quantum", "+3")
    assert differences(runs, "published") == {}


def bar_of(axes):
    """Place, mean and half-width of the only error bar."""
    (bar,) = axes.containers
    low, high = bar.lines[2][0].get_segments()[0][:, 1]
    return bar.lines[0].get_xdata(), bar.lines[0].get_ydata(), (high - low) / 2


@pytest.mark.parametrize("against_size", [False, True])
def test_panels_show_means_and_below_them_paired_differences_to_matched(against_size):
    """Two sizes, one of them without quantum; two metrics, the others are not finite."""
    base, steps, runs = [10.0, 20.0, 40.0], [1.0, 2.0, 4.0], []
    half = stats.t.ppf(0.975, 2) * stats.sem(steps)
    for s, (value, d) in enumerate(zip(base, steps, strict=True)):
        runs += [fake("matched", 3, s, value, n, near_copies=-3 * value) for n in (25, 100)]
        runs += [fake("quantum", 3, s, value + d, 100, near_copies=-3 * (value + d))]
    fid, copies, below, copies_below = evaluation.draw_panels(frame_of(runs), against_size).axes
    assert [a.get_ylabel() for a in (fid, copies)] == ["FID", "near copies"]
    assert below.get_ylabel() == "FID\n− matched"
    for above, axes, factor in ((fid, below, 1), (copies, copies_below, -3)):
        assert [c.get_label() for c in above.containers] == ["matched", "quantum"]
        matched, quantum = (c.lines[0] for c in above.containers)
        assert len(matched.get_xdata()) == 2 and len(quantum.get_xdata()) == 1
        assert quantum.get_ydata() == pytest.approx([factor * (70 + 7) / 3])
        x, mean, width = bar_of(axes)
        assert mean == pytest.approx([factor * 7 / 3]) and x == quantum.get_xdata()
        assert width == pytest.approx(abs(factor) * half)
        place, near = (2, 0.1) if against_size else (1, 0.4)
        assert abs(x[0] - place) < near and x[0] > matched.get_xdata()[1]
        assert axes.get_xlim() == above.get_xlim()
        assert axes.lines[-1].get_ydata() == [0, 0]
    runs += [fake("quantum", 3, s, d, 100, "shots10") for s, d in enumerate(steps)]
    axes = evaluation.draw_panels(frame_of(runs), against_size).axes[0]
    labels = [container.get_label() for container in axes.containers]
    assert labels == ["matched", "quantum", "quantum shots10"]


def test_the_report_says_in_what_the_runs_differ():
    runs = [fake(arm, 3, 0, 1.0) for arm in ("matched", "quantum")]
    assert "sample_steps 50, images 100.\n" in evaluation.comparison_text(frame_of(runs))
    runs[0]["sample_steps"] = 1000
    text = evaluation.comparison_text(frame_of(runs))
    assert "**sample_steps 1000 / 50 (not the same in all runs)**, images 100." in text


def test_samples_show_the_training_images_and_one_run_of_each_arm(tmp_path):
    def run(arm, label, seed, n_train, value, n=20, condition=""):
        settings = {"arm": arm, "label": label, "seed": seed, "n_train": n_train}
        name = f"{arm} {condition}".strip()
        images = torch.full((n, 1, 28, 28), value, dtype=torch.uint8)
        return evaluation.Run(tmp_path, "run", name, condition, settings, {}, images)

    runs = [run("quantum", 3, 1, None, 10), run("quantum", 3, 0, None, 30)]
    runs += [run("quantum", 3, 0, None, 60, condition="shots10"), run("quantum", 1, 0, None, 50)]
    runs += [run("classical", 3, 0, 25, 40, n=5)]
    evaluator = types.SimpleNamespace(dataset=evaluation.MNIST, train=TRAIN)
    rows = {a.get_ylabel(): a.get_images()[0].get_array() for a in
            evaluation.draw_samples(runs, evaluator).axes}  # fmt: skip
    expected = {"1: quantum, N = all": 50, "3: classical, N = 25": 40, "3: quantum, N = all": 30}
    expected |= {"3: quantum shots10, N = all": 60}
    drawn = {title: int(pixels[15, 15]) for title, pixels in rows.items() if "real" not in title}
    assert drawn == {f"{title}, seed 0": level for title, level in expected.items()}
    assert [title for title in rows if "real" in title] == [
        f"real {of}, seed 0" for of in ("1, N = all", "3, N = 25", "3, N = all")
    ]
    five = rows["3: classical, N = 25, seed 0"]
    assert int(five[15, 135]) == 40 and (five[:, 152:] == 255).all() and five.shape == (32, 362)
    first = select_images(*TRAIN, 3, 25, 0)[0, 0].numpy()
    assert (rows["real 3, N = 25, seed 0"][2:30, 2:30] == first).all()


# ------------------------------------------------------------------- the published procedure


def test_paper_protocol(tmp_path, evaluate, data_dir, capsys):
    """Five images against the first five of the training split, whatever their class."""
    images = of_class(TEST, 3)[:9]
    run = make_run(tmp_path, images)
    options = ("--protocol", "paper", "--features", "classifier", "--out", tmp_path / "out")
    evaluate(run, *options)
    record = json.loads((run / "metrics_paper.json").read_text())
    model, _ = evaluation.load_classifier("digits", data_dir / "evaluation", TRAIN, TEST, 0)
    five = (features_of(model, x[:5]) for x in (images, TRAIN[0]))
    expected = evaluation.frechet_distance(*five)
    assert record["fid"]["run"] == pytest.approx(expected, rel=1e-4)
    paired = evaluation.ssim(images[:5], TRAIN[0][:5])
    assert record["ssim_paired"]["run"] == pytest.approx(paired)
    assert record["draws"] == 100 and record["n_generated"] == 5
    generator = random_stream(0, "evaluation", "paper")  # real digits of the run's own class
    pool = of_class((TRAIN[0][5:], TRAIN[1][5:]), 3)
    pool = pool[torch.randperm(len(pool), generator=generator)[:200]]
    draws = [pool[torch.randperm(len(pool), generator=generator)[:5]] for _ in range(100)]
    real = np.mean([evaluation.ssim(draw, TRAIN[0][:5]) for draw in draws])
    assert record["ssim_paired"]["real_mean"] == pytest.approx(real)
    low, high = record["fid"]["real_95"]
    assert low < expected < high  # real held-out digits cannot be told from real ones
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "paper_protocol.md").read_text()
    assert written in printed and len([*(tmp_path / "out").iterdir()]) == 1
    cells = [[cell.strip() for cell in line.split("|")] for line in written.splitlines()]
    paper = {row[1].split()[1]: (row[5], row[8]) for row in cells if row[1].startswith("paper")}
    assert paper == {"classical": ("271.05", "0.1085"), "quantum": ("259.25", "0.1263")}


# ------------------------------------------------------------------------------------ mistakes


def run_of(n, **more):
    return lambda root: [make_run(root, of_class(TEST, 3)[:n], **more)]


def spoilt(name, change):
    """A run of which one file is changed: bytes in, bytes (or None: no file) out."""

    def make(root):
        (folder,) = run_of(20)(root)
        data = change((folder / name).read_bytes())
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)
        return [folder]

    return make


def two_sources(root):
    return [make_run(root, of_class(TEST, 3)[:5]), make_run(root, TEST[0][:5], source="mnist")]


def twice(root):
    return [make_run(root / name, of_class(TEST, 3)[:4]) for name in "ab"]


NO_WEIGHTS = ("--features", "inception", "--inception_weights", "none.pth")
PAPER = ("--protocol", "paper", "--features")
COLOUR = torch.randint(0, 256, (5, 3, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
MISTAKES = {  # how the run folders are made, more options, what the error says
    "unfinished": (spoilt("samples_final.png", lambda _: None), (), "not finished"),
    "no run": (lambda root: [root], (), "config.json: not a run's configuration"),
    "config": (spoilt("config.json", lambda _: b"{"), (), "not a run's configuration"),
    "arm": (run_of(3, arm="best"), (), "config.json: not a run's configuration"),
    "half sampled": (run_of(5, n_eval=10), (), "5 images, expected n_eval = 10"),
    "out": (run_of(3), ("--out", __file__), "File exists"),
    "number": (run_of(3), ("--seed", "1e99"), "--seed"),
    "one image": (run_of(1), (), "at least 2"),
    "cut": (spoilt("samples_final.png", lambda x: x[:3000]), (), "not a readable picture"),
    "mixed": (two_sources, (), "mixed data sets"),
    "twice": (twice, (), "have the same arm, condition, class, size and seed"),
    "foreign": (run_of(5, source="pathmnist"), (), "cal_fid_ssim_medmnist.py"),
    "trained": (run_of(5, training=TRAIN[0][:9]), (), "trained on other images"),
    "colour": (lambda root: [make_run(root, COLOUR)], (), r"images of \(3, 28, 28\)"),
    "size": (lambda root: [make_run(root, COLOUR[:, :1, :20, :20])], (), r"of \(1, 20, 20\)"),
    "no weights": (run_of(5), NO_WEIGHTS, "--features classifier"),
    "paper, none": (run_of(5), (*PAPER, "none"), "needs features"),
    "paper, 3": (run_of(3), (*PAPER, "classifier"), r"expected \(5, 1, 28, 28\)"),
    "n_real": (run_of(5), ("--n_real", 1), "--n_real: 1, expected 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_print_one_line_and_exit_2(mistake, tmp_path, evaluate, capsys):
    make, options, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        evaluate(*make(tmp_path), *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err.split("\r")[-1].strip()  # behind a progress bar
    assert error.startswith("error: ") and "\n" not in error
    assert re.search(message, error), error


def test_class_without_enough_real_images(tmp_path, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)
    run = make_run(tmp_path, of_class(TEST, 3)[:5], n_train=2)
    keep = (TRAIN[1] != 3) | ((TRAIN[1] == 3).cumsum(0) <= 2)
    few = {"train": (TRAIN[0][keep], TRAIN[1][keep]), "test": TEST}
    monkeypatch.setattr(mnist, "load_images", lambda data, _, split: (data, *few[split]))
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run), "--data_dir", str(tmp_path / "data")])
    assert stop.value.code == 2
    assert "2 real images" in capsys.readouterr().err


def test_data_dir_that_cannot_be_written_then_ctrl_c(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)
    (tmp_path / "evaluation").write_text("in the way")
    run = make_run(tmp_path / "runs", of_class(TEST, 3)[:5])
    evaluation.main([str(run), "--data_dir", str(tmp_path)])
    assert "--data_dir is not writable" in capsys.readouterr().out
    assert (run / "metrics.json").exists()
    monkeypatch.setattr(evaluation, "read_run", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run)])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


# ----------------------------------------------------------------------------------- PathMNIST


def test_pathmnist(tmp_path, capsys, monkeypatch):
    """The sibling command line: RGB runs against a medmnist file of tinted tiles."""
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 40)
    rng = np.random.default_rng(0)
    arrays = {}
    tint = rng.uniform(60, 200, (9, 1, 1, 3))
    for split, n in (("train", 90), ("val", 9), ("test", 45)):
        labels = np.arange(n) % 9
        images = tint[labels] + rng.normal(0, 15, (n, 28, 28, 3))
        arrays[f"{split}_images"] = images.clip(0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    np.savez(tmp_path / "pathmnist.npz", **arrays)
    _, images, labels = pathmnist.load_images("pathmnist", tmp_path, "train")
    images = images[labels == 8]
    options = {"label": 8, "source": "pathmnist"}

    def measure(folder):
        cal_fid_ssim_medmnist.main([str(folder), "--data_dir", str(tmp_path)])
        return json.loads((folder / "metrics.json").read_text())

    result = measure(make_run(tmp_path, images[:5], training=images, **options))
    assert result["n_real"] == 10 and result["n_training"] == 10
    assert result["metrics"]["near_copies"] == 1
    assert result["metrics"]["label_accuracy"] > 0.9
    # A run with --augment: its training set are the symmetries of the square, and copies of a
    # turned training image are copies.
    eight, turned = pathmnist.symmetries(images), images[:5].rot90(1, (2, 3))
    folder = make_run(
        tmp_path / "b", turned, training=eight, images_of={"symmetries": 8}, **options
    )
    result = measure(folder)
    assert result["n_training"] == 80 and result["metrics"]["distance_ratio"] == 0
    assert "trained with augmentation" in result["note"]
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(folder), "--data_dir", str(tmp_path)])
    assert stop.value.code == 2 and "cal_fid_ssim_medmnist.py" in capsys.readouterr().err
    assert cal_fid_ssim_medmnist.PATHMNIST.withdrawn == {
        "classical": (95.72, 0.4107),
        "quantum": (84.40, 0.0931),
    }


def test_embedded_tissue(tmp_path, capsys):
    """One class: no classifier, and the error says what to do; pixels are measured all the same."""
    _, images, labels = pathmnist.load_images("tissue", tmp_path, "train")
    label = int(labels[0])
    folder = make_run(tmp_path, images[:6], label=label, source="tissue", training=images)
    arguments = [str(folder), "--data_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        cal_fid_ssim_medmnist.main(arguments)
    assert stop.value.code == 2 and "--features none" in capsys.readouterr().err
    cal_fid_ssim_medmnist.main([*arguments, "--features", "none"])
    result = json.loads((folder / "metrics.json").read_text())
    assert "against embedded tissue" in result["note"] and "FID biased" not in result["note"]
    assert result["metrics"]["near_copies"] == 1 and result["metrics"]["label_accuracy"] is None
    assert result["metrics"]["ssim_paired"] == pytest.approx(1)  # the run repeats the first six
