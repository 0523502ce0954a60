"""`python -m forerun`: the same as the `forerun` command."""

from forerun.cli import app

if __name__ == "__main__":
    app(prog_name="forerun")
