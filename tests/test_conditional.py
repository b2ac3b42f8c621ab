"""One class-conditional model: what the class does, streams, resume, rows, command line."""

import json

import pytest
import torch
from conftest import leave_zero, only, tiny, write_npz

import quantum_diffusion_mnist as qd
import quantum_diffusion_pathmnist as pathmnist

pytestmark = pytest.mark.usefixtures("quick_loss_curve")
TWO = ["--conditional", "--digits", "3", "8"]


def settings_of(*classes, arm="quantum", **others):
    small = {"steps": 6, "batch_size": 8, "timesteps": 20, "n_qubits": 3, "n_frames": 1}
    return qd.Settings(arm, classes=classes, **small | others)


def some_digits(label, n=8):
    _, digits, labels = qd.load_images("digits", "")
    return digits[labels == label][:n]


# --------------------------------------------------------------------------- what the class does


def test_labels_permuted_in_training_permute_the_model(tmp_path):
    # The embedding starts at zero, so both trainings are the same but for the classes' names.
    images = torch.cat([some_digits(0), some_digits(1)])
    labels = torch.arange(2).repeat_interleave(8)
    settings = settings_of(0, 1, lr=0.05)
    model = qd.train(settings, images, tmp_path, "hash", labels)
    (tmp_path / "checkpoint.pt").unlink()
    permuted = qd.train(settings, images, tmp_path, "hash", 1 - labels)

    x = torch.randn(4, 1, 28, 28)
    t = torch.tensor([2, 5, 10, 19])
    asked = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        assert torch.equal(model(x, t, asked), permuted(x, t, 1 - asked))
        assert (model(x, t, asked) - model(x, t, 1 - asked)).abs().max() > 1e-3


