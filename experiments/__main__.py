"""`python -m experiments list`, `python -m experiments NAME --field value`."""

from experiments.harness.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
