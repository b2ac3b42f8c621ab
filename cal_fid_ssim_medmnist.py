"""Measures generated PathMNIST tissue, with cal_fid_ssim.py's figures, tables and options.

The runs are those of quantum_diffusion_pathmnist.py. Features are texture statistics, see
``Scattering``.

    python cal_fid_ssim_medmnist.py runs/*pathmnist*
    python cal_fid_ssim_medmnist.py runs/*pathmnist_adenocarcinoma* --out comparison

Runs on the embedded colon tissue (``tissue``) are measured against that tissue. It has one class,
so no classifier can be trained on it, and --features classifier is refused.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import cal_fid_ssim
import quantum_diffusion_pathmnist as pathmnist

OCTAVES = 3
ORIENTATIONS = 4
LUMINANCE = [0.299, 0.587, 0.114]  # of red, green and blue
PLANES = [LUMINANCE, [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]]  # and two differences of colours
STANDARDISED_BY = 2000  # images, about
BATCH = 20  # images at once, of 5 MB each


# ------------------------------------------------------------------------- texture statistics
class Scattering(nn.Module):
    """Texture statistics: the scattering transform of second order, averaged over the image.

    Bruna & Mallat 2013 (arXiv 1203.1513). First order: the modulus of the image's cyclic response
    to Morlet wavelets of OCTAVES and ORIENTATIONS. Second order: the modulus of the coarser
    wavelets' response to that. The averages of the moduli distinguish textures that have the same
    spectrum.

    The features are 186 numbers of luminance and two colour differences: their means, and the
    logarithms of their deviations and averages. They are standardised by their means and deviations
    over ``images`` (N, 3, H, W) uint8, and clipped to -3..3, since KID cubes what lies far out.
    """

    def __init__(self, images: Tensor):
        super().__init__()
        # The features' checksum must not depend on the machine, where last bits of exp and cos may
        # differ: so the waves are left out of it, and the rest is in float32.
        waves = morlet_wavelets(*images.shape[2:])  # (wave, H, W)
        self.register_buffer("waves", waves, persistent=False)

        batches = [self.statistics(to_unit(part)) for part in images.split(BATCH)]
        statistics = torch.cat(batches)  # (N, 186)
        self.register_buffer("mean", statistics.mean(dim=0).float())
        self.register_buffer("deviation", statistics.std(dim=0).clamp(min=1e-9).float())

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) float64 in 0..1 -> (N, 186)."""
        return ((self.statistics(images) - self.mean) / self.deviation).clamp(-3, 3)

    def statistics(self, images: Tensor) -> Tensor:
        """The same before they are standardised."""
        # d: plane, c: colour channel, n: image, h and w: its rows and columns
        colours = torch.tensor(PLANES).to(images)
        planes = torch.einsum("dc,nchw->ndhw", colours, images)
        first_order = moduli(planes, self.waves)  # (N, 3, wave, H, W)

        # Each octave's waves see the first order of all finer octaves.
        second_order = []
        for k in range(ORIENTATIONS, len(self.waves), ORIENTATIONS):
            coarser = self.waves[k : k + ORIENTATIONS]
            second = moduli(first_order[:, :, :k], coarser)  # (N, 3, k, ORIENTATIONS, H, W)
            second_order.append(second.mean(dim=(-2, -1)).flatten(1))

        deviations = planes.std(dim=(2, 3))  # (N, 3)
        averages = first_order.mean(dim=(-2, -1)).flatten(1)  # (N, 3 * wave)
        sizes = torch.cat([deviations, averages, *second_order], dim=1)
        return torch.cat([planes.mean(dim=(2, 3)), sizes.clamp(min=1e-5).log()], dim=1)


