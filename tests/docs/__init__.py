"""Runs the commands of README and docs, and compares the outputs that the pages show.

An HTML comment before a fenced block says what to do with it:

    <!-- docs: run -->                    run it with bash, in a copy of the checkout
    <!-- docs: run timeout=120 -->        with more time than 60 seconds
    <!-- docs: run exact -->              compare the figures of the output too
    <!-- docs: server examples/small.yaml -->    run it while this fleet is served
    <!-- docs: serve -->                  its last command is a server: start it, and stop it later
    <!-- docs: save fleet.yaml -->        write it to this file
    <!-- docs: output -->                 it is the output of the block that was run before
    <!-- docs: output of: COMMANDS -->    it is the output of these commands
    <!-- docs: skip REASON -->            do not run it

`<!-- docs: page skip REASON -->` covers all blocks of a page. In a block with lines that start with
`$ `, the other lines are the outputs of those commands.

`python -m tests.docs` runs all pages, `python -m tests.docs README.md` some of them, and
`python -m tests.docs --write PAGE` puts the actual outputs into a page.
"""
