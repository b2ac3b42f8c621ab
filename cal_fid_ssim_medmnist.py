"""Measures generated PathMNIST tissue: cal_fid_ssim.py's figures, tables and options, over the run
folders of quantum_diffusion_pathmnist.py; features are texture statistics, see ``Scattering``.

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

OCTAVES, ORIENTATIONS = 3, 4
# Luminance and two differences of colours, of red, green and blue in 0..1
COLOURS = torch.tensor([[0.299, 0.587, 0.114], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]])


class Scattering(nn.Module):
    """Texture statistics: the scattering transform of second order (Bruna & Mallat 2013, arXiv
    1203.1513), averaged over the image.

    Morlet wavelets of OCTAVES and ORIENTATIONS, cyclic; the modulus of their response; the response
    of the coarser wavelets to that, and its modulus. The averages of the moduli tell textures apart
    that have the same spectrum. Features: of luminance and two colour differences the means and the
    logarithms of deviations and averages, 186 numbers, standardised by their means and deviations
    over ``images`` (N, 3, H, W) uint8 and clipped to -3..3, since KID cubes what lies far out."""

    def __init__(self, images: Tensor):
        super().__init__()
        frequencies = (2 * math.pi * torch.fft.fftfreq(side).double() for side in images.shape[2:])
        y, x = torch.meshgrid(*frequencies, indexing="ij")
        waves = []
        for octave in range(OCTAVES):
            for angle in torch.arange(ORIENTATIONS).double() * math.pi / ORIENTATIONS:
                along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
                wave, ground = (
                    (-((0.8 * 2**octave) ** 2) / 2 * ((along - f) ** 2 + across**2)).exp()
                    for f in (0.75 * math.pi / 2**octave, 0.0)
                )
                waves.append(wave - ground * wave[0, 0])  # of mean zero
        self.register_buffer("waves", torch.stack(waves))  # their Fourier transforms
        found = torch.cat([self.statistics(prepare(part)) for part in images.split(100)])
        # In float32, so that the features' checksum does not depend on the machine
        self.register_buffer("mean", found.mean(0).float())
        self.register_buffer("deviation", found.std(0).clamp(min=1e-9).float())

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) float64 in 0..1 -> (N, 186)."""
        return ((self.statistics(images) - self.mean) / self.deviation).clamp(-3, 3)

    def statistics(self, images: Tensor) -> Tensor:
        """The same before they are standardised."""
        planes = torch.einsum("dc,nchw->ndhw", COLOURS.to(images), images)
        first, averages = respond(planes, self.waves), []  # (N, 3, wave, H, W)
        for k in range(ORIENTATIONS, len(self.waves), ORIENTATIONS):  # of all finer octaves
            second = respond(first[:, :, :k], self.waves[k : k + ORIENTATIONS])
            averages.append(second.mean((-2, -1)).flatten(1))
        averages = torch.cat([planes.std((2, 3)), first.mean((-2, -1)).flatten(1), *averages], 1)
        return torch.cat([planes.mean((2, 3)), averages.clamp(min=1e-5).log()], 1)


def respond(planes: Tensor, waves: Tensor) -> Tensor:
    """The modulus of each plane (..., H, W) convolved with each wave (n, H, W): (..., n, H, W)."""
    return torch.fft.ifft2(torch.fft.fft2(planes).unsqueeze(-3) * waves).abs()


def prepare(images: Tensor) -> Tensor:
    """uint8 to float64 in 0..1."""
    return images.double() / 255


def layout(images: Tensor) -> Tensor:
    """What is compared in the search for copies: the luminance (N, 1, H, W) at mean 0 and deviation
    255, or 0 of flat images, so that distances are in deviations. Pixels as they are would call all
    pale images copies, as those are near to everything. images: (N, 3, H, W) uint8."""
    grey = torch.einsum("c,nchw->nhw", COLOURS[0].double(), images.double())[:, None]
    grey = grey - grey.mean((2, 3), keepdim=True)
    return (255 * grey / grey.std((2, 3), correction=0, keepdim=True).clamp(min=1e-9)).round()


def scattering_extractor(images: Tensor) -> cal_fid_ssim.Extractor:
    """``Scattering`` on the CPU, standardised by some 2,000 of the training images of all classes
    (N, 3, 28, 28) uint8."""
    model = Scattering(images[:: 1 + len(images) // 2000]).eval()
    return cal_fid_ssim.Extractor("scattering", "x / 255", model, prepare, 3, "cpu")


PATHMNIST = cal_fid_ssim.DataSet(
    module=pathmnist,
    sources=("pathmnist", "tissue"),
    withdrawn={"classical": (95.72, 0.4107), "quantum": (84.40, 0.0931)},
    features={"scattering": scattering_extractor},
    compared=layout,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake prints one line and exits 2."""
    cal_fid_ssim.main(argv, PATHMNIST)


if __name__ == "__main__":
    main()
