"""The evaluation's command line on run folders that are written here: figures, tables, errors."""

import hashlib
import io
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

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
from quantum_diffusion_mnist import load_images, random_stream, save_grid, select_images

TRAIN = load_images("digits", None, "train")[1:]
TEST = load_images("digits", None, "test")[1:]
RESULTS = Path(__file__).parents[1] / "result_gif" / "results"


def make_run(root, images, arm="classical", label=3, n_train=None, seed=0, data="digits",
             shots=None, training=None, **trained_on):  # fmt: skip
    """A finished run folder with these images (N, C, 28, 28)."""
    settings = mnist.Settings(arm, data, label, n_train, seed, shots=shots)
    folder = root / settings.name
    folder.mkdir(parents=True)
    training = select_images(*TRAIN, label, n_train, seed) if training is None else training
    trained_on["sha256"] = hashlib.sha256(training.numpy().tobytes()).hexdigest()
    config = {"settings": asdict(settings), "images": trained_on, "weights": {}}
    config |= {"condition": settings.condition, "n_eval": len(images)}
    (folder / "config.json").write_text(json.dumps(config))
    if len(images):
        save_grid(folder / "samples_final.png", images)
    return folder


def of_class(data, label):
    return data[0][data[1] == label]


TRAINED, THREES = (of_class(data, 3) for data in (TRAIN, TEST))


def noisy(images, seed, deviation=40):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * deviation
    return (images + noise).clamp(0, 255).byte()


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Runs the command line; returns the runs' metrics.json."""
    data_dir = tmp_path_factory.mktemp("data")

    def call(*arguments, script=evaluation):
        script.main([*map(str, arguments), "--data_dir", str(data_dir)])
        files = [a / "metrics.json" for a in arguments if isinstance(a, Path)]
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
    model, record = evaluation.load_classifier("digits", folder, TRAIN, TEST, 0)
    model.requires_grad_(False)
    return model, record, lambda x: model[:-1](mnist.to_float(x)).double().numpy()


