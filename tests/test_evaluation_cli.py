"""The evaluation's command line on run folders that are written here: figures, tables, errors."""

import csv
import hashlib
import itertools
import json
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.models import inception_v3

import cal_fid_ssim as evaluation
from quantum_diffusion_mnist import load_images, random_stream, save_grid, select_images

TRAIN = load_images("digits", None, "train")[1:]
TEST = load_images("digits", None, "test")[1:]
N = 40


def make_run(root, images, arm="classical", label=3, n_train=None, seed=0, source="digits"):
    """A finished run folder with these images (N, 1, 28, 28)."""
    size = "all" if n_train is None else n_train
    folder = root / f"{arm}_{source}{label}_n{size}_seed{seed}"
    folder.mkdir(parents=True)
    training = select_images(*TRAIN, label, n_train, seed)
    settings = {"arm": arm, "data": source, "label": label, "n_train": n_train, "seed": seed}
    config = {
        "settings": settings,
        "images": {"sha256": hashlib.sha256(training.numpy().tobytes()).hexdigest()},
        "command": "quantum_diffusion_mnist.py --arm classical",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_grid(folder / "samples_final.png", images)
    return folder


def of_class(data, label):
    return data[0][data[1] == label]


def noisy(images, seed, deviation=40):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * deviation
    return (images + noise).clamp(0, 255).byte()


@pytest.fixture(scope="module", autouse=True)
def quick_classifier():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CLASSIFIER_STEPS", 120)
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
    noise = make_run(tmp_path, noisy(of_class(TRAIN, 3)[:N], 0, 90), "matched", n_train=50)
    copied, other, noised = evaluate(copies, others, noise)
    assert copied["metrics"]["near_copies"] == 1 and copied["metrics"]["distance_ratio"] == 0
    assert copied["metrics"]["ssim_nearest"] == pytest.approx(1)
    assert copied["metrics"]["label_accuracy"] > 0.9 > 0.1 > other["metrics"]["label_accuracy"]
    assert other["metrics"]["fid"] > 5 * other["floor"]["fid"]
    assert other["metrics"]["kid"] > 10 * other["metrics"]["kid_standard_error"]
    assert other["metrics"]["precision"] < 0.1 and other["metrics"]["near_copies"] == 0
    assert noised["metrics"]["distance_ratio"] > 1.5
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
    extractor = evaluation.classifier_extractor(model, "cpu")
    reference = of_class(TRAIN, 5)
    a, b = extractor(images), extractor(reference)
    figures = result["metrics"]
    assert result["n_generated"] == 25 and result["n_real"] == len(reference)
    assert result["classifier"] == record
    assert figures["fid"] == pytest.approx(evaluation.frechet_distance(a, b), rel=1e-4)
    assert figures["kid"] == pytest.approx(evaluation.kernel_distance(a, b)[0], rel=1e-4)
    chosen = torch.randperm(len(b), generator=random_stream(0, "evaluation", "equal"))[:25]
    expected = evaluation.precision_recall(b[chosen], a)
    assert (figures["precision"], figures["recall"]) == pytest.approx(expected)
    assert figures["fid_infinity"] is None  # 25 images, 64 features
    assert figures["label_accuracy"] == (evaluation.classify(model, images) == 5).double().mean()
    expected = evaluation.ssim_paired(images, reference[:25])
    assert figures["ssim_paired"] == pytest.approx(expected)
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
        compared.append((len(sample.images), len(reference.images)))
        return compare(self, sample, reference)

    monkeypatch.setattr(evaluation.Evaluator, "compare", spy)
    many = make_run(tmp_path / "b", of_class(TRAIN, 3)[:100])
    (result,) = evaluate(many)
    assert result["floor"]["n"] == len(of_class(TRAIN, 3)) // 2
    assert result["floor"]["from"] == "training split, set aside"
    total = len(of_class(TRAIN, 3))  # no image on both sides
    assert compared == [(100, total)] + [(total // 2, total - total // 2)] * evaluation.FLOOR_DRAWS
    assert f"floor at n = {result['floor']['n']}" in result["note"]


def test_flags_change_what_they_should(tmp_path, evaluate):
    run = make_run(tmp_path, noisy(of_class(TEST, 3), 2), n_train=25)
    (plain,) = evaluate(run)
    (everything,) = evaluate(run, "--reference", "all")
    assert everything["n_real"] == len(TRAIN[0]) and plain["n_real"] == len(of_class(TRAIN, 3))
    assert everything["metrics"]["fid"] > 2 * plain["metrics"]["fid"]
    (fewer,) = evaluate(run, "--n_real", 60)
    assert fewer["n_real"] == 60 and fewer["metrics"]["fid"] != plain["metrics"]["fid"]
    (other_seed,) = evaluate(run, "--n_real", 60, "--seed", 1)
    assert other_seed["features"] != plain["features"]
    assert other_seed["metrics"]["ssim_paired"] != fewer["metrics"]["ssim_paired"]
    (pixels,) = evaluate(run, "--features", "none")
    assert pixels["metrics"]["fid"] is None and pixels["features"] == "none"
    assert pixels["metrics"]["ssim_diversity"] == plain["metrics"]["ssim_diversity"]


def test_inception_through_the_command_line(tmp_path, evaluate, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(inception_v3(init_weights=False).state_dict(), tmp_path / "weights.pth")
    run = make_run(tmp_path, of_class(TEST, 3)[:3])
    options = ("--features", "inception", "--inception_weights", tmp_path / "weights.pth")
    (result,) = evaluate(run, *options, "--n_real", 6)
    assert result["features"].startswith("inception:") and result["metrics"]["fid"] > 0
    assert "resize_size=[342]" in result["preprocessing"]
    assert result["features"] in capsys.readouterr().out


# -------------------------------------------------------------------------------- several runs


@pytest.fixture(scope="module")
def compared(tmp_path_factory, evaluate):
    """Two arms, two sizes, three seeds; the second arm has more noise."""
    root = tmp_path_factory.mktemp("compared")
    runs = [
        make_run(root, noisy(of_class(TEST, 3)[:20], seed, 20 * k + 5), arm, 3, n_train, seed)
        for k, arm in enumerate(("matched", "quantum"))
        for n_train in (10, None)
        for seed in range(3)
    ]
    return evaluate(*runs, "--out", root / "out"), root / "out"


def test_comparison_files(compared):
    results, out = compared
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    assert [row["run"] for row in rows] == [r["run"] for r in results]
    for row, result in zip(rows, results, strict=True):
        assert float(row["fid"]) == pytest.approx(result["metrics"]["fid"])
        assert float(row["floor_fid"]) == pytest.approx(result["floor"]["fid"])
    text = (out / "comparison.md").read_text()
    values = [r["metrics"]["fid"] for r in results if "quantum" in r["run"] and "nall" in r["run"]]
    half = stats.t.ppf(0.975, 2) * stats.sem(values)
    assert f"{np.mean(values):.3g} ± {half:.3g}" in text
    assert "quantum − matched" in text and "too few seeds" in text and "| yes" not in text
    assert "Budget: steps" in text and "images 20." in text
    student = [line.split("|")[8].strip() for line in text.splitlines() if "quantum − mat" in line]
    student = [cell for cell in student if cell != "–"]
    left_out = sum(cell.endswith("*") for cell in student)
    assert 0 < left_out <= len(student)
    assert f"{left_out} of {len(student)} Student's t intervals leave zero out" in text
    assert (out / "samples.png").exists()
    for name in ("comparison.png", "scaling.png"):
        pixels = np.asarray(Image.open(out / name).convert("RGB")).reshape(-1, 3)
        assert (np.abs(pixels - np.array([0, 0x72, 0xB2])).max(axis=1) < 8).sum() > 100  # quantum


def fake_result(arm, label, seed, fid, n_train=None):
    settings = {"arm": arm, "label": label, "seed": seed, "n_train": n_train}
    figures = dict.fromkeys(evaluation.METRICS, float("nan")) | {"fid": fid}
    return {
        "settings": settings,
        "metrics": figures,
        "floor": figures | {"fid": label / 2 + 0.5},
        "n_training": n_train or 6000,
        "n_generated": 100,
    }


def test_seed_means_use_the_classes_that_all_runs_have():
    results = [fake_result("quantum", label, s, label + s) for label in (1, 3) for s in (0, 1)]
    results += [fake_result("matched", label, 0, 10 * label) for label in (1, 3, 5)]
    means = evaluation.seed_means(results, "fid")
    floor = {(evaluation.FLOOR, None): [1.5]}
    assert means == {("quantum", None): [2, 3], ("matched", None): [20], **floor}


def test_one_panel_a_metric_with_means_and_floor():
    results = [fake_result("quantum", 3, seed, fid) for seed, fid in enumerate((1.0, 2.0, 4.0))]
    for against_size in (False, True):
        (axes,) = evaluation.draw_panels(results, against_size).axes
        (bar,) = axes.containers
        assert axes.get_ylabel() == "FID"
        assert bar.lines[0].get_ydata() == pytest.approx([7 / 3])
        low, high = bar.lines[2][0].get_segments()[0][:, 1]
        assert (high - low) / 2 == pytest.approx(evaluation.interval([1.0, 2.0, 4.0])[1])


@pytest.mark.parametrize("against_size", [False, True])
def test_the_panel_below_shows_paired_differences_to_matched(against_size):
    """Two sizes, one of them without quantum; two metrics, the others are not finite."""
    base, differences, results = [10.0, 20.0, 40.0], [1.0, 2.0, 4.0], []
    for s, (value, d) in enumerate(zip(base, differences, strict=True)):
        results += [
            fake_result("matched", 3, s, value, 25),
            fake_result("matched", 3, s, value, 100),
        ]
        results.append(fake_result("quantum", 3, s, value + d, 100))
    for r in results:
        r["metrics"]["near_copies"] = -3 * r["metrics"]["fid"]
    (fid, copies, below, copies_below) = evaluation.draw_panels(results, against_size).axes
    assert [a.get_ylabel() for a in (fid, copies)] == ["FID", "near copies"]
    assert below.get_ylabel() == "FID\n− matched"
    for above, axes, factor in ((fid, below, 1), (copies, copies_below, -3)):
        assert [c.get_label() for c in above.containers] == ["matched", "quantum"]
        matched, quantum = (c.lines[0] for c in above.containers)
        assert len(matched.get_xdata()) == 2 and len(quantum.get_xdata()) == 1
        assert quantum.get_ydata() == pytest.approx([factor * (70 + 7) / 3])
        (bar,) = axes.containers
        assert bar.lines[0].get_ydata() == pytest.approx([factor * 7 / 3])
        assert bar.lines[0].get_xdata() == quantum.get_xdata()
        place, near = (100, 10) if against_size else (1, 0.4)
        assert abs(quantum.get_xdata()[0] - place) < near
        assert quantum.get_xdata()[0] > matched.get_xdata()[1]
        low, high = bar.lines[2][0].get_segments()[0][:, 1]
        assert (high - low) / 2 == pytest.approx(abs(factor) * evaluation.interval(differences)[1])
        assert axes.get_xlim() == above.get_xlim()
        assert axes.lines[-1].get_ydata() == [0, 0]


def test_samples_show_the_training_images_and_one_run_of_each_arm(tmp_path, data_dir):
    def images(value, n):
        return torch.full((n, 1, 28, 28), value, dtype=torch.uint8)

    def run(arm, label, seed, n_train, value, n=20):
        settings = {"arm": arm, "label": label, "seed": seed, "n_train": n_train}
        return evaluation.Run(tmp_path, settings, "", images(value, n))

    runs = [
        run("quantum", 3, 1, None, 10),
        run("quantum", 3, 0, 25, 20),
        run("quantum", 3, 0, None, 30),
    ]
    runs += [run("classical", 3, 0, 25, 40, n=5), run("quantum", 1, 0, None, 50)]
    evaluator = types.SimpleNamespace(dataset=evaluation.MNIST, train=TRAIN)
    axes = evaluation.draw_samples(runs, evaluator).axes
    assert [a.get_ylabel() for a in axes] == [
        "real 1, N = all, seed 0",
        "quantum, N = all, seed 0",
        "real 3, N = 25, seed 0",
        "classical, N = 25, seed 0",
        "quantum, N = 25, seed 0",
        "real 3, N = all, seed 0",
        "quantum, N = all, seed 0",
    ]
    pictures = [a.get_images()[0].get_array() for a in axes]
    assert {p.shape for p in pictures} == {(30, 360, 3)}
    assert [int(pictures[k][15, 15, 0]) for k in (1, 3, 4, 6)] == [50, 40, 20, 30]
    assert int(pictures[3][15, 135, 0]) == 40 and (pictures[3][:, 150:] == 255).all()
    for row, n_train in ((2, 25), (5, None)):
        first = select_images(*TRAIN, 3, n_train, 0)[0, 0]
        assert (pictures[row][1:29, 1:29, 0] == first.numpy()).all()


def test_two_runs_of_the_same_kind_are_refused(tmp_path, evaluate, capsys):
    runs = [make_run(tmp_path / name, of_class(TEST, 3)[:4]) for name in ("shots", "ideal")]
    with pytest.raises(SystemExit):
        evaluate(*runs)
    assert "have the same arm, class, size and seed" in capsys.readouterr().err


def test_interval_is_students():
    mean, half = evaluation.interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, np.mean([1, 2, 4]), stats.sem([1, 2, 4]))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert evaluation.interval([5.0])[0] == 5 and np.isnan(evaluation.interval([5.0])[1])


def test_paired_differences_match_equal_classes_sizes_and_seeds():
    results = [fake_result("matched", 3, s, 100 * s) for s in range(5)]
    results += [fake_result("quantum", 3, s, 100 * s - 2 - s / 10) for s in range(5)]
    results += [fake_result("quantum", 3, 9, 0), fake_result("quantum", 4, 0, 0)]  # no partner
    results += [fake_result("product", 3, s, 100 * s + (-1) ** s) for s in range(5)]
    results += [fake_result("frozen", 3, 0, 7.0)]
    rows = {row[0]: row for row in evaluation.paired_differences(results, "matched", 0)}
    name, size, metric, pairs, seeds, mean, bootstrap, student, clear = rows["quantum − matched"]
    assert (size, metric, pairs, seeds, clear) == ("all", "FID", "5", "5", "yes")
    assert float(mean) == pytest.approx(-2.2)
    low, high = map(float, bootstrap.strip("[] *").split(","))
    assert -2.36 < low < -2.2 < high < -2.04  # of the mean: narrower than the differences
    differences = [-2 - s / 10 for s in range(5)]
    expected = stats.t.interval(0.95, 4, np.mean(differences), stats.sem(differences))
    assert [*map(float, student.strip("[] *").split(","))] == pytest.approx(expected, abs=5e-3)
    assert rows["product − matched"][-1] == "no"
    assert rows["frozen − matched"][3:] == ["1", "1", "+7", "–", "–", "too few seeds"]


def test_a_difference_must_clear_zero_by_both_intervals():
    """Five differences whose resampled means never reach zero although Student's t does."""
    differences = [0.01, 0.02, 0.03, 0.04, 1.0]
    results = [fake_result("matched", 3, s, 5.0) for s in range(5)]
    results += [fake_result("quantum", 3, s, 5 + d) for s, d in enumerate(differences)]
    (row,) = evaluation.paired_differences(results, "matched", 0)
    assert row[6].endswith("*") and row[7].startswith("[-") and row[-1] == "no"


def test_few_pairs_have_no_bootstrap_and_few_seeds_decide_nothing():
    """Many classes of few seeds are many pairs, but decide nothing; equal figures have no t."""

    def rows(labels, seeds, step):
        results = [fake_result("matched", k, s, 10.0) for k in range(labels) for s in range(seeds)]
        for k, s in itertools.product(range(labels), range(seeds)):
            results.append(fake_result("quantum", k, s, 10 + step * (9 + k + s)))
        return evaluation.paired_differences(results, "matched", 0)

    ((*_, pairs, seeds, _, bootstrap, student, clear),) = rows(2, 2, 0.1)
    assert (pairs, seeds, bootstrap, clear) == ("4", "2", "–", "too few seeds")
    assert student.endswith("] *")
    ((*_, pairs, seeds, _, bootstrap, student, clear),) = rows(5, 4, 0.1)
    assert (pairs, seeds, clear) == ("20", "4", "too few seeds") and bootstrap.endswith("] *")
    assert rows(1, 5, 0.1)[0][-1] == "yes"
    assert rows(1, 5, 0)[0][7:] == ["–", "no"]


def test_pairs_have_equal_sizes_and_finite_figures():
    results = [fake_result("matched", 3, 0, 1.0, 10), fake_result("quantum", 3, 0, 2.0, 25)]
    results += [fake_result("matched", 3, 1, 4.0, 25), fake_result("quantum", 3, 1, 9.0, 25)]
    results += [fake_result("matched", 3, 2, float("nan"), 25), fake_result("quantum", 3, 2, 1, 25)]
    found = evaluation.pair_differences(results, "fid", "quantum", "matched", 25)
    assert found == {(3, 1): 5.0}
    assert evaluation.pair_differences(results, "fid", "quantum", "matched", 10) == {}


def test_the_report_says_in_what_the_runs_differ():
    results = [fake_result(arm, 3, 0, 1.0) for arm in ("matched", "quantum", "published")]
    common = {"steps": 2000, "batch_size": 16, "lr": 0.003, "ema_decay": 0.995, "n_qubits": 16}
    common |= {"n_layers": 3, "timesteps": 1000, "sample_steps": 50}
    for r in results:
        r["settings"] |= common
    expected = ", ".join(f"{name} {value}" for name, value in common.items())
    assert evaluation.budget_text(results) == f"{expected}, images 100."
    results[0]["settings"]["sample_steps"] = 1000
    results[1]["settings"]["shots"] = 500  # matched has no circuit, so only published differs
    text = evaluation.budget_text(results)
    assert "**sample_steps 1000 / 50 (not the same in all runs)**, images 100" in text
    assert text.endswith("**shots 500 / None (not the same in all runs)**.")
    results[2]["settings"]["shots"] = 500
    assert evaluation.budget_text(results).endswith("images 100, shots 500.")


# ------------------------------------------------------------------- the published procedure


def test_paper_protocol(tmp_path, evaluate, data_dir, capsys):
    """Five images against the first five of the training split, whatever their class."""
    images = of_class(TEST, 3)[:9]
    run = make_run(tmp_path, images)
    options = ("--protocol", "paper", "--features", "classifier", "--out", tmp_path / "out")
    evaluate(run, *options)
    record = json.loads((run / "metrics_paper.json").read_text())
    model, _ = evaluation.load_classifier("digits", data_dir / "evaluation", TRAIN, TEST, 0)
    extractor = evaluation.classifier_extractor(model, "cpu")
    expected = evaluation.frechet_distance(extractor(images[:5]), extractor(TRAIN[0][:5]))
    assert record["fid"]["run"] == pytest.approx(expected, rel=1e-4)
    paired = evaluation.ssim_paired(images[:5], TRAIN[0][:5])
    assert record["ssim_paired"]["run"] == pytest.approx(paired)
    assert record["draws"] == 100 and record["n_generated"] == 5
    generator = random_stream(0, "evaluation", "paper")  # real digits of the run's own class
    pool = of_class((TRAIN[0][5:], TRAIN[1][5:]), 3)
    pool = pool[torch.randperm(len(pool), generator=generator)[:200]]
    draws = [pool[torch.randperm(len(pool), generator=generator)[:5]] for _ in range(100)]
    real = np.mean([evaluation.ssim_paired(draw, TRAIN[0][:5]) for draw in draws])
    assert record["ssim_paired"]["real_mean"] == pytest.approx(real)
    low, high = record["fid"]["real_95"]
    assert low < record["fid"]["real_mean"] < high
    assert low < expected < high  # real held-out digits cannot be told from real ones
    printed = capsys.readouterr().out
    assert f"{expected:.2f}" in printed
    written = (tmp_path / "out" / "paper_protocol.md").read_text()
    assert written in printed and len([*(tmp_path / "out").iterdir()]) == 1
    cells = [[cell.strip() for cell in line.split("|")] for line in written.splitlines()]
    paper = {row[1].split()[1]: (row[5], row[8]) for row in cells if row[1].startswith("paper")}
    assert paper == {"classical": ("271.05", "0.1085"), "quantum": ("259.25", "0.1263")}


# ------------------------------------------------------------------------------------ mistakes


def unfinished(root):
    folder = make_run(root, of_class(TEST, 3)[:5])
    (folder / "samples_final.png").unlink()
    return [folder], "not finished"


def no_run(root):
    return [root], "not a run folder"


def damaged_config(root):
    folder = make_run(root, of_class(TEST, 3)[:5])
    (folder / "config.json").write_text("{")
    return [folder], "not a run's configuration"


def one_image(root):
    return [make_run(root, of_class(TEST, 3)[:1])], "at least 2"


def truncated(root):
    folder = make_run(root, of_class(TEST, 3)[:20])
    grid = folder / "samples_final.png"
    grid.write_bytes(grid.read_bytes()[:3000])
    return [folder], "not a readable picture"


def mixed(root):
    runs = [make_run(root, of_class(TEST, 3)[:5]), make_run(root, TEST[0][:5], source="mnist")]
    return runs, "mixed data sets"


def foreign(root):
    return [make_run(root, of_class(TEST, 3)[:5], source="pathmnist")], "cal_fid_ssim_medmnist.py"


def other_training_images(root):
    folder = make_run(root, of_class(TEST, 3)[:5])
    config = json.loads((folder / "config.json").read_text())
    config["images"]["sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    return [folder], "trained on other images"


def colour(root):
    images = torch.randint(0, 256, (5, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    return [make_run(root, images.byte())], r"images of \(3, 28, 28\)"


def large(root):
    return [make_run(root, torch.zeros(5, 1, 32, 32).byte())], r"images of \(1, 32, 32\)"


def no_weights(root):
    run = make_run(root, of_class(TEST, 3)[:5])
    options = ["--features", "inception", "--inception_weights", root / "none.pth"]
    return [run, *options], "--features classifier"


def paper_without_features(root):
    run = make_run(root, of_class(TEST, 3)[:5])
    return [run, "--protocol", "paper", "--features", "none"], "needs features"


def paper_with_three(root):
    run = make_run(root, of_class(TEST, 3)[:3])
    return [run, "--protocol", "paper", "--features", "classifier"], "expected \\(5, 1, 28, 28\\)"


def n_real(root):
    return [make_run(root, of_class(TEST, 3)[:5]), "--n_real", 1], "--n_real 1"


@pytest.mark.parametrize(
    "mistake",
    [unfinished, no_run, damaged_config, one_image, truncated, mixed, foreign, colour, large,
     other_training_images, no_weights, paper_without_features, paper_with_three, n_real],
)  # fmt: skip
def test_mistakes_print_one_line_and_exit_2(mistake, tmp_path, evaluate, capsys):
    arguments, message = mistake(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.split("\r")[-1].strip()  # behind a progress bar
    assert error.startswith("error: ") and "\n" not in error
    assert re.search(message, error), error


def test_class_without_enough_real_images(tmp_path, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)
    run = make_run(tmp_path, of_class(TEST, 3)[:5], n_train=2)
    keep = (TRAIN[1] != 3) | ((TRAIN[1] == 3).cumsum(0) <= 2)
    few = {"train": (TRAIN[0][keep], TRAIN[1][keep]), "test": TEST}
    dataset = evaluation.MNIST._replace(load_images=lambda data, _, split: (data, *few[split]))
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run), "--data_dir", str(tmp_path / "data")], dataset)
    assert stop.value.code == 2
    assert "2 real images" in capsys.readouterr().err


def test_data_dir_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)
    (tmp_path / "evaluation").write_text("in the way")
    run = make_run(tmp_path / "runs", of_class(TEST, 3)[:5])
    evaluation.main([str(run), "--data_dir", str(tmp_path)])
    assert "--data_dir is not writable" in capsys.readouterr().out
    assert (run / "metrics.json").exists()


# ----------------------------------------------------------------------------------- PathMNIST


def test_pathmnist(tmp_path, capsys):
    """The sibling command line: RGB runs against a medmnist file of tinted tiles."""
    pytest.importorskip("quantum_diffusion_pathmnist")
    import cal_fid_ssim_medmnist

    rng = np.random.default_rng(0)
    arrays = {}
    tint = rng.uniform(60, 200, (9, 1, 1, 3))
    for split, n in (("train", 90), ("val", 9), ("test", 45)):
        labels = np.arange(n) % 9
        images = tint[labels] + rng.normal(0, 15, (n, 28, 28, 3))
        arrays[f"{split}_images"] = images.clip(0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    np.savez(tmp_path / "pathmnist.npz", **arrays)
    from quantum_diffusion_pathmnist import load_images as load_tissue
    from quantum_diffusion_pathmnist import symmetries

    source, images, labels = load_tissue("pathmnist", tmp_path, "train")
    folder = make_run(tmp_path, images[labels == 8][:5], label=8, source="pathmnist")
    config = json.loads((folder / "config.json").read_text())
    training = images[labels == 8].numpy().tobytes()
    config["images"]["sha256"] = hashlib.sha256(training).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    cal_fid_ssim_medmnist.main([str(folder), "--data_dir", str(tmp_path)])
    result = json.loads((folder / "metrics.json").read_text())
    assert source == "pathmnist" and result["n_real"] == 10 and result["n_training"] == 10
    assert result["metrics"]["near_copies"] == 1
    assert result["metrics"]["label_accuracy"] > 0.9
    assert cal_fid_ssim_medmnist.PATHMNIST.withdrawn == {
        "classical": (95.72, 0.4107),
        "quantum": (84.40, 0.0931),
    }
    # A run with --augment: its training set are the symmetries of the square, and copies of a
    # turned training image are copies.
    turned = symmetries(images[labels == 8])
    config["images"] = {"sha256": hashlib.sha256(turned.numpy().tobytes()).hexdigest()}
    config["images"]["symmetries"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    save_grid(folder / "samples_final.png", images[labels == 8][:5].rot90(1, (2, 3)))
    cal_fid_ssim_medmnist.main([str(folder), "--data_dir", str(tmp_path)])
    result = json.loads((folder / "metrics.json").read_text())
    assert result["n_training"] == 80 and result["metrics"]["distance_ratio"] == 0
    assert "trained with augmentation" in result["note"]
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(folder), "--data_dir", str(tmp_path)])
    assert stop.value.code == 2 and "cal_fid_ssim_medmnist.py" in capsys.readouterr().err


def test_embedded_tissue(tmp_path, capsys):
    """One class: no classifier, and the error says what to do; pixels are measured all the same."""
    pytest.importorskip("quantum_diffusion_pathmnist")
    import cal_fid_ssim_medmnist

    _, images, labels = cal_fid_ssim_medmnist.load_images("tissue", tmp_path, "train")
    folder = make_run(tmp_path, images[:6], label=3, source="tissue")
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["label"] = int(labels[0])
    digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    config["images"]["sha256"] = digest
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        cal_fid_ssim_medmnist.main([str(folder), "--data_dir", str(tmp_path)])
    assert stop.value.code == 2 and "--features none" in capsys.readouterr().err
    cal_fid_ssim_medmnist.main([str(folder), "--data_dir", str(tmp_path), "--features", "none"])
    result = json.loads((folder / "metrics.json").read_text())
    assert "against embedded tissue" in result["note"] and "FID biased" not in result["note"]
    assert result["metrics"]["near_copies"] == 1 and result["metrics"]["label_accuracy"] is None
    assert result["metrics"]["ssim_paired"] == pytest.approx(1)  # the run repeats the first six
