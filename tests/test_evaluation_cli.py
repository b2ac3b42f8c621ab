"""The evaluation's command line on run folders that are written here: figures, tables, errors."""

import hashlib
import io
import itertools
import json
import math
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_npz
from PIL import Image
from scipy import stats
from torchvision.models import inception_v3
from torchvision.transforms.functional import resize

import cal_fid_ssim as evaluation
import cal_fid_ssim_medmnist
import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist
from cal_fid_ssim import random_stream
from quantum_diffusion_mnist import load_images, save_grid, select_images

TRAIN = evaluation.Split(*load_images("digits", None, "train")[1:])
TEST = evaluation.Split(*load_images("digits", None, "test")[1:])
TRAINED_THREES = TRAIN.of_class(3)
THREES = TEST.of_class(3)
FLOOR = evaluation.FLOOR
RESULTS = Path(__file__).parents[1] / "result_gif" / "results"


# ------------------------------------------------------------------------- runs to be measured
def make_run(root, images, *, training=None, symmetries=None, **settings):
    """A finished run with these images (N, C, 28, 28), by default of digit 3: its folder.

    training: the images that it was trained on (default: those that its settings select).
    """
    arm = settings.pop("arm", "classical")  # may be one that the training script does not know
    classes = settings.pop("classes", (settings.pop("label", 3),))
    settings = mnist.Settings(**{"data": "digits", "classes": classes} | settings)
    if training is None:
        parts = [
            select_images(*TRAIN, label, settings.n_train, settings.seed)
            for label in settings.classes
        ]
        training = torch.cat(parts)
    trained_on = {"sha256": hashlib.sha256(training.numpy().tobytes()).hexdigest()}
    if symmetries is not None:
        trained_on["symmetries"] = symmetries

    folder = root / settings.name.replace("classical", arm, 1)
    folder.mkdir(parents=True)
    config = {
        "settings": asdict(settings) | {"arm": arm},
        "condition": settings.condition,
        "images": trained_on,
        "weights": {},
        "circuit": {},
        "model_sha256": None,
        "n_eval": len(images) // len(settings.classes),
    }
    (folder / "config.json").write_text(json.dumps(config))
    if len(images) > 0:
        save_grid(folder / "samples_final.png", images)
    return folder


def noisy(images, seed, deviation=40):
    """The images under noise of this deviation in 8-bit levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * deviation
    return (images + noise).clamp(0, 255).byte()


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Runs the command line; returns the runs' metrics.json."""
    data_dir = tmp_path_factory.mktemp("data")

    def call(*arguments, script=evaluation):
        script.main([*map(str, arguments), "--data_dir", str(data_dir)])
        folders = [argument for argument in arguments if isinstance(argument, Path)]
        files = [folder / "metrics.json" for folder in folders]
        return [json.loads(file.read_text()) for file in files if file.exists()]

    call.data_dir = data_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CLASSIFIER_STEPS", 60)
        patch.setattr(evaluation, "FLOOR_DRAWS", 2)
        yield call


@pytest.fixture(scope="module")
def classifier(evaluate):
    """The one that the command line uses, its record, and its features of images."""
    folder = evaluate.data_dir / "evaluation"
    model, record = evaluation.load_classifier("digits", folder, TRAIN, {"test": TEST}, seed=0)
    model.requires_grad_(False)
    return model, record, lambda images: model[:-1](mnist.to_float(images)).double().numpy()


@pytest.fixture
def draw_only(monkeypatch):
    """Draws no figures but those of these names: an empty file for each other, without a second.

    For tests that look at tables, or at which files there are.
    """
    save_figure = evaluation.save_figure

    def call(*names):
        def save(path, *arguments, **options):
            if path.name in names:
                save_figure(path, *arguments, **options)
            else:
                path.write_bytes(b"")

        monkeypatch.setattr(evaluation, "save_figure", save)

    return call


# ----------------------------------------------------------------------------------- one run
def test_figures_are_those_of_the_functions(tmp_path, evaluate, classifier, capsys):
    model, record, features_of = classifier
    images = noisy(TEST.of_class(5)[:25], seed=1)
    reference = TRAIN.of_class(5)
    run = make_run(tmp_path, images, label=5)
    (result,) = evaluate(run)

    printed = capsys.readouterr().out
    assert run.name in printed
    assert "upwards: n < 1000; against embedded digits" in printed
    assert Image.open(run / "closest_pairs.png").size[0] > 800

    # The features that KID expects, and a classifier that deserves the name.
    assert (features_of(TRAIN.images[:128]) ** 2).mean() == pytest.approx(1, abs=2e-4)
    assert result["classifier"] == record
    assert record["test_accuracy"] > 0.9

    # Copies: the threshold is what one in a hundred held-out images is below.
    training = select_images(*TRAIN, 5, None, 0)
    usual, _ = evaluation.nearest_images(TEST.of_class(5), training)
    distance, nearest = evaluation.nearest_images(images, training)
    threshold = np.percentile(usual, 1)

    a = features_of(images)
    b = features_of(reference)
    kid, kid_standard_error = evaluation.kernel_distance(a, b)
    chosen = torch.randperm(len(b), generator=random_stream(0, "evaluation", "equal"))[:25]
    precision, recall = evaluation.precision_recall(b[chosen], a, k=3)
    expected = {
        "fid": evaluation.frechet_distance(a, b),
        "kid": kid,
        "kid_standard_error": kid_standard_error,
        "precision": precision,
        "recall": recall,
        "label_accuracy": evaluation.accuracy(model, images, 5),
        "ssim_paired": evaluation.ssim(images, reference),
        "near_copies": (distance <= threshold).mean(),
        "distance_ratio": np.median(distance) / np.median(usual),
        "ssim_nearest": evaluation.ssim(images, training[nearest]),
    }
    measured = {key: result["metrics"][key] for key in expected}
    assert measured == pytest.approx(expected, rel=1e-4)
    assert result["metrics"]["fid_infinity"] is None  # 25 images, 64 features
    assert result["n_generated"] == 25
    assert result["n_real"] == result["floor"]["n_real"] == len(reference)
    assert result["near_copy_threshold"] == threshold
    assert result["floor"]["near_copies"] == (usual <= threshold).mean()


def test_a_flag_changes_what_it_should(tmp_path, evaluate, draw_only):
    draw_only()
    run = make_run(tmp_path, noisy(TEST.of_class(5)[:25], seed=1), label=5)
    (result,) = evaluate(run)
    assert evaluate(run) == [result]  # deterministic

    (of_all,) = evaluate(run, "--reference", "all", "--n_real", 200)
    assert of_all["n_real"] == 200
    assert of_all["metrics"]["fid"] > 2 * result["metrics"]["fid"]

    (pixels,) = evaluate(run, "--features", "none")
    assert pixels["features"] == "none"
    assert pixels["metrics"]["fid"] is None
    assert pixels["metrics"]["ssim_paired"] == result["metrics"]["ssim_paired"]


def test_floor_is_what_held_out_images_score(tmp_path, evaluate, draw_only):
    """All held-out images as if generated: each of the floor's draws is the whole test class."""
    draw_only()
    (result,) = evaluate(make_run(tmp_path, THREES))
    floor = result["floor"]
    assert floor["from"] == "test split"
    assert floor["n"] == len(THREES)
    for key in ("fid", "kid", "label_accuracy", "ssim_diversity"):
        assert result["metrics"][key] == pytest.approx(floor[key], rel=1e-5), key


def test_floor_beyond_the_held_out_images_halves_the_training_split(
    tmp_path, evaluate, monkeypatch
):
    """No image is on both sides."""
    sizes = []
    compare = evaluation.Evaluator.compare

    def spy(self, sample, reference):
        sizes.append((len(sample.images), len(reference.images)))
        return compare(self, sample, reference)

    monkeypatch.setattr(evaluation.Evaluator, "compare", spy)
    (result,) = evaluate(make_run(tmp_path, TRAINED_THREES[:100]))
    total = len(TRAINED_THREES)
    half = total // 2
    assert sizes == [(100, total), (half, total - half), (half, total - half)]
    assert result["floor"]["from"] == "training split, set aside"
    assert result["floor"]["n"] == half
    assert result["floor"]["n_real"] == total - half
    assert f"floor at n = {half}" in result["note"]

    # As many as were generated, but beside fewer real images than the run is: the table says so.
    (result,) = evaluate(make_run(tmp_path / "b", TRAINED_THREES[:60]))
    assert (result["floor"]["n"], result["floor"]["n_real"]) == (60, total - 60)
    assert "; FID / real measured against the floor's real images;" in result["note"]
    (row,) = tables("# a\n" + evaluation.result_table(frame_of([result])))["a"][1:]
    assert (row["n"], row["n real"]) == ("60", str(total - 60))

    # A table of an earlier version, without that column: it can be told.
    older = pd.read_csv(io.StringIO(evaluation.comparison_csv([result])))
    older = older.drop(columns="floor_n_real").to_csv(index=False)
    assert evaluation.read_comparison(io.StringIO(older))["floor_n_real"].tolist() == [total - 60]


def test_inception_through_the_command_line(tmp_path, evaluate, capsys, monkeypatch):
    """FID of torchvision's own model and preprocessing put together by hand."""
    monkeypatch.setattr(evaluation, "FLOOR_DRAWS", 1)
    model = inception_v3(init_weights=False, transform_input=True).eval()
    weights = tmp_path / "weights.pth"
    torch.save(model.state_dict(), weights)  # with the auxiliary head
    run = make_run(tmp_path, THREES[:2])
    options = ("--features", "inception", "--inception_weights", weights)
    (result,) = evaluate(run, *options, "--n_real", 4)
    assert " inception:" in capsys.readouterr().out

    # Resized to 342, the middle 299 of it, ImageNet's mean and deviation.
    order = torch.randperm(
        len(TRAINED_THREES), generator=random_stream(0, "evaluation", "reference")
    )
    real = TRAINED_THREES[order[:4]]
    pixels = torch.cat([THREES[:2], real]).expand(-1, 3, -1, -1) / 255
    pixels = resize(pixels, 342, antialias=True)[..., 21:320, 21:320]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    model.fc = torch.nn.Identity()
    with torch.inference_mode():
        features = model((pixels - mean) / deviation).numpy()
    expected = evaluation.frechet_distance(features[:2], features[2:])
    assert result["metrics"]["fid"] == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------ tables and figures
def tables(text):
    """The rows of every Markdown table as dictionaries of stripped cells, by their section."""
    by_section = {}
    for section in text.split("# ")[1:]:
        title, *lines = section.splitlines()
        rows = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
        rows = [[cell.strip() for cell in row] for row in rows]
        header, _rule, *rows = rows or [[], []]
        by_section[title] = [dict(zip(header, row, strict=True)) for row in rows]
    return by_section


def test_comparison_files(tmp_path, evaluate, draw_only):
    """Two arms, one of them under a condition too and with more noise yet; two sizes, two seeds."""
    pictures = {"comparison.png", "scaling.png", "overview.png", "forest.png"}
    draw_only(*pictures)
    conditions = {"matched": (None, 5), "quantum": (None, 25), "quantum shots10": (10, 45)}
    runs = []
    for (name, (shots, noise)), n_train, seed in itertools.product(
        conditions.items(), (10, None), (1, 0)
    ):
        images = noisy(THREES[:9], seed, noise)
        settings = {"arm": name.split()[0], "n_train": n_train, "seed": seed, "shots": shots}
        runs.append(make_run(tmp_path, images, **settings))
    out = tmp_path / "out"
    results = evaluate(*runs, "--out", out)
    assert {path.name for path in out.glob("*.png")} == pictures
    for name in pictures:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100

    frame = pd.read_csv(out / "comparison.csv")
    assert list(frame["run"]) == [run.name for run in runs]
    for column, part in (("fid", "metrics"), ("floor_fid", "floor")):
        expected = [result[part]["fid"] for result in results]
        assert frame[column].tolist() == pytest.approx(expected)

    text = (out / "comparison.md").read_text()
    sections = tables(text)
    rows = {row["arm"]: row for row in sections["Comparison of runs"] if row["N"] == "all"}
    assert list(rows) == [*conditions, evaluation.FLOOR]
    values = frame[frame["run"].str.fullmatch("quantum_.*nall_seed.")]["fid"]
    half = stats.t.ppf(0.975, 1) * stats.sem(values)
    shown = [float(number) for number in rows["quantum"]["FID"].split(" ± ")]
    assert shown == pytest.approx([values.mean(), half], rel=6e-3)

    rows = sections["Paired differences against matched"]
    compared = {row["difference"] for row in rows}
    assert compared == {"quantum − matched", "quantum shots10 − matched"}
    limits = [row["95 % interval"] for row in rows]
    outside = sum(text.endswith("*") for text in limits)
    intervals = sum(text.startswith("[") for text in limits)
    assert 0 < outside < intervals
    assert f"{outside} of {intervals} intervals (Student's t over seeds) leave zero out" in text


