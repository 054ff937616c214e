"""`python -m muxjax`."""

from muxjax.cli import main

main()
