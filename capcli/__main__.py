"""`python -m capcli` is `capcli`."""

from capcli.cli import main

if __name__ == "__main__":
    main()