def test_overview_shows_the_lowest_seeds_images(tmp_path, evaluate):
    """Real images and each arm's, by training size; white where there are too few."""
    folders = []
    expected = {}
    for n_train, ending in ((10, ", N = 10"), (None, "")):
        expected[f"real{ending}"] = select_images(*TRAIN, 3, n_train, 0)
        for arm, seed in itertools.product(("quantum", "matched"), (1, 0)):
            images = noisy(THREES[:9], seed, 5 if arm == "matched" else 25)
            expected[f"{arm}{ending}"] = images
            folders.append(make_run(tmp_path, images, arm=arm, n_train=n_train, seed=seed))

    options = evaluation.parse_options(
        ["runs", "--features", "none", "--data_dir", str(evaluate.data_dir)], evaluation.MNIST
    )
    evaluator = evaluation.Evaluator(evaluation.MNIST, "digits", options)
    runs = evaluation.read_runs(folders, evaluation.MNIST)
    results = [row for run in runs for row in evaluator.measure(run)[0]]
    panels = evaluation.draw_overview(runs, frame_of(results), evaluator).axes
    titles = [axes.get_ylabel() for axes in panels]
    small = ["real, N = 10", "matched, N = 10", "quantum, N = 10"]
    assert titles == [*small, "real", "matched", "quantum"]
    for axes in panels:
        pixels = axes.get_images()[0].get_array()
        images = expected[axes.get_ylabel()]
        assert pixels.shape == (32, 452)  # fifteen tiles
        assert (pixels[2:30, 2:30] == images[0, 0].numpy()).all()
        assert (pixels[:, 30 * len(images) + 2 :] == 255).all()


def test_the_committed_table_is_that_of_the_committed_csv():
    frame = evaluation.read_comparison(RESULTS / "mnist_conditional" / "comparison.csv")
    expected = (RESULTS / "mnist_conditional" / "comparison.md").read_text()
    assert evaluation.comparison_text(frame) == expected


NOT_MEASURED = dict.fromkeys([*evaluation.METRICS, "kid_standard_error"])


def fake(arm, label, seed, fid, *, condition="", **settings):
    """One run's metrics.json; but for FID nothing could be measured."""
    settings = mnist.Settings(**{"data": "digits", "classes": (label,), "seed": seed} | settings)
    floor = {"fid": label / 2 + 0.5, "n": 100, "from": "test split"}
    return {
        "run": "run",
        "label": label,
        "condition": condition,
        "settings": asdict(settings) | {"arm": arm},
        "note": "",
        "machine": "",
        "features": "none",
        "reference": "class",
        "n_generated": 100,
        "n_real": 6000,
        "n_training": settings.n_train or 6000,
        "metrics": NOT_MEASURED | {"fid": fid},
        "floor": NOT_MEASURED | floor,
    }


def frame_of(runs):
    """The table that an evaluation of these runs makes."""
    return evaluation.read_comparison(io.StringIO(evaluation.comparison_csv(runs)))


def difference_rows(text, baseline="matched"):
    """A report's rows of paired differences against a baseline, by their first cell."""
    rows = tables(text).get(f"Paired differences against {baseline}", [])
    return {row["difference"]: row for row in rows}


def report_of(runs):
    """The whole report on these runs: most of a second."""
    return evaluation.comparison_text(frame_of(runs))


def differences_of(runs, baseline="matched"):
    """``difference_rows`` of the report's section on this baseline alone, which is quicker."""
    classes = evaluation.single_classes(frame_of(runs))
    pairs = evaluation.pairs_of_runs(classes, baseline)
    paragraphs = evaluation.difference_paragraphs(pairs)
    title = f"# Paired differences against {baseline}"
    return difference_rows("\n".join([title, *paragraphs]), baseline)


def test_means_use_the_classes_that_all_runs_have():
    """And the report says in what the runs differ."""
    runs = [fake("quantum", label, seed, label + seed) for label in (1, 3) for seed in (0, 1)]
    runs += [fake("matched", label, 0, 10 * label) for label in (1, 3, 5)]
    text = evaluation.comparison_text(frame_of(runs))
    rows = tables(text)["Comparison of runs"]
    half = stats.t.ppf(0.975, 1) * stats.sem([2, 3])
    assert {row["arm"]: row["FID"] for row in rows} == {
        "quantum": f"2.5 ± {half:.3g}",
        "matched": "20",
        evaluation.FLOOR: "1.5",
    }
    assert {row["classes"] for row in rows} == {"1/3"}
    assert f"Budget: steps {mnist.Settings().steps}" in text
    assert "steps 50, images 100.\n" in text

    # Class 5 of matched: the table says why it is not there.
    assert (
        "\n1 of 7 runs are left out: every arm and seed of that size must have the class.\n" in text
    )

    runs += [fake("classical", 3, 0, 1, sample_steps=1000)]
    text = evaluation.budget_text(frame_of(runs))
    assert text.endswith("**sample_steps 50 / 1000 (not the same in all runs)**, images 100")


def spread(labels, seeds, step):
    """Differences that rise with class and seed."""
    return {(k, s): step * (9 + 7 * k + s) for k in range(labels) for s in range(seeds)}


INTERVALS = [  # differences by class and seed; pairs; whether their interval is clear of zero
    (spread(1, 5, -0.1), "5", "yes"),
    ({(3, seed): (-1) ** seed for seed in range(5)}, "5", "no"),
    (spread(5, 4, 0.1), "20", "too few seeds"),  # classes of a seed share its randomness
    (spread(7, 1, 0.1), "7", "too few seeds"),
    (spread(1, 5, 0), "5", "no"),
    ({(3, 0): 7.0, (3, 1): math.nan}, "1", "too few seeds"),
]


@pytest.mark.parametrize("by_class_and_seed, pairs, clear", INTERVALS)
def test_intervals_are_students_t_over_the_seeds_of_pairs(by_class_and_seed, pairs, clear):
    """Pairs are of equal class, size and seed; classes are averaged first.

    What could not be measured is left out.
    """
    runs = []
    for (label, seed), difference in by_class_and_seed.items():
        fid = 100 * seed + label
        runs.append(fake("matched", label, seed, fid))
        runs.append(fake("quantum", label, seed, fid + difference))
    without_a_partner = [
        fake("quantum", 3, 9, 0),
        fake("quantum", 8, 0, 0),
        fake("quantum", 3, 0, 0, n_train=10),
    ]
    row = differences_of([*runs, *without_a_partner])["quantum − matched"]

    values = pd.Series(by_class_and_seed).groupby(level=1).mean().dropna()
    mean = values.mean()
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    assert row["N"] == "all"
    assert row["metric"] == "FID"
    assert row["pairs"] == pairs
    assert row["seeds"] == str(len(values))
    assert row["clear of 0"] == clear
    assert float(row["mean"]) == pytest.approx(mean, rel=5e-3)

    limits = [float(number) for number in re.findall(r"[-+][\d.]+", row["95 % interval"])]
    expected = [mean - half, mean + half] if len(values) > 1 else []
    assert limits == pytest.approx(expected, rel=5e-3)
    assert row["95 % interval"].endswith("*") == (abs(mean) > half)


def test_paired_differences_use_the_classes_that_all_seeds_have():
    """A seed with one class does not weigh as much as one with three, over other classes."""
    differences = {  # by class and seed
        (1, 0): 1, (3, 0): 10, (5, 0): 100,
        (1, 1): 2, (3, 1): 20, (5, 1): 200,
        (1, 2): 3,
    }  # fmt: skip
    runs = []
    for (label, seed), difference in differences.items():
        runs.append(fake("matched", label, seed, 0))
        runs.append(fake("quantum", label, seed, difference))
    frame = frame_of(runs)
    text = evaluation.comparison_text(frame)
    row = difference_rows(text)["quantum − matched"]
    half = stats.t.ppf(0.975, 2) * stats.sem([1, 2, 3])
    assert row["mean"] == "+2"
    assert (row["pairs"], row["seeds"]) == ("3", "3")
    assert row["95 % interval"] == f"[{2 - half:+.3g}, {2 + half:+.3g}]"

    assert (
        "\n4 of 7 pairs are left out: every seed of that difference must have the class.\n" in text
    )
    _above, below = evaluation.draw_panels(frame, against_size=False).axes
    assert below.containers[0].lines[0].get_ydata() == pytest.approx([2])


def test_an_arm_under_a_condition_is_compared_with_its_ideal_twin():
    runs = []
    for seed in range(5):
        runs.append(fake("matched", 3, seed, 1 + seed))
        runs.append(fake("quantum", 3, seed, 3 + seed))
        runs.append(fake("quantum", 3, seed, 6 + seed, condition="shots"))
        runs.append(fake("published", 3, seed, 2 + seed))
    text = report_of(runs)
    assert means_of(difference_rows(text)) == {
        "quantum − matched": "+2",
        "quantum shots − matched": "+5",
        "published − matched": "+1",
    }
    assert means_of(difference_rows(text, "quantum")) == {"quantum shots − quantum": "+3"}
    assert difference_rows(text, "published") == {}


def test_a_baseline_belongs_to_its_condition():
    """Sampler's steps are a condition of all arms, shots of the circuit's: one thing differs."""
    fids = {  # FID by arm, condition and sampling steps
        ("matched", "steps2", 2): 1,
        ("quantum", "steps2", 2): 3,
        ("quantum", "shots10_steps2", 2): 7,
    }
    runs = []
    for (arm, condition, steps), fid in fids.items():
        for seed in range(5):
            runs.append(fake(arm, 3, seed, fid + seed, condition=condition, sample_steps=steps))
    assert means_of(differences_of(runs)) == {
        "quantum steps2 − matched steps2": "+2",
        "quantum shots10_steps2 − matched steps2": "+6",
    }
    assert means_of(differences_of(runs, "quantum")) == {
        "quantum shots10_steps2 − quantum steps2": "+4"
    }
    assert len(evaluation.draw_panels(frame_of(runs), against_size=False).axes) == 2

    # With ideal runs beside them, a run of other steps has these as its twin.
    for arm, fid in (("matched", 10), ("quantum", 30)):
        runs += [fake(arm, 3, seed, fid + seed) for seed in range(5)]
    assert means_of(differences_of(runs)) == {
        "quantum − matched": "+20",
        "quantum steps2 − matched steps2": "+2",
        "quantum shots10_steps2 − matched steps2": "+6",
        "matched steps2 − matched": "-9",
    }


def test_a_conditional_model_has_one_base_in_each_table():
    """With other sampling steps it is compared with its own ideal, not with single models too."""
    fids = {  # FID by condition and sampling steps
        ("", 50): 1,
        ("steps2", 2): 4,
        ("conditional", 50): 10,
        ("conditional_steps2", 2): 30,
    }
    runs = []
    for (condition, steps), fid in fids.items():
        for seed in range(5):
            runs.append(
                fake("quantum", 3, seed, fid + seed, condition=condition, sample_steps=steps)
            )
    assert means_of(differences_of(runs, "quantum")) == {
        "quantum steps2 − quantum": "+3",
        "quantum conditional − quantum": "+9",
        "quantum conditional_steps2 − quantum conditional": "+20",
    }


def means_of(rows):
    """The mean differences by the rows' first cell."""
    return {name: row["mean"] for name, row in rows.items()}


@pytest.mark.parametrize("direction", [-math.inf, math.inf])
def test_no_cell_hangs_on_a_tie(direction):
    """A mean of 0.8585 may come out one bit less or more, by the order of its sum."""
    for tie, form in ((0.8585, "{:.3f}"), (1.445, "{:.3g}"), (-0.00125, "{:+.2g}")):
        beside = np.nextafter(tie, direction)
        assert evaluation.show(beside, form) == evaluation.show(tie, form)


