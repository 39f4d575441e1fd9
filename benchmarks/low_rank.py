"""Randomised against whole singular value decomposition, of a matrix of Z-Image's width.

The change of a trained matrix is taken as 256 directions, each a 16th part smaller than the one
before, in noise. Times are of the process, so that other programs on the machine do not count.

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
    scales = 0.9375 ** torch.arange(256)
    matrix = torch.randn(side, 256) * scales @ torch.randn(256, side)
    matrix += 0.02 * torch.randn(side, side)
    begin = time.process_time()
    _, found, _ = largest_directions(matrix, rank)
    fast = time.process_time() - begin
    kept = (found.square().sum() / matrix.square().sum()).item()
    print(f"randomised: {fast:.1f} s, keeps {kept:.5f}", flush=True)
    begin = time.process_time()
    values = torch.linalg.svd(matrix, full_matrices=False)[1]
    whole = time.process_time() - begin
    best = (values[:rank].square().sum() / values.square().sum()).item()
    print(f"whole: {whole:.1f} s, {whole / fast:.0f} times as long, keeps {best:.5f}")


if __name__ == "__main__":
    main()
