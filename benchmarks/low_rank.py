"""Randomised against whole singular value decomposition, of a matrix of Z-Image's width.

The change of a trained matrix is taken as a few large directions in noise: singular values fall as
1 / (1 + index / 32). Times are of the process, so that other programs on the machine do not count.

python benchmarks/low_rank.py --side 3840 --rank 64
"""

from __future__ import annotations

import argparse
import time

import torch

from twostep.exports.low_rank import largest_directions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=3840)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side, rank = options.side, options.rank
    values = 1 / (1 + torch.arange(side) / 32)
    left = torch.linalg.qr(torch.randn(side, side))[0]
    right = torch.linalg.qr(torch.randn(side, side))[0]
    matrix = left * values @ right
    best = (values[:rank].square().sum() / values.square().sum()).item()
    begin = time.process_time()
    _, found, _ = largest_directions(matrix, rank)
    fast = time.process_time() - begin
    kept = (found.square().sum() / matrix.square().sum()).item()
    print(f"randomised: {fast:.1f} s, keeps {kept:.5f} of {best:.5f}", flush=True)
    begin = time.process_time()
    torch.linalg.svd(matrix, full_matrices=False)
    whole = time.process_time() - begin
    print(f"whole: {whole:.1f} s, {whole / fast:.0f} times as long")


if __name__ == "__main__":
    main()
