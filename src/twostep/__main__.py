"""`python -m twostep`, which torchrun needs."""

from twostep.cli import main

main()