@pytest.mark.parametrize("against_size, place", [(False, 1), (True, math.log10(100))])
def test_panels_show_means_and_below_them_paired_differences(against_size, place):
    """Two sizes, one of them without quantum; the other metrics could not be measured."""
    runs = []
    for seed in (1, 2, 3):
        runs.append(fake("matched", 3, seed, 10 * seed, n_train=25))
        runs.append(fake("matched", 3, seed, 10 * seed, n_train=100))
        runs.append(fake("quantum", 3, seed, 10 * seed + seed**2, n_train=100))
    above, below = evaluation.draw_panels(frame_of(runs), against_size).axes
    assert above.get_ylabel() == "FID"
    assert below.get_ylabel() == "FID\n− matched"

    matched, quantum = above.containers
    assert len(matched.lines[0].get_xdata()) == 2
    assert quantum.lines[0].get_xdata() == pytest.approx([place], abs=0.4 if place == 1 else 0.1)
    assert quantum.lines[0].get_ydata() == pytest.approx([20 + 14 / 3])

    (bar,) = below.containers
    assert bar.lines[0].get_ydata() == pytest.approx([14 / 3])
    low, high = bar.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 2) * stats.sem([1, 4, 9]))


def test_a_line_over_sizes_joins_the_same_classes():
    """Digit 8 is there with all images alone."""
    runs = [fake("matched", 3, 0, 10, n_train=25), fake("matched", 3, 0, 4)]
    runs.append(fake("matched", 8, 0, 100))
    (axes,) = evaluation.draw_panels(frame_of(runs), against_size=True).axes
    assert axes.containers[0].lines[0].get_ydata() == pytest.approx([10, 4])

    with pytest.raises(mnist.UserError, match="all arms and seeds of all sizes"):
        evaluation.draw_panels(frame_of(runs[::2]), against_size=True)


def test_arms_of_the_users_own_have_their_place_and_look(monkeypatch):
    """More arms than colours: each looks different from all others."""
    arms = {**mnist.ARMS, **{f"own{k}": "the user's" for k in range(3)}}
    monkeypatch.setattr(evaluation, "ARMS", arms)
    looks = [evaluation.variant_style(arm, list(arms)) for arm in arms]
    assert len({tuple(sorted(look.items())) for look in looks}) == len(arms)

    runs = [fake(arm, 3, seed, k + seed) for k, arm in enumerate(arms) for seed in (0, 1)]
    (*names, floor) = frame_of(runs)["variant"].cat.categories
    assert names == list(arms)
    (axes, *_) = evaluation.draw_panels(frame_of(runs), against_size=False).axes
    assert [bar.get_label() for bar in axes.containers] == names


@pytest.mark.parametrize("against_size", [False, True])
def test_ten_arms_of_four_sizes_do_not_overlap(against_size):
    """Neither the tick labels nor the arms of one size with those of the next."""
    runs = []
    for n_train in (25, 50, 100, None):
        for k, arm in enumerate(["classical", "matched", *(f"own{k}" for k in range(8))]):
            runs += [fake(arm, 3, seed, k + seed, n_train=n_train) for seed in (0, 1)]
    figure = evaluation.draw_panels(frame_of(runs), against_size)
    figure.canvas.draw()
    axes = figure.axes[1]  # below, where the labels are

    # Labels at 45 degrees are a line's height apart when their places are 1.4 heights apart.
    corners = [label.get_window_extent() for label in axes.get_xticklabels()]
    left = [box.x0 for box in corners]
    height = 8 / 72 * figure.dpi
    assert np.diff(left).min() > 1.4 * height or corners[0].x1 < left[1]

    x = np.sort([bar.lines[0].get_xdata() for bar in axes.containers], axis=0)  # (arm, size)
    assert (x[-1, :-1] < x[0, 1:]).all()
    assert (np.diff(x, axis=0) > 0).all()  # the arms of one size stand side by side


# ------------------------------------------------------------ relative differences of FID
def pair_of(percent, seed, *, label=3, arm="quantum", base="matched", **more):
    """Runs of two arms whose FIDs have this relative difference."""
    fid = 10 + seed + label
    return [
        fake(base, label, seed, fid, **more),
        fake(arm, label, seed, fid * (200 + percent) / (200 - percent), **more),
    ]


def compare_fid(runs, margin=4.0):
    """The rows of ``fid_comparisons`` by what is compared."""
    rows = evaluation.fid_comparisons(frame_of(runs), margin).to_dict("records")
    return {f"{row['variant']} − {row['variant_base']}": row for row in rows}


