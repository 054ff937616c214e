"""`python -m muxjax`."""

from muxjax.cli.main import main

main()
