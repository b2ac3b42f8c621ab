"""Measures generated PathMNIST tissue: cal_fid_ssim.py's figures, tables and options, over the run
folders of quantum_diffusion_pathmnist.py.

    python cal_fid_ssim_medmnist.py runs/*pathmnist*
    python cal_fid_ssim_medmnist.py runs/*pathmnist_adenocarcinoma* --out comparison

Runs on the embedded colon tissue (``tissue``) are measured against that tissue. It has one class,
so no classifier can be trained on it: use --features inception, or --features none.
"""

from collections.abc import Sequence

import cal_fid_ssim
import quantum_diffusion_pathmnist as pathmnist

PATHMNIST = cal_fid_ssim.DataSet(
    module=pathmnist,
    sources=("pathmnist", "tissue"),
    withdrawn={"classical": (95.72, 0.4107), "quantum": (84.40, 0.0931)},
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake prints one line and exits 2."""
    cal_fid_ssim.main(argv, PATHMNIST)


if __name__ == "__main__":
    main()