def test_every_class_and_seed_of_single_models_is_a_unit():
    fids = {(1, 0): (10, 9), (1, 1): (11, 12), (8, 0): (40, 42), (8, 1): (44, 40), (8, 2): (7, 6)}
    runs = []
    for (label, seed), (quantum, matched) in fids.items():
        runs += [fake("quantum", label, seed, quantum), fake("matched", label, seed, matched)]
    (row,) = compare_fid(runs).values()

    values = [100 / 9.5, -100 / 11.5, -200 / 41, 400 / 42, 100 / 6.5]
    assert (row["unit"], row["n"]) == ("class × seed", 5)
    assert (row["mean"], row["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    for confidence, quantile in ((90, 2.131847), (95, 2.776445)):  # Student's t, 4 degrees
        half = quantile * np.std(values, ddof=1) / np.sqrt(5)
        limits = (row[f"low_{confidence}"], row[f"high_{confidence}"])
        assert limits == pytest.approx((np.mean(values) - half, np.mean(values) + half))


def test_a_seed_of_conditional_models_is_a_unit():
    """The mean over its classes, which are the same in all seeds."""
    percents = {  # by class and seed
        (1, 0): 2, (1, 1): 3, (1, 2): 5, (1, 3): -1, (1, 4): 1,
        (8, 0): 4, (8, 1): 9, (8, 2): 1, (8, 3): -7, (8, 4): 3,
        (9, 0): 77,
    }  # fmt: skip
    runs = []
    for (label, seed), percent in percents.items():
        runs += pair_of(percent, seed, label=label, condition="conditional")
    name = "quantum conditional − matched conditional"
    row = compare_fid(runs)[name]

    values = [3, 6, 3, -4, 2]
    assert (row["unit"], row["n"]) == ("seed", 5)
    assert (row["mean"], row["sd"]) == pytest.approx((2, np.std(values, ddof=1)))
    expected = stats.t.interval(0.95, 4, 2, stats.sem(values))
    assert (row["low_95"], row["high_95"]) == pytest.approx(expected)

    # Against single-class models as well: the conditional one is what they share.
    runs += [fake("matched", label, seed, 10 + seed + label) for label, seed in percents]
    row = compare_fid(runs)["matched conditional − matched"]
    assert (row["unit"], row["n"], row["mean"]) == ("seed", 5, 0)


VERDICTS = [  # relative differences in per cent; the verdict with a margin of 4 %
    ([9, 10, 11, 10, 12], "different"),
    ([-1, 1, 0.5, -0.5, 0.2], "equivalent"),
    ([1.8, 2, 2.2, 2.1, 1.9], "different but within the margin"),
    ([1, 8, -3, 6, 2], "undecided"),
    ([9, 10, 11, 10], "too few"),
]


@pytest.mark.parametrize("percents, verdict", VERDICTS)
def test_verdicts_are_those_of_two_tests(percents, verdict):
    runs = [run for seed, percent in enumerate(percents) for run in pair_of(percent, seed)]
    row = compare_fid(runs)["quantum − matched"]
    assert row["verdict"] == verdict

    # Student's t by hand: of mean 0 on both sides; of the nearer margin on one side.
    n = len(percents)
    error = np.std(percents, ddof=1) / np.sqrt(n)
    mean = np.mean(percents)
    p_different = 2 * stats.t.sf(abs(mean) / error, n - 1)
    p_equivalent = stats.t.sf((4 - abs(mean)) / error, n - 1)
    if verdict == "too few":  # not tested
        p_different = p_equivalent = np.nan
    assert row["p_different"] == pytest.approx(p_different, rel=1e-6, nan_ok=True)
    assert row["p_equivalent"] == pytest.approx(p_equivalent, rel=1e-6, nan_ok=True)
    if verdict == "too few":
        return
    assert (p_equivalent < 0.05) == (row["low_90"] > -4 and row["high_90"] < 4)


def test_arms_may_be_compared_with_others():
    """``--against``: these in place of matched and classical; of two of them no pair is twice."""
    fids = {"classical": 8, "matched": 10, "quantum": 11, "product": 15}
    runs = [fake(arm, 3, 0, fid) for arm, fid in fids.items()]
    runs += [fake(arm, 3, 0, fids[arm] / 2, condition="steps2") for arm in ("matched", "quantum")]

    def means(*against):
        rows = evaluation.fid_comparisons(frame_of(runs), 4.0, against=against).itertuples()
        return {f"{row.variant} − {row.variant_base}": row.mean for row in rows}

    own = {f"{arm} steps2 − {arm}": -200 / 3 for arm in ("matched", "quantum")}
    assert means("quantum") == pytest.approx(
        own
        | {
            "classical − quantum": -300 / 9.5,
            "matched − quantum": -100 / 10.5,
            "matched steps2 − quantum steps2": -100 / 10.5,
            "product − quantum": 400 / 13,
        }
    )
    assert means("matched", "quantum") == pytest.approx(
        own
        | {
            "classical − matched": -200 / 9,
            "quantum − matched": 100 / 10.5,
            "quantum steps2 − matched steps2": 100 / 10.5,
            "product − matched": 500 / 12.5,
            "classical − quantum": -300 / 9.5,
            "product − quantum": 400 / 13,
        }
    )

    # Beside another circuit with shots, one with shots; beside a gate without, that.
    runs += [fake("quantum", 3, 0, 20, condition="shots10")]
    runs += [fake("product", 3, 0, 30, condition="shots10")]
    shots = {name: value for name, value in means("matched", "quantum").items() if "shots" in name}
    assert shots == pytest.approx(
        {
            "quantum shots10 − matched": 1000 / 15,
            "product shots10 − matched": 2000 / 20,
            "product shots10 − quantum shots10": 1000 / 25,
            "quantum shots10 − quantum": 900 / 15.5,
            "product shots10 − product": 1500 / 22.5,
        }
    )
    runs = runs[:-2]

    # An arm that has circuits of one kind alone; a condition of another size is not looked for.
    runs += [fake("strong", 3, 0, 30, condition="lightning.qubit")]
    runs += [fake("quantum", 3, 0, 20, condition="shots10", n_train=25)]
    runs += [fake("product", 3, 0, 30, condition="shots10")]
    device = "strong lightning.qubit"
    found = means("strong", "quantum")
    assert found[f"matched − {device}"] == pytest.approx(-2000 / 20)
    assert found[f"quantum − {device}"] == pytest.approx(-1900 / 20.5)
    assert f"{device} − quantum" not in found
    assert found["product shots10 − quantum"] == pytest.approx(1900 / 20.5)
    runs = runs[:-3]

    frame = frame_of(runs)
    _above, below = evaluation.draw_panels(frame, False, ["product"]).axes
    assert below.get_ylabel() == "FID\n− product"
    sections = tables(evaluation.comparison_text(frame, against=["product"]))
    rows = sections["Paired differences against product"]
    assert [(row["difference"], row["mean"]) for row in rows if row["metric"] == "FID"] == [
        ("classical − product", "-7"), ("matched − product", "-5"), ("quantum − product", "-4"),
    ]  # fmt: skip
    assert "Paired differences against classical" not in sections


def test_holms_adjustment():
    """By hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, then 0.04 not below that; no test, none counted."""
    p = pd.Series([0.01, 0.04, math.nan, 0.03, 0.005])
    assert evaluation.holm(p).tolist() == pytest.approx(
        [0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True
    )
    assert evaluation.holm(pd.Series([0.4, 0.6, 0.9])).tolist() == [1, 1, 1]


def test_holms_adjustment_of_a_planned_family():
    """Tests that were not made count as p = 1; one that is made later can only reject more."""
    p = pd.Series([0.01, 0.012, math.nan])
    assert evaluation.holm(p, family=6).tolist()[:2] == pytest.approx([0.06, 0.06])
    of_six = evaluation.holm(pd.Series([0.01, 0.012, 1, 1, 1, 1]))
    assert evaluation.holm(p, family=6).tolist()[:2] == of_six.tolist()[:2]
    assert evaluation.holm(p, family=1).tolist()[:2] == evaluation.holm(p).tolist()[:2]


def test_family_of_the_command_line(tmp_path, draw_only):
    """Two comparisons: without it their p are doubled, with --family 6 they are six times."""
    draw_only()
    generator = np.random.default_rng(1)
    runs = []
    for seed, percent in enumerate(generator.normal(3, 3, 6)):
        runs += pair_of(percent, seed)
        runs += pair_of(-percent, seed, n_train=10)
    runs = [run | {"run": f"run {k}"} for k, run in enumerate(runs)]
    table = tmp_path / "table.csv"
    table.write_text(evaluation.comparison_csv(runs))
    smallest = {}
    for family in (0, 6):
        out = tmp_path / str(family)
        evaluation.main(["--csv", str(table), "--out", str(out), "--family", str(family)])
        text = (out / "comparison.md").read_text()
        rows = tables(text)["Relative differences of FID"]
        smallest[family] = min(float(row["p different"]) for row in rows)
        assert ("as at least 6 tests" in text) == (family == 6)
    assert smallest[6] == pytest.approx(min(1, 3 * smallest[0]), rel=0.05)


def test_tests_are_adjusted_over_all_rows_and_no_comparison_is_repeated():
    """Three arms: three comparisons, as matched − classical is classical − matched."""
    generator = np.random.default_rng(0)
    runs = []
    fids = {}
    for arm, mean in (("matched", 100), ("classical", 101), ("quantum", 104)):
        fids[arm] = mean + generator.normal(size=8)
        runs += [fake(arm, 3, seed, fid) for seed, fid in enumerate(fids[arm])]
    rows = compare_fid(runs)
    assert list(rows) == ["classical − matched", "quantum − matched", "quantum − classical"]

    raw = []
    for name in rows:
        a, b = (fids[arm] for arm in name.split(" − "))
        raw.append(stats.ttest_1samp(100 * (a - b) / ((a + b) / 2), 0).pvalue)
    smallest, middle, largest = np.argsort(raw)
    adjusted = [row["p_different"] for row in rows.values()]
    assert adjusted[smallest] == pytest.approx(3 * raw[smallest])
    assert adjusted[middle] == pytest.approx(max(2 * raw[middle], 3 * raw[smallest]))
    assert adjusted[largest] == pytest.approx(max(raw[largest], adjusted[middle]))


def test_comparisons_of_too_few_units_do_not_raise_the_others_p():
    runs = [run for seed, percent in enumerate((3, 9, 4, 8, 5)) for run in pair_of(percent, seed)]
    alone = compare_fid(runs)["quantum − matched"]
    for seed in (0, 1):
        runs += [fake(arm, 3, seed, 20 + seed) for arm in ("se", "frozen", "classical")]
    assert compare_fid(runs)["quantum − matched"]["p_different"] == alone["p_different"]


def test_steps_by_epochs_differ_between_classes_alone():
    """And all pairs are there."""
    runs = []
    for label, steps in ((0, 463), (1, 527), (2, 466), (3, 479)):
        for seed in range(5):
            runs += pair_of(seed, seed, label=label, steps=steps)
    rows = compare_fid(runs)
    assert {name: row["n"] for name, row in rows.items()} == {"quantum − matched": 20}


@pytest.mark.parametrize("steps", [1150, 1350])
def test_an_arm_s_other_steps_are_told_apart_in_every_class(steps):
    """In class 1 both numbers are equally common; in all classes the usual one is commoner."""
    runs = []
    for seed in range(5):
        runs += pair_of(0, seed, label=0)
        runs.append(fake("matched", 1, seed, 10))
        runs.append(fake("quantum", 1, seed, 12, steps=steps))
    rows = compare_fid(runs)
    assert {name: row["n"] for name, row in rows.items()} == {"quantum − matched": 5}


def test_a_conditional_model_is_one_variant_in_all_its_rows():
    runs = [
        fake("quantum", label, 0, 1, steps=steps, condition="conditional")
        for steps in (5000, 12000)
        for label in (0, 3)
    ]
    runs += [
        fake("quantum", 3, seed, 1, steps=5000, condition="conditional-3-8") for seed in (1, 2)
    ]
    frame = frame_of(runs)
    assert set(frame["variant"][frame["steps"] == 5000]) == {
        "quantum conditional 5000 steps",
        "quantum conditional-3-8",
    }


def test_an_earlier_table_without_a_budget_s_number_joins():
    earlier = pd.read_csv(io.StringIO(evaluation.comparison_csv(pair_of(1, 0))))
    runs = [run for n in (8, 16) for run in pair_of(1, n, n_qubits=n)]
    texts = [earlier.drop(columns="n_qubits").to_csv(index=False), evaluation.comparison_csv(runs)]
    frame = evaluation.read_comparison(io.StringIO(evaluation.joined(texts)))
    assert not frame["variant"].str.contains("nan").any()
    text = evaluation.comparison_text(frame)
    assert "had different n_qubits" not in text
    assert "n_qubits 8 / 16 (not known of all runs) (not the same in all runs)" in text


def test_rows_of_one_table_are_never_taken_for_each_other():
    """Beside an earlier table that lacks what tells them apart; measured again, a row is new."""
    earlier = pd.read_csv(io.StringIO(evaluation.comparison_csv([fake("quantum", 3, 1, 10)])))
    earlier = earlier.drop(columns="muon_lr").to_csv(index=False)
    runs = [fake("quantum", 3, 0, fid, muon_lr=rate) for fid, rate in ((20, 0.02), (30, 0.01))]
    kept = evaluation.joined([earlier, evaluation.comparison_csv(runs)])
    assert [float(fid) for fid in pd.read_csv(io.StringIO(kept))["fid"]] == [10, 20, 30]

    again = evaluation.comparison_csv([fake("quantum", 3, 1, 40)])
    kept = evaluation.joined([kept, again])
    assert [float(fid) for fid in pd.read_csv(io.StringIO(kept))["fid"]] == [20, 30, 40]


def test_models_without_a_gate_have_no_usual_number_of_qubits():
    runs = [fake(arm, 3, seed, 10) for arm in ("classical", "quantum") for seed in range(5)]
    runs += [fake(arm, 3, s, 10, n_qubits=8) for arm in ("matched", "quantum") for s in range(5)]
    assert set(compare_fid(runs)) == {
        "quantum − matched",
        "quantum − classical",
        "classical − matched",
        "quantum 16 n_qubits − quantum",
    }


def test_another_number_of_qubits_is_told_apart():
    runs = []
    for seed in range(5):
        runs += pair_of(0, seed)
        runs.append(fake("quantum", 3, seed, 1.5 * (13 + seed), n_qubits=8))
    rows = compare_fid(runs)
    assert {name: row["n"] for name, row in rows.items()} == {
        "quantum − matched": 5,
        "quantum 8 n_qubits − quantum": 5,
    }
    assert rows["quantum − matched"]["mean"] == pytest.approx(0)


def test_runs_that_nothing_tells_apart_are_refused():
    runs = pair_of(1, 0) + pair_of(2, 0)
    with pytest.raises(
        mnist.UserError, match="run is there twice, as matched of one class, size, seed"
    ):
        frame_of(runs)


@pytest.mark.parametrize("key", ["n_generated", "n_real", "features"])
def test_pairs_of_unequal_measurements_are_counted_and_left_out(key):
    runs = pair_of(1, 0) + pair_of(2, 1)
    runs[-1] |= {key: {"features": "none:other"}.get(key, 25)}
    text = report_of(runs)
    (row,) = tables(text)["Relative differences of FID"]
    assert row["n"] == "1"
    assert "different numbers of images, and are in no difference: 1." in text


def test_a_run_that_two_judges_read_counts_once():
    """As one that was made again on another machine; each of its pairs has one judge."""
    runs = [fake("quantum", 1, 0, 10), fake("quantum", 8, 0, 30), fake("quantum", 1, 0, 20)]
    runs += [fake("quantum", 1, 0, 25, steps=1150), fake("quantum", 8, 0, 40, steps=1150)]
    for run, (name, judge) in zip(runs, ("ab", "ab", "xc", "yc", "zb"), strict=True):
        run |= {"run": name, "features": f"classifier:{judge}"}
    text = report_of(runs)
    rows = {row["arm"]: row["FID"] for row in tables(text)["Comparison of runs"]}
    assert rows["quantum"] == f"{(15 + 30) / 2:.3g}"  # not (10 + 20 + 30) / 3
    assert rows["quantum 1150 steps"] == "32.5"
    difference = difference_rows(text, "quantum")["quantum 1150 steps − quantum"]
    assert (difference["pairs"], difference["mean"]) == ("2", "+7.5")
    assert "in no difference" not in text


def test_scales_of_different_kinds_are_not_averaged():
    runs = pair_of(1, 0) + [run | {"features": "inception:0"} for run in pair_of(1, 1)]
    frame = frame_of(runs)
    assert list(evaluation.by_source(frame)) == ["_inception", "_none"]
    compared = tables(evaluation.comparison_text(frame))["Relative differences of FID"]
    names = [row["difference"] for row in compared]
    assert names == ["quantum − matched, inception", "quantum − matched, none"]

    others = [run | {"reference": "all"} for run in pair_of(1, 2)]  # the folders' name is the same
    parts = list(evaluation.by_source(frame_of(runs + others)))
    assert parts[1:] == ["_none-reference-all", "_none-reference-class"]

    # "all" of a conditional run always has that reference, and belongs to its classes' rows.
    rows = [fake("quantum", 3, 9, 1.0, condition="conditional") | {"run": "both: 3"}]
    rows.append(rows[0] | {"run": "both: all", "label": "all", "reference": "all"})
    frame = frame_of(rows + others)
    together = frame[frame["label"] == "all"]["scale"]
    assert together.tolist() == ["none, reference class"]


def floors_of(runs):
    """Numbers and FID of a report's floors, by section."""
    return {
        title: [(row["n generated"], row["FID"]) for row in rows if row["arm"] == FLOOR]
        for title, rows in tables(report_of(runs)).items()
        if any(row.get("arm") == FLOOR for row in rows)
    }


def test_each_number_of_images_has_a_floor_of_its_own():
    """A mean of them would be nobody's: 6 images would look worse, and 40 better than real ones."""
    runs = []
    for label, seed in itertools.product((3, 4), (0, 1)):
        for arm, n in (("matched", 6), ("quantum", 40)):
            run = fake(arm, label, seed, 10.0) | {"n_generated": n}
            run["floor"] |= {"fid": label / n, "n": n}
            runs.append(run)
    expected = [("6", f"{3.5 / 6:.3g}"), ("40", f"{3.5 / 40:.3g}")]
    assert floors_of(runs) == {"Comparison of runs": expected}

    # Drawn as two lines.
    axes = evaluation.draw_panels(frame_of(runs), against_size=False).axes[0]
    (lines,) = [lines for lines in axes.collections if lines.get_label() == FLOOR]
    heights = [path.vertices[0, 1] for path in lines.get_paths()]
    assert heights == pytest.approx([3.5 / 6, 3.5 / 40])

    # Classes that each have one number are averaged.
    runs = [fake("quantum", label, 0, 1.0) | {"n_generated": 9 * label} for label in (1, 3)]
    runs[0]["floor"] |= {"n": 9}
    assert floors_of(runs) == {"Comparison of runs": [("9/100", "1.5")]}


def test_models_of_other_classes_have_floors_of_their_own():
    runs = []
    for condition, labels, fid in (
        ("conditional", (3, 4, 8), 1.8),
        ("conditional-3-8", (3, 8), 2.6),
    ):
        name = f"quantum_{condition}"
        rows = [fake("quantum", label, 0, 4.0, condition=condition) for label in labels]
        together = fake("quantum", 3, 0, 5.0, condition=condition) | {"label": "all"}
        together["floor"] |= {"fid": fid}
        runs += [row | {"run": f"{name}: {row['label']}"} for row in [*rows, together]]
    text = report_of(runs)
    title = "All classes of a model together"
    assert floors_of(runs)[title] == [("100", "2.6"), ("100", "1.8")]
    shown = {(row["arm"], row["classes"]) for row in tables(text)[title]}
    assert shown == {
        ("quantum conditional", "all"), ("quantum conditional-3-8", "3-8"),
        (FLOOR, "all"), (FLOOR, "3-8"),
    }  # fmt: skip


def test_a_difference_of_zero_is_not_clear_of_zero():
    """0.05 + (0.1 - 0.15) is 7e-18."""
    runs = []
    for seed in range(5):
        for label, fids in ((3, (0.0, 0.05)), (4, (0.15, 0.1))):
            runs += [fake("matched", label, seed, fids[0]), fake("quantum", label, seed, fids[1])]
    row = differences_of(runs)["quantum − matched"]
    assert row["clear of 0"] == "no"


def test_another_budget_of_several_arms_is_told():
    runs = pair_of(1, 0) + pair_of(1, 0, steps=500) + pair_of(1, 1)
    said = "Arms are compared at their usual budget alone"
    assert said in report_of(runs)
    assert said not in report_of(runs[:3] + runs[4:])  # one arm: as the study's control


def test_texts_of_a_mean_are_all_there():
    parts = [{"n": k, "from": text} for k, text in enumerate(("test", "training", "test"))]
    assert evaluation.mean_of(parts) == {"n": 1, "from": "test; training"}


def test_floors_of_two_kinds_are_told():
    runs = pair_of(1, 0) + pair_of(2, 0, label=4)
    assert "of two kinds" not in report_of(runs)
    runs[0]["floor"] |= {"from": "training split, set aside"}
    assert "floors and FID / real of two kinds" in report_of(runs)


def test_features_of_several_networks_are_told():
    """The study has two classifiers: one sees a row's means, and each pair is judged by one."""
    runs = pair_of(1, 0) + pair_of(2, 1)
    assert "features of several networks" not in report_of(runs)
    runs[2:] = [run | {"features": "none:other"} for run in runs[2:]]
    text = report_of(runs)
    assert "features of several networks: means and absolute differences mix their scales" in text
    (row,) = tables(text)["Relative differences of FID"]
    assert row["n"] == "2"


def test_pairs_from_different_machines_are_told():
    runs = pair_of(1, 0) + pair_of(2, 1) + pair_of(3, 2)
    for run in runs[:3]:
        run["machine"] = "cpu, one"
    assert "different machines" not in report_of(runs)
    runs[3]["machine"] = "cpu, another"
    text = report_of(runs)
    assert "Pairs whose two runs were made on different machines: 1." in text


def test_where_a_run_was_made_is_in_its_row(tmp_path, evaluate):
    run = make_run(tmp_path, noisy(THREES[:10], seed=0))
    (result,) = evaluate(run, "--features", "none")
    assert result["machine"] == ""  # it does not say

    config = json.loads((run / "config.json").read_text())
    gpu = {"device": "cuda:1, two", "threads": 1, "versions": {"torch": "2.1"}}
    assert evaluation.machine_of(gpu) == "cuda, two, 1 thread, torch 2.1"  # of equal GPUs any
    place = {"device": "cpu, one", "threads": 1, "versions": {"torch": "2.1"}}
    config |= place | {"went_on": [place, place | {"threads": 2}]}
    (run / "config.json").write_text(json.dumps(config))
    table = tmp_path / "table.csv"
    (result,) = evaluate(run, "--features", "none", "--csv", table)
    assert result["machine"] == "cpu, one, 1 thread, torch 2.1; cpu, one, 2 threads, torch 2.1"
    assert pd.read_csv(table)["machine"].tolist() == [result["machine"]]


@pytest.mark.parametrize("steps", [1150, 1350])
def test_other_training_steps_are_compared_with_the_usual_ones_of_the_same_arm(steps):
    """The usual number is the commonest; a conditional model's, or another size's, is its own."""
    runs = []
    for seed in range(5):
        runs += pair_of(0, seed)
        runs += pair_of(0, seed, condition="conditional", steps=5000)
        runs += pair_of(0, seed, n_train=10, steps=300)
        runs.append(fake("quantum", 3, seed, 1.5 * (13 + seed), steps=steps))
    frame = frame_of(runs)
    control = frame["steps"] == steps
    assert frame["variant"][control].unique().tolist() == [f"quantum {steps} steps"]
    assert set(frame["variant"][~control]) == {
        "matched", "quantum", "matched conditional", "quantum conditional",
    }  # fmt: skip

    name = f"quantum {steps} steps − quantum"
    compared = compare_fid(runs)
    assert [row for row in compared if str(steps) in row] == [name]
    assert compared[name]["mean"] == pytest.approx(40)
    assert means_of(differences_of(runs, "quantum"))[name] == "+7.5"
    assert not any(str(steps) in row for row in differences_of(runs))

    # Each arm has its own number: nothing is told apart by it, and they are compared as ever.
    runs = [fake("matched", 3, 0, 10, steps=1000), fake("quantum", 3, 0, 11, steps=2000)]
    assert list(compare_fid(runs)) == ["quantum − matched"]


def test_other_budgets_of_a_whole_arm_are_told():
    runs = [fake("matched", 3, 0, 10, steps=1000), fake("quantum", 3, 0, 11, steps=2000, lr=0.1)]
    text = report_of(runs)
    assert "Pairs whose two runs had different training steps: 1." in text
    assert "Pairs whose two runs had different lr: 1. Their difference is one of lr, too." in text
    assert "runs had different" not in report_of(pair_of(3, 0))

    # Also where there is no FID; and an arm without a gate has no qubits.
    for run in runs:
        run["metrics"] = NOT_MEASURED
    assert "different training steps: 1." in report_of(runs)
    runs = [fake(arm, 3, 0, 10, n_qubits=8) for arm in ("quantum", "strong")]
    runs += [fake(arm, 3, 0, 11) for arm in ("matched", "classical")]
    assert "Pairs whose two runs had different n_qubits: 2." in report_of(runs)


def test_models_trained_on_other_numbers_of_images_make_no_pair():
    """As of plain and augmented runs, whose n_train is the same."""
    first, second = pair_of(1, 0)
    assert list(compare_fid([first, second])) == ["quantum − matched"]
    assert not compare_fid([first, second | {"n_training": 48000}])


def test_conditions_of_an_arm_of_the_users_own_are_compared_with_it():
    runs = []
    for seed in range(2):
        runs += [fake("own", 3, seed, 10 + seed), fake("own", 3, seed, 11, condition="shots10")]
    assert list(compare_fid(runs)) == ["own shots10 − own"]
    assert means_of(differences_of(runs, "own")) == {"own shots10 − own": "+0.5"}
    assert "## Paired differences against own" in report_of(runs)


def test_a_model_sampled_with_shots_is_not_one_trained_with_them(tmp_path, evaluate):
    """README trains one of each, under the same name in two folders."""
    noise = {"arm": "quantum", "shots": 10}
    folders = [make_run(tmp_path, THREES[:5], arm="quantum")]
    for name, steps in (("trained", 50), ("sampled", 50), ("sampled", 20)):
        folders.append(make_run(tmp_path / name, THREES[:5], **noise, sample_steps=steps))
    for folder in folders[2:]:
        config = json.loads((folder / "config.json").read_text())
        config["weights"] = {"weights_sha256": "0" * 64}
        (folder / "config.json").write_text(json.dumps(config))
    evaluate(*folders, "--features", "none", "--out", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "comparison.csv", keep_default_na=False)
    expected = ["", "shots10", "shots10_sampled", "shots10_sampled_steps20"]
    assert table["condition"].tolist() == expected

    report = (tmp_path / "out" / "comparison.md").read_text()
    rows = difference_rows(report, "quantum")
    assert {*rows} == {"quantum shots10 − quantum", "quantum shots10_sampled − quantum"}
    runs = [row["run"] for row in tables(report)["Runs"]][::2]  # below each is its floor
    name = folders[1].name
    assert runs == [folders[0].name, name, f"{name} sampled", f"{name}_steps20 sampled"]


def test_runs_in_folders_of_one_name_are_all_there(tmp_path, evaluate, draw_only):
    """Moved together as seed0/quantum, seed1/quantum; a folder named twice is one run."""
    draw_only()
    runs = []
    for seed in (0, 1):
        made = make_run(tmp_path / "made", noisy(THREES[:4], seed, 5), arm="quantum", seed=seed)
        (tmp_path / f"seed{seed}").mkdir()
        runs.append(made.rename(tmp_path / f"seed{seed}" / "quantum"))
    evaluate(*runs, runs[0], "--out", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["run"].tolist() == ["quantum"] * 2
    assert table["seed"].tolist() == [0, 1]

    # Added to a table one by one.
    kept = tmp_path / "kept.csv"
    for run in runs:
        evaluate(run, "--csv", kept)
    assert pd.read_csv(kept)["seed"].tolist() == [0, 1]


def test_arms_may_have_a_space_in_their_names():
    frame = frame_of([fake("my own", 3, 0, 10), *pair_of(3, 0)])
    assert frame["variant"].cat.categories.tolist() == ["matched", "quantum", "my own", FLOOR]


def test_a_bar_in_a_cell_is_no_column():
    assert evaluation.table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"


def test_equal_differences_are_no_test():
    for fid in (8, 11):
        runs = [
            fake(arm, 3, seed, of_arm)
            for seed in range(6)
            for arm, of_arm in (("matched", 8), ("quantum", fid))
        ]
        assert compare_fid(runs)["quantum − matched"]["verdict"] == "no spread"


def test_units_that_are_equal_but_for_rounding_have_no_spread():
    runs = [run for seed in range(5) for run in pair_of(1, seed)]
    row = compare_fid(runs)["quantum − matched"]
    assert (row["verdict"], row["mean"]) == ("no spread", pytest.approx(1))
    assert math.isnan(row["p_different"]) and math.isnan(row["low_95"])


def test_classes_that_no_two_arms_share_are_not_drawn():
    frame = frame_of([fake("matched", 3, 0, 10), fake("quantum", 8, 0, 10)])
    with pytest.raises(mnist.UserError, match="no class is there for all arms"):
        evaluation.draw_panels(frame, against_size=False)
    assert "| N " not in evaluation.comparison_text(frame)


def test_long_names_fit_into_the_figures(monkeypatch):
    """Conditions of many words: in the overview's titles and below the panels."""
    noise = [f"shots{n}_gate0.001-0.01_readout0.02_steps10" for n in range(100, 900, 100)]
    white = torch.full((3, 1, 28, 28), 255, dtype=torch.uint8)
    cells = {("3", f"quantum {condition}"): white for condition in noise}
    monkeypatch.setattr(evaluation, "overview_cells", lambda *_: cells)
    figure = evaluation.draw_overview([], None, None)
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))

    runs = [fake("quantum", 3, 0, 10, condition=condition) for condition in noise]
    figure = evaluation.draw_panels(frame_of(runs), against_size=False)
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().width < figure.bbox.width


def test_a_run_of_other_steps_beside_the_usual_one(tmp_path, evaluate, draw_only):
    """Through the command line: not refused nor mixed up, though two folders' names are one."""
    draw_only()
    usual = [
        make_run(tmp_path, noisy(THREES[:9], seed, 5), arm="quantum", seed=seed) for seed in (0, 1)
    ]
    shorter = make_run(tmp_path / "short", noisy(THREES[:9], 0, 60), arm="quantum", steps=1150)
    out = tmp_path / "out"
    first, _second, of_shorter = evaluate(*usual, shorter, "--out", out)
    a, b = of_shorter["metrics"]["fid"], first["metrics"]["fid"]

    report = tables((out / "comparison.md").read_text())
    (row,) = report["Relative differences of FID"]
    assert (row["difference"], row["n"]) == ("quantum 1150 steps − quantum", "1")
    assert float(row["mean %"]) == pytest.approx(200 * (a - b) / (a + b), abs=0.01)
    assert row["verdict"] == "too few"
    names = [row["run"] for row in report["Runs"][::2]]
    assert names == [usual[0].name, usual[1].name, f"{shorter.name} 1150 steps"]
    arms = [row["arm"] for row in report["Comparison of runs"]]
    assert arms == ["quantum", "quantum 1150 steps", FLOOR]


def test_forest_has_a_row_for_each_comparison():
    runs = []
    for seed, percent in enumerate((1, 2, 4, 3, 2)):
        runs += pair_of(percent, seed)
        runs.append(fake("quantum", 3, seed, 20 + seed, steps=1150))
        runs += pair_of(-percent, seed, n_train=10, arm="published")
    comparisons = evaluation.fid_comparisons(frame_of(runs), margin=3.0)
    axes, *_ = evaluation.draw_forest(comparisons, 3.0).axes

    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [
        "published − matched, N = 10",
        "quantum − matched, N = all",
        "quantum 1150 steps\n− quantum, N = all",
    ]
    assert axes.get_yticks().tolist() == [0, 1, 2]
    assert axes.yaxis_inverted()
    (right,) = axes.child_axes
    assert [label.get_text() for label in right.get_yticklabels()] == ["n = 5"] * 3

    # Points, thin and thick lines, and the band.
    thin, thick, points = axes.collections
    x, y = np.asarray(points.get_offsets()).T
    assert x == pytest.approx(comparisons["mean"].to_numpy())
    assert y.tolist() == [0, 1, 2]
    assert x[:2] == pytest.approx([-2.4, 2.4])
    for lines, confidence in ((thin, 95), (thick, 90)):
        ends = [[low, high] for (low, _), (high, _) in lines.get_segments()]
        columns = [f"low_{confidence}", f"high_{confidence}"]
        assert np.array(ends) == pytest.approx(comparisons[columns].to_numpy())
    assert thick.get_linewidth()[0] > 2 * thin.get_linewidth()[0]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (-3, 3)


def test_texts_of_a_large_forest_do_not_overlap():
    noise = "gate0.001-0.01_readout0.02"
    runs = []
    for seed, n_train in itertools.product(range(5), (25, None)):
        for arm, condition in itertools.product(
            ("matched", "quantum", "published"), ("", "conditional")
        ):
            runs.append(fake(arm, 3, seed, 9 + seed, n_train=n_train, condition=condition))
        for condition in (noise, f"conditional_{noise}"):
            runs.append(fake("quantum", 3, seed, 10, n_train=n_train, condition=condition))
    comparisons = evaluation.fid_comparisons(frame_of(runs), 4.0)
    figure = evaluation.draw_forest(comparisons, 4.0)
    figure.draw_without_rendering()

    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == len(comparisons) > 20
    assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
    panel = axes.get_window_extent()
    assert all(box.x0 > 0 and box.x1 < panel.x0 for box in boxes)
    assert panel.width > 0.4 * figure.bbox.width


def test_several_tables_below_each_other():
    """Runs of two data sets make no pair, and the text says which they are of."""
    frames = []
    for data, percent in (("digits", 3), ("mnist", 6)):
        runs = [run for seed in range(5) for run in pair_of(percent + seed, seed, data=data)]
        frames.append(frame_of(runs))
    comparisons = evaluation.fid_comparisons(pd.concat(frames, ignore_index=True), 4.0)
    assert comparisons["n"].tolist() == [5, 5]
    assert comparisons["mean"].tolist() == pytest.approx([5, 8])
    assert evaluation.forest_labels(comparisons) == [
        "quantum − matched, digits", "quantum − matched, mnist",
    ]  # fmt: skip


def test_margin_decides_and_without_pairs_there_is_no_forest(tmp_path, evaluate, draw_only):
    draw_only("forest.png")
    out = tmp_path / "out"
    runs = []
    for (arm, noise), seed in itertools.product({"quantum": 30, "matched": 32}.items(), range(5)):
        images = noisy(THREES[:9], seed + noise, noise)
        runs.append(make_run(tmp_path, images, arm=arm, seed=seed))
    words = {}
    for margin, measured in (("1", runs), ("1000", [])):  # they are measured once
        options = ("--csv", tmp_path / "table.csv", "--out", out, "--margin", margin)
        evaluate(*measured, *options)
        text = (out / "comparison.md").read_text()
        assert f"margin of ±{margin} %" in text
        (row,) = tables(text)["Relative differences of FID"]
        words[margin] = row["p equivalent"]
    assert Image.open(out / "forest.png").size[0] > 1000
    assert words["1"] != words["1000"]

    evaluate(runs[0], "--out", out)
    assert not (out / "forest.png").exists()
    assert "Relative differences" not in (out / "comparison.md").read_text()


# ---------------------------------------------------------------------- published procedure
def test_a_conditional_run_is_measured_class_by_class_and_together(
    tmp_path, evaluate, capsys, draw_only, monkeypatch, classifier
):
    draw_only("closest_pairs.png", "overview.png")
    measured = []
    original = evaluation.Evaluator.measure_images

    def measure_images(self, generated, *others):
        measured.append(generated)
        return original(self, generated, *others)

    monkeypatch.setattr(evaluation.Evaluator, "measure_images", measure_images)

    # Classes 3 and 8, ten images each; the same images as those of two single models.
    images = {label: noisy(TEST.of_class(label)[:10], seed=label) for label in (3, 8)}
    both = make_run(tmp_path, torch.cat(list(images.values())), classes=(3, 8))
    single = [make_run(tmp_path, images[label], classes=(label,)) for label in (3, 8)]
    rows, three, eight = evaluate(both, *single, "--out", tmp_path / "out")
    assert [row["label"] for row in rows] == [3, 8, "mean", "all"]
    assert [row["run"].split(": ")[1] for row in rows] == ["3", "8", "mean", "all"]

    # Class by class as the single models; then their mean.
    for row, alone in zip(rows, (three, eight), strict=False):
        for part in ("metrics", "floor", "n_generated", "n_real", "n_training", "note"):
            assert row[part] == alone[part]
    mean = rows[2]
    for key in ("fid", "kid", "precision", "near_copies", "label_accuracy"):
        for part in ("metrics", "floor"):
            values = [three[part][key], eight[part][key]]
            assert mean[part][key] == pytest.approx(np.mean(values))

    # Together: against all images of these classes, which take turns, without a search for copies.
    together = rows[3]
    assert (together["n_generated"], together["reference"]) == (20, "all")
    real = TRAIN.images[(TRAIN.labels == 3) | (TRAIN.labels == 8)]
    assert together["n_real"] == len(real)
    generated = measured[2]
    assert generated.labels.tolist() == [3, 8] * 10
    assert (generated.images[0::2] == images[3]).all() and (
        generated.images[1::2] == images[8]
    ).all()
    _, _, features_of = classifier
    fid = evaluation.frechet_distance(features_of(generated.images), features_of(real))
    assert together["metrics"]["fid"] == pytest.approx(fid)
    assert together["n_training"] == three["n_training"] + eight["n_training"]
    accuracies = [three["metrics"]["label_accuracy"], eight["metrics"]["label_accuracy"]]
    assert together["metrics"]["label_accuracy"] == pytest.approx(np.mean(accuracies))
    assert together["metrics"]["near_copies"] is None

    # The KID of the mean is that of independent images.
    errors = [alone["metrics"]["kid_standard_error"] for alone in (three, eight)]
    assert mean["metrics"]["kid_standard_error"] == pytest.approx(np.hypot(*errors) / 2)

    # Printed in this order; in the table of arms beside the single models, over the same classes.
    printed = [
        line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert printed[2:10:2] == [f"{both.name}: {name}" for name in ("3", "8", "mean", "all")]
    report = tables((tmp_path / "out" / "comparison.md").read_text())
    by_arm = {row["arm"]: row for row in report["Comparison of runs"]}
    assert by_arm["classical conditional-3-8"]["FID"] == by_arm["classical"]["FID"]
    assert by_arm["classical conditional-3-8"]["classes"] == "3/8"
    (row,) = [row for row in report["All classes of a model together"] if row["arm"] != FLOOR]
    assert row["classes"] == "3-8" and row["n generated"] == "20"
    (row,) = [
        row for row in report["Paired differences against classical"] if row["metric"] == "FID"
    ]
    assert (row["difference"], float(row["mean"])) == ("classical conditional-3-8 − classical", 0)

    # A row of pictures for each class, real images and both arms side by side.
    pictures = Image.open(tmp_path / "out" / "overview.png")
    assert pictures.size[0] > 2 * pictures.size[1]
    assert Image.open(both / "closest_pairs.png").size[1] > 700


def test_fid_over_that_of_real_images_is_taken_at_equal_numbers(
    tmp_path, evaluate, classifier, draw_only
):
    draw_only()
    _, _, features_of = classifier
    images = noisy(TEST.of_class(5), seed=1)
    reference = features_of(TRAIN.of_class(5))

    # Enough held-out images: the reference is the same, and so is the number.
    (few,) = evaluate(make_run(tmp_path / "few", images[:10], classes=(5,)))
    ratio = few["metrics"]["fid"] / few["floor"]["fid"]
    assert few["metrics"]["fid_ratio"] == pytest.approx(ratio)
    assert few["floor"]["fid_ratio"] == 1

    # More than are held out: half of the reference is set aside, and as many are compared; also if
    # there happen to be as many.
    half = len(reference) // 2
    many = torch.cat([images, images, images, images])
    for generated in (many, many[:half]):
        (result,) = evaluate(make_run(tmp_path / str(len(generated)), generated, classes=(5,)))
        assert result["floor"]["n"] == half <= len(generated)
        values = []
        for draw in range(2):
            stream = partial(random_stream, 0, "evaluation")
            order = torch.randperm(len(reference), generator=stream("floor", draw))
            chosen = torch.randperm(len(generated), generator=stream("ratio", draw))[:half]
            features = features_of(generated[chosen])
            values.append(evaluation.frechet_distance(features, reference[order[half:]]))
        expected = np.mean(values) / result["floor"]["fid"]
        assert result["metrics"]["fid_ratio"] == pytest.approx(expected, rel=1e-4)
        assert result["metrics"]["fid_ratio"] > 1.5  # noise is seen


def test_rows_of_earlier_evaluations_are_kept_and_shown(tmp_path, evaluate, draw_only):
    draw_only("overview.png")
    table = tmp_path / "measured" / "digits.csv"
    runs = [
        make_run(tmp_path, noisy(THREES[:10], seed=seed), arm=arm, seed=seed)
        for seed in (0, 1)
        for arm in ("matched", "quantum")
    ]
    first, second = runs[:2], runs[2:]
    evaluate(*first, "--csv", table)
    before = pd.read_csv(table)
    evaluate(*second, "--csv", table, "--out", tmp_path / "out")
    after = pd.read_csv(table)
    assert list(after["run"]) == [run.name for run in runs]
    pd.testing.assert_frame_equal(after[:2], before)
    shown = pd.read_csv(tmp_path / "out" / "comparison.csv")
    pd.testing.assert_frame_equal(shown, after)
    assert "quantum − matched" in (tmp_path / "out" / "comparison.md").read_text()

    # The picture is of the runs that are there.
    with Image.open(tmp_path / "out" / "overview.png") as picture:
        assert picture.size[1] > 0

    # Measured again, by another judge too: replaced, not doubled. And shown without any run.
    evaluate(*first, "--csv", table, "--seed", "1")
    assert len(pd.read_csv(table)) == 4
    assert pd.read_csv(table)["features"].nunique() == 2
    evaluate("--csv", table, "--out", tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {"comparison.csv", "comparison.md", "comparison.png", "forest.png"}


def test_data_sources_are_not_averaged(tmp_path, evaluate):
    """Digits and MNIST in one table: a report on each, and the tests of both together."""
    runs = []
    for source, factor in (("digits", 1), ("mnist", 10)):
        for arm, fid in (("matched", 1.0), ("quantum", 2.0)):
            for seed in range(5):
                runs.append(fake(arm, 3, seed, factor * (fid + seed / 10), data=source))
                runs[-1]["run"] = f"{source} {arm} {seed}"
    table = tmp_path / "both.csv"
    table.write_text(evaluation.comparison_csv(runs))
    evaluate("--csv", table, "--out", tmp_path / "out")
    report = (tmp_path / "out" / "comparison.md").read_text()
    first, second = report.split("# Comparison of runs\n")[1:]
    for text, factor in ((first, 1), (second, 10)):
        rows = tables("# Comparison of runs\n" + text)["Comparison of runs"]
        means = {row["arm"]: float(row["FID"].split(" ± ")[0]) for row in rows}
        assert means["quantum"] == pytest.approx(2.2 * factor)
        assert means["matched"] == pytest.approx(1.2 * factor)
    assert "Relative differences of FID" not in first
    compared = tables(second)["Relative differences of FID"]
    assert [row["n"] for row in compared] == ["5", "5"]
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"comparison_digits.png", "comparison_mnist.png", "forest.png"}


def test_what_was_just_measured_replaces_older_rows(tmp_path, evaluate, draw_only):
    draw_only()
    run = make_run(tmp_path, noisy(THREES[:10], seed=0))
    kept = tmp_path / "kept.csv"
    evaluate(run, "--csv", kept)
    older = tmp_path / "older.csv"
    pd.read_csv(kept).assign(fid=99.0).to_csv(older, index=False)
    evaluate(run, "--csv", kept, older, "--out", tmp_path / "out")
    assert list(pd.read_csv(tmp_path / "out" / "comparison.csv")["fid"] < 99) == [True]

    # Of a run that was not measured now the last file's row counts, as without any run.
    other = make_run(tmp_path / "other", noisy(THREES[:10], seed=1), seed=1)
    evaluate(other, "--csv", kept, older, "--out", tmp_path / "out")
    shown = pd.read_csv(tmp_path / "out" / "comparison.csv").set_index("seed")["fid"]
    assert shown[0] == 99 and shown[1] < 99


def test_no_features_replace_no_measurement(tmp_path, evaluate):
    run = make_run(tmp_path, noisy(THREES[:10], seed=0))
    kept = tmp_path / "kept.csv"
    evaluate(run, "--csv", kept)
    before = kept.read_text()
    evaluate(run, "--csv", kept, "--features", "none")
    assert kept.read_text() == before


def test_augmented_and_plain_runs_of_one_name_are_not_mixed_up():
    run = fake("quantum", 3, 0, 1.0)
    texts = [evaluation.comparison_csv([run | {"n_training": n}]) for n in (131, 1048)]
    with pytest.raises(mnist.UserError, match="evaluate each by itself"):
        evaluation.read_comparison(io.StringIO(evaluation.joined(texts)))


def test_a_table_that_another_program_wrote_is_the_same_table():
    """pandas makes 25.0 of 25 beside an empty cell, a spreadsheet 3.00E-03 of 0.003."""
    runs = [fake("quantum", 3, seed, 1.0, n_train=n) for seed in (0, 1) for n in (25, None)]
    ours = evaluation.comparison_csv(runs)
    table = pd.read_csv(io.StringIO(ours)).astype({"label": float})
    theirs = table.assign(lr="3.00E-03").to_csv(index=False)
    assert ",25.0," in theirs and ",3.0," in theirs
    for texts in ([ours, theirs], [theirs, ours]):
        frame = evaluation.read_comparison(io.StringIO(evaluation.joined(texts)))
        assert len(frame) == 4
        assert set(frame["label"]) == {"3"}

    # Whole numbers that became others are shown as they were.
    numbers = ["seed", "n_generated", "n_real", "floor_n"]
    floats = table.astype(dict.fromkeys(numbers, float)).to_csv(index=False)
    kinds = {"floats": floats, "ours": ours}
    shown = {
        kind: evaluation.result_table(evaluation.read_comparison(io.StringIO(text)))
        for kind, text in kinds.items()
    }
    assert shown["floats"] == shown["ours"]


def test_a_table_that_cannot_be_locked_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "LOCK_TIMEOUT", 0.1)
    path = tmp_path / "table.csv"
    with evaluation.locked(path):
        second = evaluation.locked(path)
        with pytest.raises(mnist.UserError, match="another evaluation is writing it"):
            second.__enter__()


def test_a_row_that_is_there_twice_is_named(tmp_path):
    table = evaluation.comparison_csv([fake("quantum", 3, 0, 1.0)])
    header, row = table.splitlines()
    twice = "\n".join([header, row, row])
    with pytest.raises(mnist.UserError, match=r"^run is there twice, as .*, or remove a row"):
        evaluation.read_comparison(io.StringIO(twice))
    file = tmp_path / "twice.csv"
    file.write_text(twice)
    with pytest.raises(mnist.UserError, match=f"^{file}: run is there twice"):
        evaluation.read_tables([file])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda table: table.drop(columns="n_real"), "no column n_real"),
        (lambda table: table[:0], "no rows of single classes"),
        (lambda table: table.assign(seed=""), "empty cells in seed"),
        (lambda table: table.assign(fid="abc"), "Unable to parse string"),
        (lambda table: table.assign(floor_fid="abc"), "Unable to parse string"),
        (lambda table: table.assign(kid_standard_error="abc"), "Unable to parse string"),
        (lambda table: table.assign(n_training="abc"), "Unable to parse string"),
        (lambda table: table.assign(n_generated=8.5), "n_generated: expected whole numbers"),
        (lambda table: table.assign(floor_n=math.inf), "floor_n: expected whole numbers"),
        (lambda table: table.assign(seed="0.5"), "seed: expected whole numbers"),
    ],
)
def test_damaged_tables(change, said, tmp_path, fails):
    table = pd.read_csv(io.StringIO(evaluation.comparison_csv([fake("quantum", 3, 0, 1.0)])))
    file = tmp_path / "damaged.csv"
    change(table).to_csv(file, index=False)
    message = fails(evaluation, ["--csv", file, "--out", tmp_path / "out"])
    assert f"{file}: not a comparison.csv" in message
    assert said in message


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda config: config["settings"].pop("muon_lr"), "no muon_lr"),
        (lambda config: config.pop("condition"), "no condition"),
        (lambda config: config["settings"].update(classes=[]), "expected some of 0 to 9"),
        (lambda config: config["settings"].update(classes=[99]), "expected some of 0 to 9"),
        (lambda config: config["settings"].update(arm=""), "arm: expected a name"),
        (lambda config: config["settings"].update(steps=None), "steps None: expected a number"),
        (lambda config: config["settings"].update(steps=math.nan), "steps nan: expected a number"),
        (lambda config: config["settings"].update(n_train="25"), "n_train '25': expected a whole"),
        (lambda config: config["settings"].update(n_train=25.0), "n_train 25.0: expected a whole"),
        (lambda config: config.update(condition=["a"]), "condition ['a']: expected a text"),
        (lambda config: config.update(device="cpu", versions=None), "'NoneType' object"),
    ],
)
def test_damaged_configurations(change, said, tmp_path, fails):
    run = make_run(tmp_path, THREES[:4])
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))
    message = fails(evaluation, [run])
    assert f"{run / 'config.json'}: not a run's configuration of this version" in message
    assert said in message