def test_figures_are_those_of_the_functions(tmp_path, evaluate, classifier, capsys):
    """And a flag changes what it should."""
    (model, record, features), images = classifier, noisy(of_class(TEST, 5)[:25], 1)
    run, reference = make_run(tmp_path, images, label=5), of_class(TRAIN, 5)
    (result,) = evaluate(run)
    table = capsys.readouterr().out
    assert run.name in table and "upwards: n < 1000; against embedded digits" in table
    assert Image.open(run / "closest_pairs.png").size[0] > 800
    a, b = features(images), features(reference)
    assert (features(TRAIN[0][:128]) ** 2).mean() == pytest.approx(1, abs=2e-4)  # as KID expects
    assert result["n_generated"] == 25 and result["n_real"] == len(reference)
    assert result["classifier"] == record and record["test_accuracy"] > 0.9
    chosen = torch.randperm(len(b), generator=random_stream(0, "evaluation", "equal"))[:25]
    training = select_images(*TRAIN, 5, None, 0)
    usual, _ = evaluation.nearest_images(of_class(TEST, 5), training)
    distance, nearest = evaluation.nearest_images(images, training)
    threshold = np.percentile(usual, 1)
    expected = {
        "fid": evaluation.frechet_distance(a, b),
        "label_accuracy": evaluation.accuracy(model, images, 5),
        "ssim_paired": evaluation.ssim(images, reference),
        "near_copies": (distance <= threshold).mean(),
        "distance_ratio": np.median(distance) / np.median(usual),
        "ssim_nearest": evaluation.ssim(images, training[nearest]),
    }
    pairs = evaluation.kernel_distance(a, b), evaluation.precision_recall(b[chosen], a, 3)
    names = "kid", "kid_standard_error", "precision", "recall"
    expected |= zip(names, sum(pairs, ()), strict=True)
    found = {key: result["metrics"][key] for key in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    assert result["metrics"]["fid_infinity"] is None  # 25 images, 64 features
    assert result["near_copy_threshold"] == threshold
    assert result["floor"]["near_copies"] == (usual <= threshold).mean()
    assert evaluate(run) == [result]  # deterministic
    (everything,) = evaluate(run, "--reference", "all", "--n_real", 200)
    assert everything["n_real"] == 200 and everything["metrics"]["fid"] > 2 * found["fid"]
    (pixels,) = evaluate(run, "--features", "none")
    assert pixels["metrics"]["fid"] is None and pixels["features"] == "none"
    assert pixels["metrics"]["ssim_paired"] == found["ssim_paired"]


def test_floor_is_what_held_out_images_score(tmp_path, evaluate, monkeypatch):
    """All held-out images as if generated: their FID is the floor's, as each of its draws is the
    whole test class; beyond the test split's size the training split is halved."""
    (result,) = evaluate(make_run(tmp_path / "a", THREES))
    assert result["floor"]["from"] == "test split" and result["floor"]["n"] == len(THREES)
    for key in ("fid", "kid", "label_accuracy", "ssim_diversity"):
        assert result["metrics"][key] == pytest.approx(result["floor"][key], rel=1e-5), key
    sizes, compare = [], evaluation.Evaluator.compare

    def spy(self, sample, reference):
        sizes.append((len(sample[0]), len(reference[0])))
        return compare(self, sample, reference)

    monkeypatch.setattr(evaluation.Evaluator, "compare", spy)
    (result,) = evaluate(make_run(tmp_path / "b", TRAINED[:100]))
    half = (total := len(TRAINED)) // 2
    assert result["floor"]["from"] == "training split, set aside"
    assert sizes == [(100, total)] + [(half, total - half)] * 2  # no image on both sides
    assert f"floor at n = {half}" in result["note"] and result["floor"]["n"] == half


def test_inception_through_the_command_line(tmp_path, evaluate, capsys, monkeypatch):
    """FID of torchvision's own model and preprocessing put together by hand; and a name that no
    table, figure or terminal can take as it is."""
    monkeypatch.setattr(evaluation, "FLOOR_DRAWS", 1)
    model = inception_v3(init_weights=False, transform_input=True).eval()
    torch.save(model.state_dict(), weights := tmp_path / "weights.pth")  # with the auxiliary head
    run = make_run(tmp_path, THREES[:2]).rename(tmp_path / "a|b$x$\nc\udcff")
    options = ("--features", "inception", "--inception_weights", weights)
    (result,) = evaluate(run, *options, "--n_real", 4)
    printed = capsys.readouterr().out
    assert "| a¦b$x$ c? " in printed and " inception:" in printed
    generator = random_stream(0, "evaluation", "reference")
    real = TRAINED[torch.randperm(len(TRAINED), generator=generator)[:4]]
    pixels = torch.cat([THREES[:2], real]).expand(-1, 3, -1, -1) / 255
    pixels = resize(pixels, 342, antialias=True)[..., 21:320, 21:320]
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    model.fc = torch.nn.Identity()
    with torch.inference_mode():
        features = model((pixels - mean) / deviation).numpy()
    expected = evaluation.frechet_distance(features[:2], features[2:])
    assert result["metrics"]["fid"] == pytest.approx(expected, rel=0.02)


def tables(text):
    """The rows of every Markdown table as dictionaries of stripped cells, by their section."""
    found = {}
    for section in text.split("# ")[1:]:
        title, *lines = section.splitlines()
        rows = [[cell.strip() for cell in x.split("|")[1:-1]] for x in lines if x.startswith("|")]
        found[title] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    return found


def test_comparison_files(tmp_path, evaluate, monkeypatch):
    """Two arms, one of them under a condition too and with more noise yet; two sizes."""
    save, drawn, out, runs, shown = mnist.save_figure, {}, tmp_path / "out", [], {}

    def keep(path, figure):
        drawn[path.name] = figure
        if path.parent == out:
            save(path, figure)

    monkeypatch.setattr(mnist, "save_figure", keep)
    arms = {"matched": (None, 5), "quantum": (None, 25), "quantum shots10": (10, 45)}
    for (name, (of, level)), n, s in itertools.product(arms.items(), (10, None), (1, 0)):
        images, end = noisy(THREES[:9], s, level), f", N = {n}" if n else ""
        runs.append(make_run(tmp_path, images, name.split()[0], 3, n, s, shots=of))
        shown |= {"real" + end: select_images(*TRAIN, 3, n, s), name + end: images}
    results = evaluate(*runs, "--out", out)
    frame, text = pd.read_csv(out / "comparison.csv"), (out / "comparison.md").read_text()
    assert list(frame["run"]) == [run.name for run in runs]
    for prefix, part in (("", "metrics"), ("floor_", "floor")):
        values = [result[part]["fid"] for result in results]
        assert frame[f"{prefix}fid"].tolist() == pytest.approx(values)
    found = tables(text)
    rows = {row["arm"]: row for row in found["Comparison of runs"] if row["N"] == "all"}
    assert [*rows] == [*arms, evaluation.FLOOR]
    values = frame[frame["run"].str.fullmatch("quantum_.*nall_seed.")]["fid"]
    half = stats.t.ppf(0.975, 1) * stats.sem(values)
    assert rows["quantum"]["FID"] == f"{values.mean():.3g} ± {half:.3g}"
    rows = found["Paired differences against matched"]
    assert {row["difference"] for row in rows} == {f"{arm} − matched" for arm in [*arms][1:]}
    limits = "".join(row["95 % interval"] for row in rows)
    outside = limits.count("*"), limits.count("[")
    assert "{} of {} intervals (Student's t over seeds) leave zero out".format(*outside) in text
    pictures = {"comparison.png", "scaling.png", "overview.png"}
    assert outside[0] and {x.name for x in out.glob("*.png")} == pictures
    # overview.png: the training images and, of the lowest seed, what each arm made of them
    panels = drawn["overview.png"].axes
    rows = {axes.get_ylabel(): axes.get_images()[0].get_array() for axes in panels}
    assert [*rows][:4] == [f"{name}, N = 10" for name in ("real", *arms)] and len(rows) == 8
    for title, pixels in rows.items():
        images = shown[title]
        assert (pixels[2:30, 2:30] == images[0, 0].numpy()).all() and pixels.shape == (32, 362)
        assert (pixels[:, 30 * len(images) + 2 :] == 255).all()


@pytest.mark.parametrize("name", ["mnist", "four_arms", "scaling", "pathmnist"])
def test_committed_tables_are_those_of_the_committed_csv(name):
    frame = evaluation.read_comparison(RESULTS / name / "comparison.csv")
    expected = (RESULTS / name / "comparison.md").read_text()
    assert evaluation.comparison_text(frame) == expected


NOT_MEASURED = dict.fromkeys([*evaluation.METRICS, "kid_standard_error"])


def fake(arm, label, seed, fid, n_train=None, condition="", sample_steps=50, **metrics):
    """One run's metrics.json; what is not given could not be measured."""
    settings = mnist.Settings(arm, "digits", label, n_train, seed, sample_steps=sample_steps)
    result = {"run": "run", "condition": condition, "settings": asdict(settings), "note": ""}
    result |= {"features": "none", "reference": "class", "n_generated": 100, "n_real": 6000}
    result |= {"n_training": n_train or 6000, "metrics": NOT_MEASURED | {"fid": fid} | metrics}
    floor = {"fid": label / 2 + 0.5, "n": 100, "from": "test split"}
    return result | {"floor": NOT_MEASURED | floor}


def frame_of(runs):
    return evaluation.read_comparison(io.StringIO(evaluation.comparison_csv(runs)))


def differences(runs, baseline="matched"):
    """The rows of paired differences, by arm."""
    found = tables(evaluation.comparison_text(frame_of(runs)))
    rows = found.get(f"Paired differences against {baseline}", [])
    return {row["difference"].split(" − ")[0]: row for row in rows}


def test_means_use_the_classes_that_all_runs_have():
    """And the report says in what the runs differ."""
    runs = [fake("quantum", label, s, label + s) for label in (1, 3) for s in (0, 1)]
    runs += [fake("matched", label, 0, 10 * label) for label in (1, 3, 5)]
    text = evaluation.comparison_text(frame_of(runs))
    rows = tables(text)["Comparison of runs"]
    half = stats.t.ppf(0.975, 1) * stats.sem([2, 3])
    expected = {"quantum": f"2.5 ± {half:.3g}", "matched": "20", evaluation.FLOOR: "1.5"}
    assert {row["arm"]: row["FID"] for row in rows} == expected
    assert {row["classes"] for row in rows} == {"1/3"}
    assert f"Budget: steps {mnist.Settings().steps}" in text and "steps 50, images 100.\n" in text
    runs += [fake("classical", 3, 0, 1, sample_steps=1000)]
    text = evaluation.comparison_text(frame_of(runs))
    assert "**sample_steps 50 / 1000 (not the same in all runs)**, images 100." in text


def spread(labels, seeds, step):
    return {(k, s): step * (9 + 7 * k + s) for k in range(labels) for s in range(seeds)}


INTERVALS = [  # differences by class and seed; pairs; whether their interval is clear of zero
    (spread(1, 5, -0.1), "5", "yes"),
    ({(3, s): (-1) ** s for s in range(5)}, "5", "no"),
    (spread(5, 4, 0.1), "20", "too few seeds"),  # classes of a seed share its randomness
    (spread(7, 1, 0.1), "7", "too few seeds"),
    (spread(1, 5, 0), "5", "no"),
    ({(3, 0): 7.0, (3, 1): float("nan")}, "1", "too few seeds"),
]


@pytest.mark.parametrize("differs, pairs, clear", INTERVALS)
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
    half, limits = stats.t.ppf(0.975, len(values) - 1) * values.sem(), row["95 % interval"]
    expected = [values.mean() - half, values.mean() + half] if half > 0 else []
    found = [float(number) for number in re.findall(r"[-+][\d.]+", limits)]
    assert found == pytest.approx(expected, rel=5e-3)
    assert limits.endswith("*") == (abs(values.mean()) > half)


def test_an_arm_under_a_condition_is_compared_with_its_ideal_twin():
    arms = ("matched", "", 1), ("quantum", "", 3), ("quantum", "shots", 6), ("published", "", 2)
    runs = [fake(arm, 3, s, fid + s, condition=of) for arm, of, fid in arms for s in range(5)]
    means = {arm: row["mean"] for arm, row in differences(runs).items()}
    assert means == {"quantum": "+2", "quantum shots": "+5", "published": "+1"}
    (twin,) = differences(runs, "quantum").values()
    assert (twin["difference"], twin["mean"]) == ("quantum shots − quantum", "+3")
    assert differences(runs, "published") == {}


@pytest.mark.parametrize("against_size, place", [(False, 1), (True, 2)])
def test_panels_show_means_and_below_them_paired_differences(against_size, place):
    """Two sizes, one of them without quantum; the other metrics are not finite."""
    runs = [fake("matched", 3, s, 10 * s, n) for n in (25, 100) for s in (1, 2, 3)]
    runs += [fake("quantum", 3, s, 10 * s + s**2, 100) for s in (1, 2, 3)]
    above, below = evaluation.draw_panels(frame_of(runs), against_size).axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("FID", "FID\n− matched")
    (matched, quantum), (bar,) = above.containers, below.containers
    assert len(matched.lines[0].get_xdata()) == 2
    assert quantum.lines[0].get_xdata() == pytest.approx([place], abs=0.4)
    assert quantum.lines[0].get_ydata() == pytest.approx([20 + 14 / 3])
    assert bar.lines[0].get_ydata() == pytest.approx([14 / 3])
    low, high = bar.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 2) * stats.sem([1, 4, 9]))


