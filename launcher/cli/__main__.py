"""`python -m launcher.cli` is `launch`."""

from launcher.cli.main import main

main()