def test_all_runs_are_checked_before_any_is_measured(tmp_path, evaluate, capsys):
    good = make_run(tmp_path, THREES[:4])
    bad = {
        "trained on other images": make_run(tmp_path, THREES[:4], seed=1, training=THREES),
        "training images, expected": make_run(tmp_path, THREES[:4], n_train=500, training=THREES),
        "images of shape (3, 28, 28)": make_run(tmp_path, THREES[:4].repeat(1, 3, 1, 1), seed=2),
    }
    for said, run in bad.items():
        with pytest.raises(SystemExit):
            evaluate(good, run)
        message = capsys.readouterr().err
        assert said in message and f"{run}: " in message
        assert not (good / "metrics.json").exists()


def test_the_published_protocol_makes_no_csv(tmp_path, fails):
    message = fails(evaluation, ["runs", "--protocol", "paper", "--csv", tmp_path / "a.csv"])
    assert "--csv: --protocol paper makes no such table" in message


def test_the_floor_beside_all_classes_is_of_the_run_s_class(tmp_path, evaluate):
    """Held-out threes, as if generated, are as good as real threes."""
    (result,) = evaluate(make_run(tmp_path, THREES[:30]), "--reference", "all")
    assert 0.6 < result["metrics"]["fid_ratio"] < 1.6
    assert result["floor"]["from"] == "test split"
    assert result["floor"]["n"] == 30

    # More than there are: all of these, and as many generated ones for the ratio.
    more = make_run(tmp_path / "more", torch.cat([THREES, THREES]))
    (result,) = evaluate(more, "--reference", "all")
    assert (result["floor"]["n"], result["floor"]["draws"]) == (len(THREES), 1)
    assert 0.6 < result["metrics"]["fid_ratio"] < 1.6