def morlet_wavelets(height: int, width: int) -> Tensor:
    """The Fourier transforms of the wavelets (OCTAVES * ORIENTATIONS, height, width), float64.

    A wave of frequency 0.75 pi in the finest octave under a Gaussian of deviation 0.8 pixels, both
    scaled by two an octave; less as much of the Gaussian as makes its mean zero.
    """
    y_frequency = 2 * math.pi * torch.fft.fftfreq(height).double()
    x_frequency = 2 * math.pi * torch.fft.fftfreq(width).double()
    y, x = torch.meshgrid(y_frequency, x_frequency, indexing="ij")

    waves = []
    for octave in range(OCTAVES):
        frequency = 0.75 * math.pi / 2**octave
        deviation = 0.8 * 2**octave
        for angle in torch.arange(ORIENTATIONS).double() * math.pi / ORIENTATIONS:
            along = x * angle.cos() + y * angle.sin()
            across = y * angle.cos() - x * angle.sin()
            wave = gaussian(along - frequency, across, deviation)
            ground = gaussian(along, across, deviation)
            waves.append(wave - ground * wave[0, 0])  # at frequency zero: the mean
    return torch.stack(waves)


def gaussian(along: Tensor, across: Tensor, deviation: float) -> Tensor:
    """The Fourier transform of a Gaussian of this deviation in pixels, at these frequencies."""
    return (-(deviation**2) / 2 * (along**2 + across**2)).exp()


def moduli(planes: Tensor, waves: Tensor) -> Tensor:
    """The modulus of each plane (..., H, W) convolved with each wave (n, H, W): (..., n, H, W)."""
    spectra = torch.fft.fft2(planes).unsqueeze(-3)  # (..., 1, H, W)
    return torch.fft.ifft2(spectra * waves).abs()


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float64 in 0..1."""
    return images.double() / 255


def scattering_extractor(images: Tensor) -> cal_fid_ssim.Extractor:
    """``Scattering`` on the CPU, standardised by about STANDARDISED_BY of the images.

    images: the training images of all classes, (N, 3, 28, 28) uint8.
    """
    every = 1 + len(images) // STANDARDISED_BY
    return cal_fid_ssim.Extractor(
        name="scattering",
        preprocessing="x / 255",
        model=Scattering(images[::every]).eval(),
        prepare=to_unit,
        device="cpu",
        batch=BATCH,
    )


# ------------------------------------------------------------------------ the search for copies
def layout(images: Tensor) -> Tensor:
    """What is compared in the search for copies: luminance at equal brightness and contrast.

    images (N, 3, H, W) uint8 -> (N, 1, H, W) int16, whole numbers of mean 0 and deviation 255, so
    that distances are in deviations; at most 255 sqrt(H W). Pixels as they are would call all pale
    images copies, as those are near to everything. Flat images become a chessboard, which is as far
    from tissue as unrelated textures are; as zeros they would be nearer than these.
    """
    # c: colour channel, n: image, h and w: its rows and columns
    weights = torch.tensor(LUMINANCE).double()
    grey = torch.einsum("c,nchw->nhw", weights, images.double())[:, None]  # (N, 1, H, W)
    grey = grey - grey.mean(dim=(2, 3), keepdim=True)
    deviation = grey.std(dim=(2, 3), correction=0, keepdim=True)

    # In the place of flat images.
    rows = torch.arange(grey.shape[-2])[:, None]  # (H, 1)
    columns = torch.arange(grey.shape[-1])  # (W,)
    chessboard = 1.0 - 2 * ((rows + columns) % 2)  # (H, W), of 1 and -1

    scaled = torch.where(deviation < 1e-9, chessboard, grey / deviation.clamp(min=1e-9))
    return (255 * scaled).round().to(torch.int16)


PATHMNIST = cal_fid_ssim.DataSet(
    module=pathmnist,
    # PathMNIST's test split comes from another clinic than train and val: other stains, another
    # scanner. Measured against it, anything but a training image would look far off.
    held_out_split={"pathmnist": "val", "tissue": "test"},
    paper_scores={"classical": (95.72, 0.4107), "quantum": (84.40, 0.0931)},
    own_extractors={"scattering": scattering_extractor},
    copy_features=layout,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake prints one line and exits 2."""
    cal_fid_ssim.main(argv, PATHMNIST)


if __name__ == "__main__":
    main()