def test_paper_protocol(tmp_path, evaluate, classifier):
    """Five images against the first five of the training split, whatever their class."""
    run, out, real = make_run(tmp_path, THREES[:9]), tmp_path / "out", TRAIN[0][:5]
    evaluate(run, "--protocol", "paper", "--features", "classifier", "--out", out)
    record = json.loads((run / "metrics_paper.json").read_text())
    generator = random_stream(0, "evaluation", "paper")  # real digits of the run's own class
    pool = of_class((TRAIN[0][5:], TRAIN[1][5:]), 3)
    pool = pool[torch.randperm(len(pool), generator=generator)[:200]]
    draws = [pool[torch.randperm(len(pool), generator=generator)[:5]] for _ in range(100)]
    (*_, features), found = classifier, record["fid"]
    scores = [evaluation.frechet_distance(features(x), features(real)) for x in draws]
    assert found["real_95"] == pytest.approx(np.percentile(scores, [2.5, 97.5]), rel=1e-4)
    assert found["real_mean"] == pytest.approx(np.mean(scores), rel=1e-4)
    expected = evaluation.ssim(THREES[:5], real)
    assert record["ssim_paired"]["run"] == pytest.approx(expected, rel=1e-4)
    written = (out / "paper_protocol.md").read_text()
    assert run.name in written and "271.05" in written and "0.1263" in written