def test_runs_beside_other_real_images_make_no_pair():
    runs = [fake("quantum", 3, 0, 1.0), fake("matched", 3, 0, 2.0) | {"reference": "all"}]
    assert len(evaluation.pairs_of_runs(frame_of(runs), "matched")) == 0


def test_a_pattern_without_a_match_is_no_folder(capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(["runs/*mnist3*"])
    assert capsys.readouterr().err == "error: runs/*mnist3*: no such folder\n"


def test_a_table_of_an_earlier_version_is_shown(tmp_path, evaluate):
    """It has no rate of Muon and no FID over that of real images."""
    runs = [fake(arm, 3, 0, 1.0) | {"run": arm} for arm in ("matched", "quantum")]
    text = evaluation.comparison_csv(runs)
    frame = pd.read_csv(io.StringIO(text)).drop(columns=["muon_lr", "fid_ratio"])
    table = tmp_path / "earlier.csv"
    frame.to_csv(table, index=False)
    evaluate("--csv", table, "--out", tmp_path / "out")
    assert "quantum − matched" in (tmp_path / "out" / "comparison.md").read_text()


def test_the_images_of_a_conditional_run_keep_their_classes(tmp_path, evaluate, draw_only):
    draw_only()
    images = torch.cat([TEST.of_class(8)[:10], TEST.of_class(3)[:10]])  # exchanged
    rows, *_ = evaluate(make_run(tmp_path, images, classes=(3, 8)))
    assert [row["metrics"]["label_accuracy"] < 0.2 for row in rows] == [True] * 4


def test_paper_protocol(tmp_path, evaluate, classifier):
    """Five images against the first five of the training split, whatever their class."""
    _, _, features_of = classifier
    run = make_run(tmp_path, THREES[:9])
    out = tmp_path / "out"
    evaluate(run, "--protocol", "paper", "--features", "classifier", "--out", out)
    record = json.loads((run / "metrics_paper.json").read_text())

    # Beside it, real digits of the run's own class.
    first_five = TRAIN.images[:5]
    generator = random_stream(0, "evaluation", "paper")
    pool = evaluation.Split(TRAIN.images[5:], TRAIN.labels[5:]).of_class(3)
    pool = pool[torch.randperm(len(pool), generator=generator)[:200]]
    draws = [pool[torch.randperm(len(pool), generator=generator)[:5]] for _ in range(100)]
    scores = [
        evaluation.frechet_distance(features_of(draw), features_of(first_five)) for draw in draws
    ]
    fid = record["fid"]
    assert fid["real_95"] == pytest.approx(np.percentile(scores, [2.5, 97.5]), rel=1e-4)
    assert fid["real_mean"] == pytest.approx(np.mean(scores), rel=1e-4)
    expected = evaluation.ssim(THREES[:5], first_five)
    assert record["ssim_paired"]["run"] == pytest.approx(expected, rel=1e-4)

    written = (out / "paper_protocol.md").read_text()
    assert run.name in written
    assert "271.05" in written
    assert "0.1263" in written


# ---------------------------------------------------------------------------------- mistakes
def run_of(images, **more):
    """A maker of one run folder."""
    return lambda root: [make_run(root, images, **more)]


FIVE = run_of(THREES[:5])
INCEPTION = ("--features", "inception", "--inception_weights")
PAPER = ("--protocol", "paper")
MISTAKES = [  # how the run folders are made, more options, what the error says
    (run_of(()), (), "not finished"),
    (lambda root: [root], (), "no run folder, it has no config.json"),
    (FIVE, ("--out", __file__), "File exists"),
    (FIVE, ("--n_real", 3), "--n_real 3: expected more than 3"),
    (FIVE, ("--against", "quantum"), "--against: expected --out, and no"),
    (FIVE, ("--against", "qunatum", "--out", "o"), "--against qunatum: no such run, expected of "),
    (FIVE, ("--margin", 0), "--margin 0: expected per cent above 0"),
    (FIVE, ("--margin", "nan"), "--margin nan: expected per cent above 0"),
    (FIVE, ("--margin", 3), "--margin: expected --out, and no"),
    (FIVE, (*PAPER, "--out", "new", "--family", 3), "--family: expected --out, and no"),
    (FIVE, ("--out", ""), "argument --out: expected a path, not an empty text"),
    (FIVE, (*INCEPTION[2:], "none.pth"), "--inception_weights: expected --features inception"),
    (FIVE, ("--seed", -1), "--seed -1: expected 0 to"),
    (FIVE, ("--device", "cuda:99"), "--device cuda:99: expected auto, cpu"),
    (FIVE, ("--device", "meta"), "--device meta: expected auto, cpu"),
    (FIVE, ("--device", "hpu"), "--device hpu: expected auto, cpu"),
    (run_of(THREES[:1]), (), "at least 2"),
    (lambda root: FIVE(root) + run_of(THREES[:5], data="mnist")(root), (), "mixed data sets"),
    (lambda root: FIVE(root / "a") + FIVE(root / "b"), (), "have the same arm, condition, class"),
    (run_of(THREES[:5], data="pathmnist"), (), "cal_fid_ssim_medmnist.py"),
    (run_of(THREES[:5], training=TRAINED_THREES), (), "trained on other images"),  # other order
    (FIVE, (*INCEPTION, "none.pth"), "use --features classifier"),
    (FIVE, (*PAPER, "--features", "none"), "needs features"),
    (run_of(THREES[:3]), (*PAPER, "--features", "classifier"), "3 images, expected 5"),
    (
        run_of(THREES[:5], training=TRAINED_THREES),
        (*PAPER, "--features", "classifier"),
        "trained on other images",
    ),
    (lambda root: [FIVE(root)[0] / "config.json"], (), "config.json: a file, no folder"),
]


@pytest.mark.parametrize("make, options, message", MISTAKES)
def test_mistakes_print_one_line_and_exit_2(make, options, message, tmp_path, evaluate, fails):
    line = fails(evaluation, [*make(tmp_path), *options, "--data_dir", evaluate.data_dir])
    assert re.search(message, line), line


def test_data_dir_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)
    (tmp_path / "evaluation").write_text("in the way")
    (run,) = FIVE(tmp_path / "runs")
    evaluation.main([str(run), "--data_dir", str(tmp_path)])
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'evaluation'}/" in out + err
    assert "not written" in out + err
    assert (run / "metrics.json").exists()


