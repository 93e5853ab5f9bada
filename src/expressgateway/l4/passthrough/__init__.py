"""QUIC that is routed and never decrypted (Mode A)."""
