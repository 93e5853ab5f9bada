"""The supervisor process: listening sockets, workers, reload, drain, admin listener. No client's bytes."""