def test_too_little_memory_is_a_line(tmp_path, fails, monkeypatch):
    """torch's own words; another RuntimeError is a fault, with its traceback."""
    words = "DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate 7 bytes"

    def fail(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(evaluation, "read_run", fail)
    assert "can't allocate memory" in fails(evaluation, [tmp_path])
    words = "shapes do not match"
    with pytest.raises(RuntimeError, match="shapes"):
        evaluation.main([str(tmp_path)])


def test_ctrl_c(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "read_run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        evaluation.main([str(tmp_path)])
    assert capsys.readouterr().err == "interrupted\n"


# ------------------------------------------------------------------ results before decoration
def test_a_matplotlibrc_that_asks_for_latex_does_no_harm(
    tmp_path, evaluate, monkeypatch, draw_only
):
    draw_only("closest_pairs.png", "comparison.png")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    run = make_run(tmp_path, THREES[:5])
    evaluate(run, "--out", tmp_path / "out")
    assert (run / "closest_pairs.png").exists()
    assert (tmp_path / "out" / "comparison.png").exists()


def test_pictures_of_an_earlier_evaluation_go_with_its_tables(tmp_path, evaluate, draw_only):
    """scaling.png has no place beside tables of one size."""
    draw_only()
    out = tmp_path / "out"
    small = make_run(tmp_path, THREES[:5], n_train=10)
    whole = make_run(tmp_path, THREES[:5])
    evaluate(small, whole, "--out", out, "--features", "none")
    assert (out / "scaling.png").exists()
    evaluate(whole, "--out", out, "--features", "none")
    assert not (out / "scaling.png").exists()
    assert (out / "comparison.png").exists()

    # Of a table alone there is no overview.
    (out / "overview.png").write_bytes(b"of the runs before")
    evaluate("--csv", out / "comparison.csv", "--out", out)
    assert not (out / "overview.png").exists()


def test_a_picture_that_fails_is_a_line(tmp_path, evaluate, monkeypatch, capsys, draw_only):
    """And no older picture stays in its place."""
    draw_only("overview.png")  # which is compared
    run = make_run(tmp_path, THREES[:5])
    out = tmp_path / "out"
    options = ("--out", out, "--features", "none")
    evaluate(run, *options)
    before = (out / "overview.png").read_bytes()

    def fail(*_, **__):
        raise ZeroDivisionError("no\nfont")

    monkeypatch.setattr(evaluation, "draw_panels", fail)
    monkeypatch.setattr(evaluation, "draw_closest_pairs", fail)
    draw_only("overview.png", "comparison.png", "closest_pairs.png")
    evaluate(run, *options)
    printed, notes = capsys.readouterr()
    lines = notes.splitlines()
    assert run.name in printed
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: {path} not written (not drawn: ZeroDivisionError: no font)"
        for path in (run / "closest_pairs.png", out / "comparison.png")
    ]
    assert not (run / "closest_pairs.png").exists()
    assert not (out / "comparison.png").exists()
    assert (out / "comparison.md").exists()
    assert (out / "overview.png").read_bytes() == before


@pytest.mark.parametrize("protocol, name", [("full", "metrics"), ("paper", "metrics_paper")])
def test_a_run_folder_that_cannot_be_written(protocol, name, tmp_path, evaluate, capsys):
    """A colleague's: measured and printed all the same."""
    run = make_run(tmp_path, THREES[:5])
    (run / f"{name}.json" / "in the way").mkdir(parents=True)
    options = ("--protocol", protocol, "--features", "classifier")
    evaluation.main([str(run), *options, "--data_dir", str(evaluate.data_dir)])
    printed, notes = capsys.readouterr()
    assert f"| {run.name} " in printed
    assert f"note: {run / name}.json not written" in notes


def test_an_out_folder_that_cannot_be_written(tmp_path, evaluate, capsys):
    """The measured table is printed before the error."""
    run = make_run(tmp_path, THREES[:5])
    out = tmp_path / "out"
    (out / "comparison.csv" / "in the way").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        evaluate(run, "--out", out, "--features", "none")
    printed, errors = capsys.readouterr()
    assert f"| {run.name} " in printed
    assert f"error: [Errno 21] Is a directory: '{out / 'comparison.csv'}'" in errors


def test_a_stdout_that_takes_nothing_loses_no_file(tmp_path):
    """A full disk, ``>&-`` and ``| head``. On tissue, which needs no classifier."""
    _, images, labels = pathmnist.load_images("tissue", tmp_path)
    training = pathmnist.select_images(images, labels, 9, None, 0)
    script = cal_fid_ssim_medmnist.__file__

    # The three at the same time: each takes seconds to import what it needs.
    endings = {"full": ">/dev/full", "closed": ">&-", "gone": "| true"}
    processes = {}
    for stdout, ending in endings.items():
        root = tmp_path / stdout
        run = make_run(root, images[:5], training=training, data="tissue", label=9)
        words = [sys.executable, script, run, "--out", root / "out", "--features", "none"]
        words += ["--data_dir", root]
        command = f"set -o pipefail; {shlex.join(map(str, words))} {ending}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes[stdout] = subprocess.Popen(["bash", "-c", command], text=True, **pipes)

    errors = {stdout: process.communicate()[1] for stdout, process in processes.items()}
    for stdout, process in processes.items():
        assert process.returncode == 0, (stdout, errors[stdout])
        lines = errors[stdout].splitlines()
        notes = [line for line in lines if line.startswith(("note", "error"))]
        expected = ["note: not printed (No space left on device)"] if stdout == "full" else []
        assert notes[:1] == expected, stdout
        assert "Traceback" not in errors[stdout]
        assert "Exception ignored" not in errors[stdout]
        names = {path.name for path in (tmp_path / stdout / "out").iterdir()}
        assert names == {"comparison.csv", "comparison.md", "comparison.png", "overview.png"}


def test_a_cache_of_another_user(tmp_path, monkeypatch, capsys):
    """A folder of mode 0700, in which not even looking is allowed."""
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)
    exists = Path.exists

    def forbidden(path, **options):
        if path.parent.name == "evaluation":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", forbidden)
    (run,) = FIVE(tmp_path / "runs")
    evaluation.main([str(run), "--data_dir", str(tmp_path)])
    assert "Permission denied" in capsys.readouterr().err
    assert (run / "metrics.json").exists()