def run_of(images, **more):
    return lambda root: [make_run(root, images, **more)]


FIVE, COLOUR = run_of(THREES[:5]), torch.zeros(5, 3, 28, 28).byte()
INCEPTION, PAPER = ("--features", "inception", "--inception_weights"), ("--protocol", "paper")
MISTAKES = [  # how the run folders are made, more options, what the error says
    (run_of(()), (), "not finished"),
    (lambda root: [root], (), "config.json: not a run's configuration"),
    (run_of(THREES[:3], arm="best"), (), "config.json: not a run's configuration"),
    (FIVE, ("--out", __file__), "File exists"),
    (run_of(THREES[:1]), (), "at least 2"),
    (lambda root: FIVE(root) + run_of(THREES[:5], data="mnist")(root), (), "mixed data sets"),
    (lambda root: FIVE(root / "a") + FIVE(root / "b"), (), "have the same arm, condition, class"),
    (run_of(THREES[:5], data="pathmnist"), (), "cal_fid_ssim_medmnist.py"),
    (run_of(THREES[:5], training=TRAINED), (), "trained on other images"),  # in another order
    (run_of(COLOUR), (), r"images of \(3, 28, 28\)"),
    (run_of(COLOUR[:, :1, :20, :20]), (), r"of \(1, 20, 20\)"),
    (FIVE, (*INCEPTION, "none.pth"), "leave --features out"),
    (FIVE, (*PAPER, "--features", "none"), "needs features"),
    (run_of(THREES[:3]), (*PAPER, "--features", "classifier"), r"expected \(5, 1, 28, 28\)"),
]


