"""Measures generated PathMNIST tissue: cal_fid_ssim.py's figures, tables and options, over the run
folders of quantum_diffusion_pathmnist.py.

    python cal_fid_ssim_medmnist.py runs/*pathmnist*
    python cal_fid_ssim_medmnist.py runs/*pathmnist_adenocarcinoma* --out comparison

Runs on the embedded colon tissue (``tissue``) are measured against that tissue. It has one class,
so no classifier can be trained on it: use --features inception, or --features none.
"""

from collections.abc import Sequence

import cal_fid_ssim
from quantum_diffusion_pathmnist import UserError, load_images, select_images, symmetries

PATHMNIST = cal_fid_ssim.DataSet(
    sources=("pathmnist", "tissue"),
    load_images=load_images,
    select_images=select_images,
    user_error=UserError,
    withdrawn={"classical": (95.72, 0.4107), "quantum": (84.40, 0.0931)},
    symmetries=symmetries,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake prints one line and exits 2."""
    cal_fid_ssim.main(argv, PATHMNIST)


if __name__ == "__main__":
    main()