def test_a_proxy_that_never_answers(tmp_path, evaluate, monkeypatch, capsys):
    """The download says what it is, and ends."""
    monkeypatch.setattr(mnist, "DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        (run,) = FIVE(tmp_path / "runs")
        options = ["--features", "inception", "--data_dir", evaluate.data_dir]
        with pytest.raises(SystemExit, match="2"):
            evaluation.main([str(word) for word in (run, *options)])
    out, err = capsys.readouterr()
    assert "ownload" not in out
    *_, note, error = err.strip().splitlines()
    assert note.startswith("downloading inception_v3_google-0cc3c7bd.pth to ")
    assert error.startswith("error: ")
    assert "timed out" in error
    assert "use --features classifier" in error
    assert socket.getdefaulttimeout() is None


# --------------------------------------------------------------------------------- PathMNIST
@pytest.fixture
def pathmnist_file(evaluate):
    """A file in medmnist's format: of a class ten train, five val and ten darker test images."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, n, brightest in (("train", 90, 256), ("val", 45, 256), ("test", 90, 99)):
        shape = (n, 28, 28, 3)
        arrays[f"{split}_images"] = generator.integers(0, brightest, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 9).astype(np.uint8)[:, None]
    write_npz(evaluate.data_dir, **arrays)


@pytest.mark.parametrize("data, label", [("pathmnist", 8), ("tissue", 9)])
def test_pathmnist(data, label, tmp_path, evaluate, pathmnist_file, monkeypatch):
    """The sibling command line, on a file of medmnist's format and on embedded tissue.

    The tissue's one class trains no classifier. With --augment copies of the square's symmetries
    are copies.
    """
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 40)
    _, images, labels = pathmnist.load_images(data, evaluate.data_dir)
    real = pathmnist.select_images(images, labels, label, None, 0)
    eight = pathmnist.symmetries(real)
    settings = {"label": label, "data": data}
    plain = make_run(tmp_path / "a", real[:5], training=real, **settings)
    turned_images = real[:6].rot90(1, (2, 3))
    turned = make_run(tmp_path / "b", turned_images, training=real, symmetries=8, **settings)

    for run, n_training in ((plain, len(real)), (turned, len(eight))):
        (result,) = evaluate(run, script=cal_fid_ssim_medmnist)
        measured = result["metrics"]
        assert result["n_real"] == len(real)
        assert result["n_training"] == n_training
        assert ("trained with augmentation" in result["note"]) == (run == turned)
        assert result["features"].startswith("scattering:")
        assert measured["fid"] > 0
        assert measured["near_copies"] == 1
        assert measured["distance_ratio"] == 0
        assert (measured["label_accuracy"] is None) == (data == "tissue")


@pytest.mark.parametrize("first_is_augmented", [False, True])
def test_augmented_runs_share_no_training_set_with_others(
    first_is_augmented, tmp_path, evaluate, pathmnist_file, monkeypatch
):
    """Of one class, size and seed: the checksum is the same, what was trained on is not."""
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 40)
    _, images, labels = pathmnist.load_images("pathmnist", evaluate.data_dir)
    real = pathmnist.select_images(images, labels, 8, None, 0)
    turned = real[:6].rot90(1, (2, 3))
    settings = {"training": real, "label": 8, "data": "pathmnist"}
    plain = make_run(tmp_path, turned, arm="classical", **settings)
    augmented = make_run(tmp_path, turned, arm="matched", symmetries=8, **settings)

    runs = [augmented, plain] if first_is_augmented else [plain, augmented]
    results = evaluate(*runs, script=cal_fid_ssim_medmnist)
    by_name = {result["run"]: result for result in results}
    assert by_name[plain.name]["n_training"] == len(real)
    assert by_name[augmented.name]["n_training"] == 8 * len(real)
    assert by_name[plain.name]["metrics"]["distance_ratio"] > 0
    assert by_name[augmented.name]["metrics"]["distance_ratio"] == 0


def test_tissue_of_another_file_is_told_by_its_run(
    tmp_path, evaluate, pathmnist_file, fails, monkeypatch
):
    """Of fewer images than it was trained on: the training script has an error class of its own."""
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)
    images = torch.zeros(10, 3, 28, 28, dtype=torch.uint8)
    run = make_run(tmp_path, images, n_train=500, label=8, data="pathmnist", training=images)
    line = fails(cal_fid_ssim_medmnist, [run, "--data_dir", evaluate.data_dir])
    assert f"{run}: trained on other images than are in" in line


def test_each_split_is_read_once(tmp_path, evaluate, monkeypatch):
    """The test split of MNIST is held out and tests the classifier."""
    read = []
    load_images = mnist.load_images

    def spy(data, data_dir, split="train"):
        read.append(split)
        return load_images(data, data_dir, split)

    monkeypatch.setattr(mnist, "load_images", spy)
    evaluate(make_run(tmp_path, THREES[:5]))
    assert read == ["train", "test"]


def test_held_out_tissue_is_the_validation_split(tmp_path, evaluate, pathmnist_file, capsys):
    """PathMNIST's test split is of another clinic: neither floor nor near-copies are taken from it.

    All validation images as if generated: they are the floor, and a hundredth of them near-copies.
    """
    _, images, labels = pathmnist.load_images("pathmnist", evaluate.data_dir, "train")
    _, val_images, val_labels = pathmnist.load_images("pathmnist", evaluate.data_dir, "val")
    training = pathmnist.select_images(images, labels, 8, None, 0)
    validation = val_images[val_labels == 8]
    run = make_run(tmp_path, validation, training=training, label=8, data="pathmnist")
    (result,) = evaluate(run, script=cal_fid_ssim_medmnist)
    floor = result["floor"]
    assert floor["from"] == "val split"
    assert floor["n"] == result["n_held_out"] == 5
    for key in ("fid", "kid", "distance_ratio", "near_copies", "label_accuracy"):
        assert result["metrics"][key] == pytest.approx(floor[key], rel=1e-5), key

    # The classifier's accuracy on both.
    record = result["classifier"]
    assert (record["n_val"], record["n_test"]) == (45, 90)
    line = (
        f"classifier: {record['val_accuracy']:.2%} of 45 val images, "
        f"{record['test_accuracy']:.2%} of 90 test images"
    )
    assert line in capsys.readouterr().out