def test_the_class_is_added_to_the_time():
    unet = leave_zero(qd.make_unet(1, settings_of(3, 8)))
    seen = []
    unet.encode[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    t = torch.tensor([5, 7])
    labels = torch.tensor([8, 3])
    unet(torch.zeros(2, 1, 28, 28), t, labels)
    time = unet.embed_time(qd.timestep_embedding(t, 64))
    expected = torch.nn.functional.silu(time + unet.embed_class.weight[labels])
    assert torch.equal(seen[0], expected)


def test_all_classes_start_as_the_same_function():
    unet = qd.make_unet(1, settings_of(3, 8))
    assert not unet.embed_class.weight.any()
    assert qd.make_unet(1, settings_of(3)).embed_class is None


def test_the_class_must_be_given_where_it_belongs():
    x = torch.zeros(2, 1, 28, 28)
    t = torch.tensor([5, 7])
    with pytest.raises(qd.UserError, match="expected .B,., the class of each image"):
        qd.make_unet(1, settings_of(3, 8))(x, t)
    with pytest.raises(qd.UserError, match="expected None"):
        qd.make_unet(1, settings_of(3))(x, t, torch.tensor([3, 3]))


# --------------------------------------------------------------------------- streams and weights


def test_image_k_of_a_class_has_the_same_noise_in_every_model():
    # A model at its start predicts zero, so that its images are their noise alone.
    def drawn(settings, numbers):
        return qd.sample_images(settings, qd.make_unet(1, settings), "image", numbers, 5)

    both = drawn(settings_of(3, 8), range(2, 4))
    assert torch.equal(both[:2], drawn(settings_of(3), range(2, 4)))
    assert torch.equal(both[2:], drawn(settings_of(8), range(2, 4)))
    assert not torch.equal(both[:2], both[2:])
    assert not torch.equal(both[0], both[1])


def test_each_image_is_asked_for_by_its_class():
    class Recorder(torch.nn.Module):
        """Predicts zero and keeps the labels that it was given."""

        channels = 1

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen = []

        def forward(self, x, t, labels, generators):
            self.seen.append(labels.tolist())
            return torch.zeros_like(x)

    model = Recorder()
    qd.sample_images(settings_of(3, 8), model, "image", range(3), 5)
    assert model.seen == [[3, 3, 3, 8, 8, 8]] * len(model.seen)
    assert len(model.seen) == 5


def test_runs_of_one_seed_are_independent_but_arms_share_everything():
    def start(*classes, arm="quantum"):
        settings = settings_of(*classes, arm=arm)
        unet = qd.make_unet(1, settings)
        _, noise = qd.training_noise(settings, torch.zeros(4, 1, 28, 28), 2)
        order = qd.training_order(settings, 100)
        return unet.stem.weight, noise, order

    for one, same in zip(start(3), start(3, arm="matched"), strict=True):
        assert torch.equal(one, same)
    for classes in ((8,), (3, 8)):
        for one, other in zip(start(3), start(*classes), strict=True):
            assert not torch.equal(one, other)


def test_the_images_of_a_class_are_those_of_its_single_model():
    _, images, labels = qd.load_images("digits", "")
    data = qd.DataSet("digits", images, labels, len(images), None)
    both, their_labels = data.chosen_images(settings_of(3, 8, n_train=5))
    assert their_labels.tolist() == [3] * 5 + [8] * 5
    for part, label in ((both[:5], 3), (both[5:], 8)):
        alone, _ = data.chosen_images(settings_of(label, n_train=5))
        assert torch.equal(part, alone)


def test_symmetries_keep_their_labels():
    images = torch.arange(3 * 28 * 28 * 3, dtype=torch.uint8).view(3, 3, 28, 28)
    labels = torch.tensor([0, 4, 4])
    data = pathmnist.DataSet("pathmnist", images, labels, 3, pathmnist.Symmetries)
    settings = pathmnist.Settings(classes=(0, 4))
    augmented, their_labels = data.training_images(settings, torch.device("cpu"))
    chosen, chosen_labels = data.chosen_images(settings)
    assert len(their_labels) == len(augmented) == 24
    for k in range(24):
        image = augmented[torch.tensor([k])][0]
        corners = sorted(image[:, [0, 0, -1, -1], [0, -1, 0, -1]].T.tolist())
        (source,) = [
            j
            for j in range(3)
            if sorted(chosen[j][:, [0, 0, -1, -1], [0, -1, 0, -1]].T.tolist()) == corners
        ]
        assert their_labels[k] == chosen_labels[source]


# ------------------------------------------------------------------------------------- whole runs


def test_a_conditional_run_has_a_row_for_each_class(tmp_path):
    qd.main(tiny(tmp_path, *TWO, "--use_quantum"))
    run = only(tmp_path)
    assert run.name == "quantum_digits_conditional-3-8_n8_seed0"
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["classes"] == [3, 8]
    assert config["settings"]["class_names"] == ["3", "8"]
    assert config["images"]["used"] == 16  # eight of each
    assert config["n_eval"] == 4  # of each

    for name, columns in (("samples_final.png", 4), ("samples/step_000002.png", 2)):
        grid = qd.grid_description(run / name)
        assert (grid["columns"], grid["count"]) == (columns, 2 * columns)


def test_more_images_of_each_class_are_added_to_those_there(tmp_path):
    qd.main(tiny(tmp_path / "at once", *TWO, "--n_eval", "13"))
    qd.main(tiny(tmp_path / "later", *TWO, "--n_eval", "2"))
    run = only(tmp_path / "later")
    few = qd.load_grid(run / "samples_final.png")
    qd.main(tiny(tmp_path / "later", *TWO, "--n_eval", "13"))
    many = qd.load_grid(run / "samples_final.png")
    assert json.loads((run / "config.json").read_text())["n_eval"] == 13
    at_once = qd.load_grid(only(tmp_path / "at once") / "samples_final.png")
    assert torch.equal(many.unflatten(0, (2, 13))[:, :2], few.unflatten(0, (2, 2)))
    assert (many.int() - at_once.int()).abs().max() <= 1  # other batches round differently


def test_a_killed_conditional_run_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(qd, "CHECKPOINT_STEPS", 2)
    argv = [*TWO, "--use_quantum", "--shots", "8", "--gate_noise", "0.05,0.1"]
    qd.main(tiny(tmp_path / "whole", *argv))

    # Killed in the fourth step, then in the sampling of the final images.
    training_noise = qd.training_noise
    sample_images = qd.sample_images

    def killed_in_training(settings, x0, step):
        if step == 3:
            raise KeyboardInterrupt
        return training_noise(settings, x0, step)

    def killed_in_sampling(settings, model, series, *others):
        if series == "image":
            raise KeyboardInterrupt
        return sample_images(settings, model, series, *others)

    for name, kill in (
        ("training_noise", killed_in_training),
        ("sample_images", killed_in_sampling),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(qd, name, kill)
            qd.main(tiny(tmp_path / "killed", *argv))
    qd.main(tiny(tmp_path / "killed", *argv))

    whole = only(tmp_path / "whole")
    killed = only(tmp_path / "killed")
    for name in ("samples_final.png", "loss.csv", "training_progress.gif"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_a_trained_conditional_model_is_sampled_under_conditions(tmp_path):
    qd.main(tiny(tmp_path, *TWO, "--use_quantum", "--lr", "0.05"))
    qd.main(
        tiny(tmp_path, *TWO, "--use_quantum", "--lr", "0.05", "--shots", "4", "--weights", tmp_path)
    )
    ideal = tmp_path / "quantum_digits_conditional-3-8_n8_seed0"
    noisy = tmp_path / "quantum_digits_conditional-3-8_n8_seed0_shots4"
    assert (ideal / "model.pt").read_bytes() == (noisy / "model.pt").read_bytes()
    _, model = qd.load_run(noisy)
    assert model.embed_class.weight[[3, 8]].any(dim=1).all()
    assert not model.embed_class.weight[[0, 9]].any()


def test_all_tissues_are_the_default_and_one_is_a_single_model(tmp_path):
    write_npz(tmp_path)
    argv = tiny(tmp_path / "runs", "--data_dir", tmp_path, "--n_train", "2", script=pathmnist)[2:]

    def made(*more):
        before = set((tmp_path / "runs").glob("*"))
        pathmnist.main([*argv, "--steps", "2", "--timesteps", "4", "--n_frames", "1", *more])
        return sorted(run.name for run in set((tmp_path / "runs").glob("*")) - before)

    (run,) = made()
    assert run == "classical_pathmnist_conditional_n2_seed0"
    grid = pathmnist.load_grid(tmp_path / "runs" / run / "samples_final.png")
    assert grid.shape == (9 * 4, 3, 28, 28)
    assert made("--labels", "mucus") == ["classical_pathmnist_mucus_n2_seed0"]
    assert made("--labels", "mucus", "debris") == [
        "classical_pathmnist_conditional-debris-mucus_n2_seed0"
    ]
    assert made("--labels", "mucus", "debris", "--no-conditional") == [
        "classical_pathmnist_debris_n2_seed0"
    ]


def test_digits_are_single_models_by_default(tmp_path):
    qd.main(tiny(tmp_path, "--digits", "3", "8", "--steps", "1"))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_digit_named_twice_is_a_single_model(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(qd, "make_run", lambda args, data, device, run: made.append(run.settings))
    qd.main(
        ["--data", "digits", "--conditional", "--digits", "3", "3", "--save_dir", str(tmp_path)]
    )
    (settings,) = made
    assert (settings.classes, settings.steps) == ((3,), 1250)


def test_classes_in_any_order_are_the_same_run(tmp_path):
    assert settings_of(8, 3, 8) == settings_of(3, 8)
    names = {settings_of(*range(10)).name, settings_of(3, 8).name, settings_of(3).name}
    assert names == {
        "quantum_digits_conditional_nall_seed0",
        "quantum_digits_conditional-3-8_nall_seed0",
        "quantum_digits3_nall_seed0",
    }


def test_a_conditional_model_has_a_longer_default(capsys):
    def steps(*argv):
        args = qd.build_parser().parse_args(argv)
        return [
            qd.settings_of_flags(args, "classical", classes=classes).steps
            for classes in ((3,), (3, 8))
        ]

    assert steps() == [1250, 5000]
    assert steps("--steps", "7") == [7, 7]


@pytest.mark.parametrize("classes", [(), (10,), (-1, 3)])
def test_settings_know_their_classes(classes):
    with pytest.raises(qd.UserError, match="expected some of 0 to 9"):
        settings_of(*classes)


def test_an_unknown_class_is_one_line(fails, tmp_path):
    line = fails(qd, tiny(tmp_path, "--conditional", "--digits", "3", "11"))
    assert "invalid choice: '11'" in line
    line = fails(pathmnist, ["--labels", "mucus", "muscle", "--save_dir", tmp_path])
    assert "invalid choice: 'muscle'" in line
    line = fails(qd, tiny(tmp_path, *TWO, "--n_train", "500"))
    assert "class 3 has 131 training images" in line
