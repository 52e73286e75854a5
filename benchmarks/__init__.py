"""What the relay costs and how quick it is, measured with real processes and sockets."""
