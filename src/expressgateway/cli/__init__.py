"""The command ``expressgateway``: what it prints, and its exit codes."""
