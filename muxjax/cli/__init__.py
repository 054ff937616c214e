"""The command line: `muxjax serve | generate | plan | simulate | bench | ...`."""