@pytest.mark.parametrize("make, options, message", MISTAKES)
def test_mistakes_print_one_line_and_exit_2(make, options, message, tmp_path, evaluate, fails):
    line = fails(evaluation, [*make(tmp_path), *options, "--data_dir", evaluate.data_dir])
    assert re.search(message, line), line


def test_data_dir_that_cannot_be_written_then_ctrl_c(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)
    (tmp_path / "evaluation").write_text("in the way")
    argv = [*map(str, FIVE(tmp_path / "runs")), "--data_dir", str(tmp_path)]
    evaluation.main(argv)
    assert "--data_dir is not writable" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "read_run", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(SystemExit, match="130"):
        evaluation.main(argv)
    assert capsys.readouterr().err == "interrupted\n"


def test_pathmnist(tmp_path, evaluate, monkeypatch):
    """The sibling command line, on a file of medmnist's format and on embedded tissue, whose one
    class trains no classifier. With --augment copies of the square's symmetries are copies."""
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 40)
    write_npz(evaluate.data_dir)
    for data, label in (("pathmnist", 8), ("tissue", 9)):
        everything = pathmnist.load_images(data, evaluate.data_dir)[1:]
        real = pathmnist.select_images(*everything, label, None, 0)
        eight, what = pathmnist.symmetries(real), {"label": label, "data": data}
        copies = make_run(tmp_path / "a", real[:5], training=real, **what)
        turned = real[:6].rot90(1, (2, 3))
        turned = make_run(tmp_path / "b", turned, training=eight, symmetries=8, **what)
        for run, n in ((copies, len(real)), (turned, len(eight))):
            (result,) = evaluate(run, script=cal_fid_ssim_medmnist)
            metrics = result["metrics"]
            assert result["n_real"] == len(real) and result["n_training"] == n
            assert ("trained with augmentation" in result["note"]) == (n == len(eight))
            assert result["features"].startswith("scattering:") and metrics["fid"] > 0
            assert metrics["near_copies"] == 1 and metrics["distance_ratio"] == 0
            assert (metrics["label_accuracy"] is None) == (data == "tissue")
