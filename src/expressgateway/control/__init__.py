"""The supervisor process: listening sockets, workers, reload, drain, admin listener. It sees no client's bytes."""
