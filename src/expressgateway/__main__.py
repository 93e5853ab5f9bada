"""`python -m expressgateway`: the same as the command `expressgateway`."""

from expressgateway.cli.main import main

main()
