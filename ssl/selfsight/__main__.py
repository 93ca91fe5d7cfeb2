"""`python -m selfsight`: the command line."""

from selfsight.cli import main

if __name__ == "__main__":
    main()
