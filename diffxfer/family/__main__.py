"""`python -m diffxfer.family` prints the folder of the shipped family."""

from __future__ import annotations

from diffxfer.family import family_folder

if __name__ == "__main__":
    print(family_folder())
