"""`python -m pden`."""

from pden.cli import main

if __name__ == "__main__":
    main()
