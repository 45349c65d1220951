"""`python -m diffxfer`."""

from diffxfer.cli.main import main

if __name__ == "__main__":
    main()
