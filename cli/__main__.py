"""`python -m cli`, where the console script is not installed."""

from cli.main import main

main(prog_name="easel")
