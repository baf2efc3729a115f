"""``python -m stagetrio``: the same command."""

from stagetrio.cli import main

raise SystemExit(main())
