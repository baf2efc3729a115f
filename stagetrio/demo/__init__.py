"""The storm of ``stagetrio demo``: the same 200 clients against a plain Trio server, then against stagetrio.

`storm` says what the storm is; `control` and `staged` are the two servers; `load` plays the clients, `process` hosts a
server, `runner` starts these as processes and brings their figures home; `report` and `plot` say what came out, and
`screen` shows it in a terminal.
"""
