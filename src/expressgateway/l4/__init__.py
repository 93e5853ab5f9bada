"""Layer 4: bytes and datagrams relayed as they are."""
