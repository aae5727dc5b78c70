"""`python -m capcli` runs `capcli`."""

from capcli.cli import main

if __name__ == "__main__":
    main()
